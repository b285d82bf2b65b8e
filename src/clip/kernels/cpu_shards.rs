//! Sharing a batch between the cores.

use candle_core::Device;
use rayon::{ThreadPool, ThreadPoolBuilder};

use crate::clip::ClipError;

/// Fewest inputs worth a lane: weights are read once a lane, whatever its share.
const MIN_INPUTS_PER_SHARD: usize = 4;
/// Most lanes: beyond that, shares of an ordinary batch become too small, and lanes get more cores.
const MAX_SHARDS: usize = 8;

/// Each lane takes its share of a batch through a whole tower on cores of its own. That keeps every
/// core busy between the large products too, and costs no waiting at each of them: a fifth more
/// images a second on two cores than all cores in each product by turns (docs/performance.md).
pub struct CpuShards {
    thread_pools: Vec<ThreadPool>,
}

impl CpuShards {
    /// As many as the machine's cores are worth; a GPU takes a batch whole.
    pub fn new(device: &Device) -> Result<Self, ClipError> {
        let cores = rayon::current_num_threads();
        let shard_count = if device.is_cpu() { cores.min(MAX_SHARDS) } else { 1 };
        let pool = |lane: usize| {
            let threads = cores / shard_count + usize::from(lane < cores % shard_count);
            ThreadPoolBuilder::new()
                .num_threads(threads)
                .thread_name(move |i| format!("tower-{lane}-{i}"))
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

    /// What `work` makes of `inputs`, in order, a result an input.
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
                .map(|(share, pool)| scope.spawn(move || pool.install(|| work(share))))
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
        let lanes = CpuShards::new(&Device::Cpu).unwrap();
        for count in [0, 1, 7, 8, 9, 100] {
            let inputs: Vec<usize> = (0..count).collect();
            let doubled =
                lanes.run_sharded(&inputs, |part| Ok(part.iter().map(|i| i * 2).collect()));
            assert_eq!(doubled.unwrap(), inputs.iter().map(|i| i * 2).collect::<Vec<_>>());
        }
    }

    #[test]
    fn a_failure_in_any_shard_is_reported() {
        let lanes = CpuShards::new(&Device::Cpu).unwrap();
        let inputs: Vec<usize> = (0..64).collect();
        let result = lanes.run_sharded(&inputs, |part| {
            if part.contains(&63) {
                Err(candle_core::Error::Msg("63".into()))
            } else {
                Ok(part.to_vec())
            }
        });
        assert!(result.unwrap_err().to_string().contains("63"));
    }
}
