//! The system calls that leave the initramfs.

use core::ffi::CStr;
use core::ptr;

use super::{Errno, MOUNT, syscall};

const FORK: usize = 57;
const EXECVE: usize = 59;
const CHDIR: usize = 80;
const UNLINK: usize = 87;
const SETSID: usize = 112;
const CHROOT: usize = 161;
const MS_RDONLY: usize = 1;
const MS_MOVE: usize = 0x2000;

/// Mounts the file system on `device`, with `options` of its own.
pub(crate) fn mount_device(
    device: &CStr,
    at: &CStr,
    kind: &CStr,
    options: &CStr,
    is_writable: bool,
) -> Result<(), Errno> {
    let flags = if is_writable { 0 } else { MS_RDONLY };
    let [device, at, kind, options] = [device, at, kind, options].map(|text| text.as_ptr() as usize);
    // SAFETY: C strings.
    unsafe { syscall(MOUNT, [device, at, kind, flags, options, 0]) }.map(drop)
}

/// Moves what is mounted at `from`.
pub(crate) fn move_mount(from: &CStr, to: &CStr) -> Result<(), Errno> {
    let (from, to) = (from.as_ptr() as usize, to.as_ptr() as usize);
    // SAFETY: C strings; neither a kind nor data are looked at.
    unsafe { syscall(MOUNT, [from, to, 0, MS_MOVE, 0, 0]) }.map(drop)
}

pub(crate) fn change_directory(to: &CStr) -> Result<(), Errno> {
    // SAFETY: a C string.
    unsafe { syscall(CHDIR, [to.as_ptr() as usize, 0, 0, 0, 0, 0]) }.map(drop)
}

pub(crate) fn change_root(to: &CStr) -> Result<(), Errno> {
    // SAFETY: a C string.
    unsafe { syscall(CHROOT, [to.as_ptr() as usize, 0, 0, 0, 0, 0]) }.map(drop)
}

pub(crate) fn unlink(path: &CStr) -> Result<(), Errno> {
    // SAFETY: a C string.
    unsafe { syscall(UNLINK, [path.as_ptr() as usize, 0, 0, 0, 0, 0]) }.map(drop)
}

/// Goes on in a child, too, which gets 0 and is in a session of its own; the parent gets the
/// child's number.
pub(crate) fn fork() -> Result<usize, Errno> {
    // SAFETY: there is one thread, and its memory is copied.
    let child = unsafe { syscall(FORK, [0; 6]) }?;
    if child == 0 {
        // SAFETY: no arguments.
        let _ = unsafe { syscall(SETSID, [0; 6]) };
    }
    Ok(child)
}

/// Becomes `program`. Returns only if that fails.
pub(crate) fn execute(program: &CStr) -> Errno {
    let arguments = [program.as_ptr(), ptr::null()];
    // As the kernel's.
    let environment = [
        c"HOME=/".as_ptr(),
        c"TERM=linux".as_ptr(),
        c"PATH=/usr/sbin:/usr/bin:/sbin:/bin".as_ptr(),
        ptr::null(),
    ];
    let (arguments, environment) = (arguments.as_ptr() as usize, environment.as_ptr() as usize);
    // SAFETY: C strings, in arrays that end with null.
    let failed = unsafe { syscall(EXECVE, [program.as_ptr() as usize, arguments, environment, 0, 0, 0]) };
    failed.err().unwrap_or(Errno(0))
}
