//! Whether userfaultfd is there for us, which of its features, and a descriptor of it. Registers no
//! memory.
//!
//! Source: the kernel's include/uapi/linux/userfaultfd.h and
//! Documentation/admin-guide/mm/userfaultfd.rst.

#![expect(unsafe_code, reason = "userfaultfd is reached by raw system calls")]

use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use serde::Serialize;

/// The device that gives out descriptors by file permission. Kernel 6.1.
pub const DEVICE: &str = "/dev/userfaultfd";

const USERFAULTFD_IOC_NEW: libc::c_ulong = 0xAA00;
const UFFDIO_API: libc::c_ulong = 0xC018_AA3F;
const UFFD_API: u64 = 0xAA;

#[repr(C)]
struct UffdioApi {
    api: u64,
    features: u64,
    ioctls: u64,
}

const _: () = assert!(size_of::<UffdioApi>() == 24);

/// Names of the feature bits, lowest first.
const FEATURES: [&str; 17] = [
    "pagefault_flag_wp",
    "event_fork",
    "event_remap",
    "event_remove",
    "missing_hugetlbfs",
    "missing_shmem",
    "event_unmap",
    "sigbus",
    "thread_id",
    "minor_hugetlbfs",
    "minor_shmem",
    "exact_address",
    "wp_hugetlbfs_shmem",
    "wp_unpopulated",
    "poison",
    "wp_async",
    "move",
];

/// How a descriptor was obtained.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Access {
    /// By opening [`DEVICE`].
    Device,
    /// By the system call: root, or vm.unprivileged_userfaultfd is 1.
    SystemCall,
}

/// What userfaultfd offers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Support {
    /// How we got at it.
    pub access: Access,
    /// UFFD_FEATURE bits.
    pub features: u64,
}

impl Support {
    /// Whether the feature of this name (as in the kernel's header, in small letters) is there.
    pub fn has(self, name: &str) -> bool {
        FEATURES.iter().position(|feature| *feature == name).is_some_and(|bit| self.features >> bit & 1 != 0)
    }

    /// Names of all features that are there.
    pub fn names(self) -> Vec<&'static str> {
        FEATURES.into_iter().filter(|name| self.has(name)).collect()
    }
}

/// Asks for a descriptor that handles faults from the kernel (KVM's are such) and for its features.
pub fn probe() -> io::Result<Support> {
    let (descriptor, access) = descriptor()?;
    Ok(Support { access, features: api(&descriptor, 0)? })
}

/// What freezing pages takes ([`super::freeze`]).
pub(super) const TO_FREEZE: [&str; 2] = ["pagefault_flag_wp", "wp_unpopulated"];

/// Whether pages can be frozen, and so merged by slabs; else why not.
pub fn can_freeze() -> io::Result<()> {
    let support = probe()?;
    match TO_FREEZE.into_iter().find(|feature| !support.has(feature)) {
        None => Ok(()),
        Some(feature) => {
            let what = format!("userfaultfd has no {feature}: expected Linux 6.4 or later");
            Err(io::Error::new(io::ErrorKind::Unsupported, what))
        }
    }
}

/// A descriptor that handles faults from the kernel, with the features of these names (as for
/// [`Support::has`]).
pub(super) fn open(features: &[&str]) -> io::Result<OwnedFd> {
    let bit = |name: &&str| FEATURES.iter().position(|feature| feature == name).map_or(0, |bit| 1u64 << bit);
    let (descriptor, _) = descriptor()?;
    api(&descriptor, features.iter().map(bit).sum())?;
    Ok(descriptor)
}

fn descriptor() -> io::Result<(OwnedFd, Access)> {
    match open_device() {
        Ok(descriptor) => Ok((descriptor, Access::Device)),
        Err(_) => Ok((system_call()?, Access::SystemCall)),
    }
}

/// Says hello, once for each descriptor; returns what the kernel has. Features that it lacks are an
/// error.
fn api(descriptor: &OwnedFd, features: u64) -> io::Result<u64> {
    let mut api = UffdioApi { api: UFFD_API, features, ioctls: 0 };
    // SAFETY: the kernel reads and writes one UffdioApi, which is exclusively ours.
    if unsafe { libc::ioctl(descriptor.as_raw_fd(), UFFDIO_API, &mut api) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(api.features)
}

fn open_device() -> io::Result<OwnedFd> {
    let device = OpenOptions::new().read(true).write(true).open(DEVICE)?;
    // SAFETY: no memory is involved.
    owned(unsafe { libc::ioctl(device.as_raw_fd(), USERFAULTFD_IOC_NEW, libc::O_CLOEXEC) })
}

fn system_call() -> io::Result<OwnedFd> {
    // SAFETY: no memory is involved.
    let descriptor = unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC) };
    // A descriptor's number is a C int; what is none fails as -1 does.
    owned(libc::c_int::try_from(descriptor).unwrap_or(-1))
}

fn owned(descriptor: libc::c_int) -> io::Result<OwnedFd> {
    if descriptor < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made this descriptor for us; nothing else refers to it.
    Ok(unsafe { OwnedFd::from_raw_fd(descriptor) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn features_have_the_kernels_names() {
        let support = Support { access: Access::Device, features: 1 | 1 << 13 | 1 << 16 };
        assert_eq!(support.names(), ["pagefault_flag_wp", "wp_unpopulated", "move"]);
        assert!(!support.has("wp_async") && !support.has("no_such"));
    }

    #[test]
    fn this_host_answers_or_refuses() {
        match probe() {
            Ok(support) => assert!(support.features != 0),
            Err(error) => assert!(error.raw_os_error().is_some()),
        }
    }
}
