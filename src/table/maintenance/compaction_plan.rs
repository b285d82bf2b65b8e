//! Which files a compaction merges.

use std::collections::BTreeMap;

use crate::table::options::MaintenanceOptions;

/// Files that are rewritten as one, by index.
pub type CompactionJob = Vec<usize>;

/// Plans jobs for files of similar size. `sizes` has the size of each file in bytes, the smallest first.
///
/// A file belongs to a tier, each `files_per_merge` times as large as the one before. A tier is merged
/// only if it has that many files, or enough for one of the target size. So a row is rewritten at most
/// once per tier.
pub fn plan_size_tiers(options: &MaintenanceOptions, sizes: &[u64]) -> Vec<CompactionJob> {
    let mut tiers: BTreeMap<u32, Vec<usize>> = BTreeMap::new();
    for (i, size) in sizes.iter().enumerate() {
        if let Some(tier) = options.size_tier(*size) {
            tiers.entry(tier).or_default().push(i);
        }
    }
    let plan_tier = |files: Vec<usize>| {
        let mut jobs = bin_pack(options, sizes, files);
        // The next file did not fit into any job but the last: those outputs are as large as they get.
        let last = jobs.pop().filter(|job| job.len() >= options.files_per_merge);
        jobs.retain(|job| job.len() > 1);
        jobs.into_iter().chain(last)
    };
    tiers.into_values().flat_map(plan_tier).collect()
}

/// Splits files, in their order, into jobs whose inputs have at most the target size in all.
pub fn bin_pack(
    options: &MaintenanceOptions,
    sizes: &[u64],
    files: Vec<usize>,
) -> Vec<CompactionJob> {
    let target_bytes = options.target_file_mib << 20;
    let (mut jobs, mut job_bytes) = (Vec::<CompactionJob>::new(), 0);
    for i in files {
        job_bytes += sizes[i];
        match jobs.last_mut() {
            Some(job) if job_bytes <= target_bytes => job.push(i),
            _ => {
                job_bytes = sizes[i];
                jobs.push(vec![i]);
            }
        }
    }
    jobs
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn files_of_every_size_are_merged_until_they_are_large() {
        let options = MaintenanceOptions::default();
        let largest = options.target_file_mib << 20;
        for size in [1 << 10, 3 << 20, 17 << 20, 20 << 20, 40 << 20, 64 << 20] {
            let mut sizes = vec![size; 300];
            for _ in 0..20 {
                let jobs = plan_size_tiers(&options, &sizes);
                let merged: Vec<u64> =
                    jobs.iter().map(|job| job.iter().map(|i| sizes[*i]).sum()).collect();
                assert!(merged.iter().all(|size| *size <= largest), "{size}");
                let merged_files: HashSet<usize> = jobs.into_iter().flatten().collect();
                let remaining =
                    (0..sizes.len()).filter(|i| !merged_files.contains(i)).map(|i| sizes[i]);
                sizes = remaining.collect();
                sizes.extend(merged);
                sizes.sort_unstable();
            }
            let small = sizes.iter().filter(|size| **size <= largest / 2).count();
            assert!(
                small < options.files_per_merge * 5,
                "{size}: {small} of {} are small",
                sizes.len()
            );
            if size > 16 << 20 {
                assert!(small <= 7, "{size}: {small} of {} are small", sizes.len());
            }
        }
    }
}
