//! The device that a model runs on: opens it, runs batches on it, and detects when it is lost.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use candle_core::Device;
use tracing::error;

use crate::clip::error::ClipError;
use crate::clip::kernels::cpu_shards::CpuShards;
use crate::clip::options::DeviceChoice;
use crate::diagnosis::describe;
use crate::telemetry::event;

/// In builds with debug assertions, every computation fails while the file named by this variable
/// exists, as on a GPU that has fallen off the bus. `tests/ops` injects the fault this way.
const SIMULATED_DEVICE_LOSS_VAR: &str = "LOSE_DEVICE_WHILE";

/// An open device, with its CPU shards and its count of failures.
pub struct ComputeDevice {
    device: Device,
    cpu_shards: CpuShards,
    /// Number of computations that have failed since the last one that succeeded.
    consecutive_failures: AtomicU32,
    simulated_loss_file: Option<PathBuf>,
}

impl ComputeDevice {
    /// Opens the device.
    pub fn open(choice: DeviceChoice) -> Result<Self, ClipError> {
        let device = match choice {
            DeviceChoice::Cpu => Device::Cpu,
            DeviceChoice::Auto => open_cuda(0).unwrap_or(Device::Cpu),
            DeviceChoice::Cuda(n) => open_cuda(n)?,
        };
        let device_loss_file =
            std::env::var_os(SIMULATED_DEVICE_LOSS_VAR).filter(|_| cfg!(debug_assertions));
        Ok(Self {
            cpu_shards: CpuShards::new(&device)?,
            device,
            consecutive_failures: AtomicU32::new(0),
            simulated_loss_file: device_loss_file.map(PathBuf::from),
        })
    }

    /// The underlying device of candle.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Runs `work` on `inputs` and returns one result per input, in order. A failure is logged and
    /// counted.
    pub fn run_batch<T: Sync, R: Send>(
        &self,
        inputs: &[T],
        work: impl Fn(&[T]) -> candle_core::Result<Vec<R>> + Sync,
    ) -> Result<Vec<R>, ClipError> {
        let lost = self.simulated_loss_file.as_deref().is_some_and(Path::exists);
        let result = if lost {
            let reason = format!("the device is lost ({SIMULATED_DEVICE_LOSS_VAR})");
            Err(candle_core::Error::Msg(reason).into())
        } else {
            self.cpu_shards.run_sharded(inputs, work)
        };
        match &result {
            Ok(_) => self.consecutive_failures.store(0, Ordering::Relaxed),
            Err(error) => {
                let consecutive_failures =
                    self.consecutive_failures.fetch_add(1, Ordering::Relaxed) + 1;
                let device = if self.device.is_cpu() { "cpu" } else { "cuda" };
                error!(event = event::MODEL_FAILED, device, consecutive_failures, %error, "a computation failed");
            }
        }
        result
    }

    /// Number of computations that have failed since the last one that succeeded. On a lost GPU every
    /// computation fails.
    pub fn consecutive_failures(&self) -> u32 {
        self.consecutive_failures.load(Ordering::Relaxed)
    }
}

fn open_cuda(number: usize) -> Result<Device, ClipError> {
    let error = |reason: String| ClipError::Device {
        device: format!("cuda:{number}"),
        reason: format!(
            "{reason}; set model.device to cpu, or build with --features cuda and install the driver"
        ),
    };
    if !candle_core::utils::cuda_is_available() {
        return Err(error("this program was built without CUDA".into()));
    }
    // The CUDA bindings panic if the library of the driver is missing; an error is clearer.
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(|_| {}));
    let opened = std::panic::catch_unwind(|| Device::new_cuda(number));
    std::panic::set_hook(hook);
    opened.map_err(|_| error("the CUDA driver is missing".into()))?.map_err(|e| error(describe(&e)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failures_are_counted_until_one_computation_succeeds() {
        let folder = tempfile::tempdir().unwrap();
        let lost = folder.path().join("lost");
        let mut compute_device = ComputeDevice::open(DeviceChoice::Cpu).unwrap();
        compute_device.simulated_loss_file = Some(lost.clone());
        let run = || compute_device.run_batch(&[1, 2], |part| Ok(part.to_vec()));
        assert_eq!((run().unwrap(), compute_device.consecutive_failures()), (vec![1, 2], 0));
        std::fs::write(&lost, "").unwrap();
        for failures in 1..=3 {
            assert!(run().unwrap_err().to_string().contains("the device is lost"));
            assert_eq!(compute_device.consecutive_failures(), failures);
        }
        std::fs::remove_file(&lost).unwrap();
        assert_eq!((run().unwrap(), compute_device.consecutive_failures()), (vec![1, 2], 0));
    }
}
