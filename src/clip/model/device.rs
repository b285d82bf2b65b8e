//! Where the towers run: opening it, giving it work, and noticing when it is lost.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use candle_core::Device;
use tracing::error;

use crate::clip::kernels::cpu_shards::CpuShards;
use crate::clip::{ClipError, DeviceChoice};
use crate::telemetry::event;

/// In builds with debug assertions: while the file exists that this variable names, all computing
/// fails, as it does on a GPU that has fallen off the bus. `tests/ops` breaks a running system so.
const DEVICE_LOSS_FILE_VAR: &str = "LOSE_DEVICE_WHILE";

/// A device and what it is given to do.
pub struct ComputeDevice {
    device: Device,
    shards: CpuShards,
    /// Computations that have failed since one last did not.
    consecutive_failures: AtomicU32,
    device_loss_file: Option<PathBuf>,
}

impl ComputeDevice {
    /// Opens the device; the only place that does.
    pub fn open(choice: DeviceChoice) -> Result<Self, ClipError> {
        let device = match choice {
            DeviceChoice::Cpu => Device::Cpu,
            DeviceChoice::Auto => open_cuda(0).unwrap_or(Device::Cpu),
            DeviceChoice::Cuda(n) => open_cuda(n)?,
        };
        let device_loss_file =
            std::env::var_os(DEVICE_LOSS_FILE_VAR).filter(|_| cfg!(debug_assertions));
        Ok(Self {
            shards: CpuShards::new(&device)?,
            device,
            consecutive_failures: AtomicU32::new(0),
            device_loss_file: device_loss_file.map(PathBuf::from),
        })
    }

    /// The device.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// What `work` makes of `inputs`, in order, a result an input. A failure is logged and counted.
    pub fn run_batch<T: Sync, R: Send>(
        &self,
        inputs: &[T],
        work: impl Fn(&[T]) -> candle_core::Result<Vec<R>> + Sync,
    ) -> Result<Vec<R>, ClipError> {
        let lost = self.device_loss_file.as_deref().is_some_and(Path::exists);
        let done = if lost {
            let reason = format!("the device is lost ({DEVICE_LOSS_FILE_VAR})");
            Err(candle_core::Error::Msg(reason).into())
        } else {
            self.shards.run_sharded(inputs, work)
        };
        match &done {
            Ok(_) => self.consecutive_failures.store(0, Ordering::Relaxed),
            Err(error) => {
                let in_a_row = self.consecutive_failures.fetch_add(1, Ordering::Relaxed) + 1;
                let device = if self.device.is_cpu() { "cpu" } else { "cuda" };
                error!(event = event::MODEL_FAILED, device, consecutive_failures = in_a_row, %error, "a computation failed");
            }
        }
        done
    }

    /// Computations that have failed since one last did not. A GPU that is lost fails all.
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
    // The CUDA bindings panic where the driver's library is missing; the error says it better.
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(|_| {}));
    let opened = std::panic::catch_unwind(|| Device::new_cuda(number));
    std::panic::set_hook(hook);
    opened
        .map_err(|_| error("the CUDA driver is missing".into()))?
        .map_err(|e| error(e.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failures_are_counted_until_one_computation_succeeds() {
        let folder = tempfile::tempdir().unwrap();
        let lost = folder.path().join("lost");
        let mut computer = ComputeDevice::open(DeviceChoice::Cpu).unwrap();
        computer.device_loss_file = Some(lost.clone());
        let run = || computer.run_batch(&[1, 2], |part| Ok(part.to_vec()));
        assert_eq!((run().unwrap(), computer.consecutive_failures()), (vec![1, 2], 0));
        std::fs::write(&lost, "").unwrap();
        for failures in 1..=3 {
            assert!(run().unwrap_err().to_string().contains("the device is lost"));
            assert_eq!(computer.consecutive_failures(), failures);
        }
        std::fs::remove_file(&lost).unwrap();
        assert_eq!((run().unwrap(), computer.consecutive_failures()), (vec![1, 2], 0));
    }
}
