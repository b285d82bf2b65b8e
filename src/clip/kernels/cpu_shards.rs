//! Distributes a batch over the cores of the CPU.

use candle_core::Device;
use rayon::{ThreadPool, ThreadPoolBuilder};

use crate::clip::error::ClipError;

/// Fewest inputs per shard: each shard reads all weights once, however few inputs it has.
const MIN_INPUTS_PER_SHARD: usize = 4;
/// With more shards the parts of an ordinary batch become too small; on more cores each shard gets
/// several.
const MAX_SHARDS: usize = 8;

/// Thread pools, each with its own cores, that each take one part of a batch through a whole encoder.
/// That keeps every core busy between the large products too, without a barrier at each of them: a
/// fifth more images per second on two cores than with all cores in one product after another
/// (docs/performance.md).
pub struct CpuShards {
    thread_pools: Vec<ThreadPool>,
}

impl CpuShards {
    /// Creates one shard per core, up to the maximum; a GPU takes a batch whole.
    pub fn new(device: &Device) -> Result<Self, ClipError> {
        let cores = rayon::current_num_threads();
        let shard_count = if device.is_cpu() { cores.min(MAX_SHARDS) } else { 1 };
        let pool = |shard: usize| {
            let threads = cores / shard_count + usize::from(shard < cores % shard_count);
            ThreadPoolBuilder::new()
                .num_threads(threads)
                .thread_name(move |i| format!("encoder-{shard}-{i}"))
                .build()
                .map_err(|e| ClipError::Device { device: "cpu".into(), reason: e.to_string() })
        };
        let pools = if shard_count == 1 {
            Vec::new()
        } else {
            (0..shard_count).map(pool).collect::<Result<_, _>>()?
        };
        Ok(Self { thread_pools: pools })
    }

    /// Runs `work` on parts of `inputs` in parallel; returns one result per input, in order.
    pub fn run_sharded<T: Sync, R: Send>(
        &self,
        inputs: &[T],
        work: impl Fn(&[T]) -> candle_core::Result<Vec<R>> + Sync,
    ) -> Result<Vec<R>, ClipError> {
        let shard_count = self.thread_pools.len().min(inputs.len() / MIN_INPUTS_PER_SHARD);
        if inputs.is_empty() {
            return Ok(Vec::new());
        }
        if shard_count < 2 {
            return Ok(work(inputs)?);
        }
        let work = &work;
        let chunks = inputs.chunks(inputs.len().div_ceil(shard_count));
        let results: Vec<candle_core::Result<Vec<R>>> = std::thread::scope(|scope| {
            let running: Vec<_> = chunks
                .zip(&self.thread_pools)
                .map(|(part, pool)| scope.spawn(move || pool.install(|| work(part))))
                .collect();
            let join = |handle: std::thread::ScopedJoinHandle<_>| {
                handle.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
            };
            running.into_iter().map(join).collect()
        });
        let mut all = Vec::with_capacity(inputs.len());
        for result in results {
            all.extend(result?);
        }
        Ok(all)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_come_in_the_order_of_the_inputs() {
        let shards = CpuShards::new(&Device::Cpu).unwrap();
        for count in [0, 1, 7, 8, 9, 100] {
            let inputs: Vec<usize> = (0..count).collect();
            let doubled =
                shards.run_sharded(&inputs, |part| Ok(part.iter().map(|i| i * 2).collect()));
            assert_eq!(doubled.unwrap(), inputs.iter().map(|i| i * 2).collect::<Vec<_>>());
        }
    }

    #[test]
    fn a_failure_in_any_shard_is_reported() {
        let shards = CpuShards::new(&Device::Cpu).unwrap();
        let inputs: Vec<usize> = (0..64).collect();
        let result = shards.run_sharded(&inputs, |part| {
            if part.contains(&63) {
                Err(candle_core::Error::Msg("63".into()))
            } else {
                Ok(part.to_vec())
            }
        });
        assert!(result.unwrap_err().to_string().contains("63"));
    }
}
