//! Chooses the device by name.

use burn::tensor::Device;
#[cfg(any(feature = "wgpu", feature = "cuda"))]
use burn::tensor::{DeviceFilter, DeviceType};
use thiserror::Error;

/// Names of the backends that this build has.
pub const BUILT_IN: &[&str] = &[
    #[cfg(feature = "flex")]
    "flex",
    #[cfg(feature = "ndarray")]
    "ndarray",
    #[cfg(feature = "wgpu")]
    "wgpu",
    #[cfg(feature = "cuda")]
    "cuda",
];

/// Why there is no such device.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum DeviceError {
    /// The name is of no backend that was built in.
    #[error(
        "unknown device {name:?}: this build has {}; flex, ndarray, wgpu and cuda are turned on by \
         features of the same name",
        BUILT_IN.join(", ")
    )]
    Unknown {
        /// What was asked for.
        name: String,
    },
    /// The machine has fewer devices of this backend, or no driver for it.
    #[error(
        "there is no device {name:?}: {backend} finds {n_found} on this machine; is its driver \
         installed? The CPU is --device flex"
    )]
    Missing {
        /// What was asked for.
        name: String,
        /// Its backend.
        backend: &'static str,
        /// How many the backend finds.
        n_found: usize,
    },
}

/// The device of a name given on the command line or in `BURN_DEVICE`: a backend, and of wgpu and
/// cuda, which may have several, one by number (`cuda:1`).
///
/// # Errors
/// If this build has no such backend, or the machine no such device.
pub fn device(name: &str) -> Result<Device, DeviceError> {
    match name {
        #[cfg(feature = "flex")]
        "flex" => Ok(Device::flex()),
        #[cfg(feature = "ndarray")]
        #[allow(deprecated)]
        "ndarray" => Ok(Device::ndarray()),
        _ => numbered(name),
    }
}

fn numbered(name: &str) -> Result<Device, DeviceError> {
    let (backend, index) = match name.split_once(':') {
        Some((backend, index)) => (backend, index.parse::<usize>().ok()),
        None => (name, Some(0)),
    };
    match (backend, index) {
        #[cfg(feature = "wgpu")]
        ("wgpu", Some(index)) => found(name, "wgpu", DeviceType::Wgpu, index),
        #[cfg(feature = "cuda")]
        ("cuda", Some(index)) => found(name, "cuda", DeviceType::Cuda, index),
        _ => Err(DeviceError::Unknown { name: name.into() }),
    }
}

#[cfg(any(feature = "wgpu", feature = "cuda"))]
fn found(
    name: &str,
    backend: &'static str,
    devices: impl Into<DeviceFilter>,
    index: usize,
) -> Result<Device, DeviceError> {
    let devices = Device::enumerate(devices).into_vec();
    let n_found = devices.len();
    let device = devices.into_iter().nth(index);
    device.ok_or_else(|| DeviceError::Missing { name: name.into(), backend, n_found })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unknown_name_is_told_what_there_is() {
        for name in ["gpu", "", "flex:1", "cuda:first"] {
            let error = device(name).unwrap_err();
            assert_eq!(error, DeviceError::Unknown { name: name.into() });
            assert!(error.to_string().contains(&BUILT_IN.join(", ")), "{error}");
        }
    }
}
