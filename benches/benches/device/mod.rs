//! Which device is measured, and when its work is done.

use std::time::Duration;

use burn::tensor::Device;
use criterion::measurement::{Measurement, ValueFormatter, WallTime};

/// The device that `BURN_DEVICE` names, `flex` if it names none.
pub fn device() -> Device {
    let name = std::env::var("BURN_DEVICE").unwrap_or_else(|_| "flex".into());
    examples::device::device(&name).unwrap_or_else(|error| panic!("{error}"))
}

/// Wall time until the device has done what it was told to: a GPU answers before.
pub struct Finished(pub Device);

impl Finished {
    fn finish(&self) {
        self.0.sync().expect("the device does its work");
    }
}

impl Measurement for Finished {
    type Intermediate = <WallTime as Measurement>::Intermediate;
    type Value = Duration;

    fn start(&self) -> Self::Intermediate {
        self.finish();
        WallTime.start()
    }

    fn end(&self, start: Self::Intermediate) -> Duration {
        self.finish();
        WallTime.end(start)
    }

    fn add(&self, a: &Duration, b: &Duration) -> Duration {
        WallTime.add(a, b)
    }

    fn zero(&self) -> Duration {
        WallTime.zero()
    }

    fn to_f64(&self, value: &Duration) -> f64 {
        WallTime.to_f64(value)
    }

    fn formatter(&self) -> &dyn ValueFormatter {
        WallTime.formatter()
    }
}
