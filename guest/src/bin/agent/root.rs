//! From the initramfs into the root file system that the kernel's command line asks for. Its init
//! becomes process 1; the agent goes on beside it, in the same root.

use core::ffi::CStr;
use core::fmt;

use guest::root::{NotADevice, Root};

use crate::init::{self, PATH_MAX, c_string, log};
use crate::sys::root as calls;
use crate::sys::{self, ENODEV, ENOENT, Errno};

/// Where it is mounted before it is the root.
const PLACE: &CStr = c"/mnt";
/// What is tried if it is not said which: the kernel has those that it was built with, and those
/// whose modules the image has.
const KINDS: [&CStr; 4] = [c"ext4", c"xfs", c"btrfs", c"erofs"];
/// As the kernel's.
const INITS: [&CStr; 4] = [c"/sbin/init", c"/etc/init", c"/bin/init", c"/bin/sh"];
/// What moves along, if there is a place for it.
const MOUNTS: [(&CStr, &CStr); 3] =
    [(c"/dev", c"/mnt/dev"), (c"/proc", c"/mnt/proc"), (c"/sys", c"/mnt/sys")];
/// How long a device may take to appear, and how often it is looked for.
const DEVICE_MILLIS: usize = 5000;
const LOOK_MILLIS: usize = 50;
const EINVAL: Errno = Errno(22);

/// Which process this is afterwards.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Process {
    /// Process 1: there is no other root.
    Init,
    /// The agent, beside the init of the root.
    Agent,
}

/// Switches to the root that `cmdline` asks for, if it does. One that cannot be used ends this
/// process, and so the machine: a guest without its disk is not what was asked for.
pub(crate) fn switch(cmdline: &str) -> Process {
    match Root::of(cmdline) {
        None => Process::Init,
        Some(Err(NotADevice(text))) => {
            give_up(format_args!("root={text}: expected a device, as in root=/dev/vda or root=/dev/vda1"))
        }
        Some(Ok(root)) => enter(&root),
    }
}

fn enter(root: &Root<'_>) -> Process {
    let Err(error) = mount(root).and_then(|()| leave()) else { return hand_over(root) };
    let kind = root.kind.unwrap_or("ext4, xfs, btrfs, erofs");
    give_up(format_args!(
        "root={} ({kind}) cannot be mounted: {error}; expected a drive with such a file system, and its module in the image \
         (samepage image --module)",
        root.device
    ))
}

fn give_up(why: fmt::Arguments<'_>) -> ! {
    log(why);
    sys::exit(1)
}

/// Mounts it at [`PLACE`], once its device is there.
fn mount(root: &Root<'_>) -> Result<(), Errno> {
    let (mut device, mut kind, mut flags) = ([0; PATH_MAX], [0; PATH_MAX], [0; PATH_MAX]);
    let flags = c_string(&mut flags, &[root.flags.unwrap_or_default().as_bytes()]).ok_or(EINVAL)?;
    let device = c_string(&mut device, &[root.device.as_bytes()]).ok_or(EINVAL)?;
    let said = match root.kind {
        Some(said) => Some(c_string(&mut kind, &[said.as_bytes()]).ok_or(EINVAL)?),
        None => None,
    };
    let mut failed = ENOENT;
    for _ in 0..DEVICE_MILLIS / LOOK_MILLIS {
        failed = match said {
            Some(kind) => match calls::mount_device(device, PLACE, kind, flags, root.is_writable) {
                Ok(()) => return Ok(()),
                Err(error) => error,
            },
            None => match mount_any(device, flags, root.is_writable) {
                Ok(()) => return Ok(()),
                Err(error) => error,
            },
        };
        if failed != ENOENT {
            break;
        }
        sys::sleep_millis(LOOK_MILLIS);
    }
    Err(failed)
}

/// Mounts whatever file system it is. Of the errors, the one that says most.
fn mount_any(device: &CStr, flags: &CStr, is_writable: bool) -> Result<(), Errno> {
    let mut failed = ENODEV;
    for kind in KINDS {
        match calls::mount_device(device, PLACE, kind, flags, is_writable) {
            Ok(()) => return Ok(()),
            // The kernel does not know this kind.
            Err(ENODEV) => {}
            Err(error) if failed == ENODEV || failed == EINVAL => failed = error,
            Err(_) => {}
        }
    }
    Err(failed)
}

/// Makes it the root of this process.
fn leave() -> Result<(), Errno> {
    init::remove_modules();
    // The memory of this program is its own as long as it runs.
    let _ = calls::unlink(c"/init");
    for (from, to) in MOUNTS {
        if let Err(error) = calls::move_mount(from, to) {
            log(format_args!("{from:?} is not moved to {to:?}: {error}"));
        }
    }
    calls::change_directory(PLACE)?;
    calls::move_mount(c".", c"/")?;
    calls::change_root(c".")?;
    calls::change_directory(c"/")
}

/// Process 1 becomes the root's init; its child goes on as the agent.
fn hand_over(root: &Root<'_>) -> Process {
    match calls::fork() {
        Ok(0) => return Process::Agent,
        Ok(_) => {}
        Err(error) => log(format_args!("no agent beside init: {error}")),
    }
    let mut path = [0; PATH_MAX];
    let said = root.init.and_then(|said| c_string(&mut path, &[said.as_bytes()]));
    let mut failed = ENOENT;
    for program in said.into_iter().chain(INITS) {
        failed = calls::execute(program);
        if failed != ENOENT || said == Some(program) {
            log(format_args!("{program:?} cannot be started: {failed}"));
        }
    }
    give_up(format_args!(
        "root={} has no init that can be started: {failed}; expected /sbin/init",
        root.device
    ))
}
