//! Chooses the device by name.

use anyhow::{Result, bail};
use burn::tensor::Device;

/// Names of the backends that this build has.
pub const BUILT_IN: &[&str] = &[
    #[cfg(feature = "flex")]
    "flex",
    #[cfg(feature = "ndarray")]
    "ndarray",
];

/// The device of a name given on the command line or in `BURN_DEVICE`.
///
/// # Errors
/// If this build has no such backend.
pub fn device(name: &str) -> Result<Device> {
    match name {
        #[cfg(feature = "flex")]
        "flex" => Ok(Device::flex()),
        #[cfg(feature = "ndarray")]
        #[allow(deprecated)]
        "ndarray" => Ok(Device::ndarray()),
        _ => bail!(
            "unknown device {name:?}: this build has {}; others are turned on by features of the \
             same name",
            BUILT_IN.join(", ")
        ),
    }
}
