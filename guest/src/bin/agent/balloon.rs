//! The balloon of a Linux guest: the kernel's module drives it; the agent can only unbind and bind
//! it.

use core::ffi::CStr;

use guest::protocol::{Balloon, BalloonDone, Done, ErrorCode, Reply, Text};

use crate::sys::{Access, ENODEV, Errno, Fd};

const UNBIND: &CStr = c"/sys/bus/virtio/drivers/virtio_balloon/unbind";
const BIND: &CStr = c"/sys/bus/virtio/drivers/virtio_balloon/bind";

/// A virtio device by the bus's name for it, and where its features are.
struct Device {
    name: &'static str,
    features: &'static CStr,
}

macro_rules! device {
    ($number:literal) => {
        Device {
            name: concat!("virtio", $number),
            features: match CStr::from_bytes_with_nul(
                concat!("/sys/bus/virtio/devices/virtio", $number, "/features\0").as_bytes(),
            ) {
                Ok(path) => path,
                Err(_) => panic!(),
            },
        }
    };
}

/// Every virtio device that the VMM makes. The driver accepts only a balloon.
const DEVICES: [Device; 8] =
    [device!(0), device!(1), device!(2), device!(3), device!(4), device!(5), device!(6), device!(7)];

/// Carries out what user space can.
pub(crate) fn obey(action: Balloon) -> Reply {
    let done = match action {
        Balloon::Off => first(UNBIND).map(|_| BalloonDone::Off),
        Balloon::On => first(BIND).map(|device| BalloonDone::On { features: features(device) }),
        Balloon::Report | Balloon::Check | Balloon::Touch { .. } | Balloon::Hostile(_) => {
            let message =
                Text::of(format_args!("the kernel drives this guest's balloon: off and on are possible"));
            return Reply::Err { code: ErrorCode::Unsupported, message };
        }
    };
    match done {
        Ok(done) => Reply::Ok(Done::Balloon(done)),
        Err(error) => Reply::Err {
            code: ErrorCode::Failed,
            message: Text::of(format_args!("the driver took no device: {error}")),
        },
    }
}

/// Writes the names of all devices to `file` until the driver takes one.
fn first(file: &CStr) -> Result<&'static Device, Errno> {
    let mut result = Err(ENODEV);
    for device in &DEVICES {
        let fd = Fd::open(file, Access::Write)?;
        let written = fd.write(device.name.as_bytes());
        fd.close();
        result = match written {
            Ok(()) => return Ok(device),
            // An error of this device matters only if no other one succeeds.
            Err(ENODEV) => result,
            Err(error) => Err(error),
        };
    }
    result
}

/// The features negotiated: the kernel shows a digit for each, the lowest first.
fn features(device: &Device) -> u64 {
    let mut digits = [0; 64];
    let Ok(file) = Fd::open(device.features, Access::Read) else { return 0 };
    let len = file.read_all(&mut digits).unwrap_or(0);
    file.close();
    digits[..len].iter().enumerate().filter(|(_, digit)| **digit == b'1').map(|(bit, _)| 1 << bit).sum()
}
