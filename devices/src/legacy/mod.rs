//! The few PC devices a kernel needs to boot, talk and stop.

pub mod i8042;
pub mod pci;
pub mod pm1;
pub mod power;
pub mod pvpanic;
pub mod serial;

/// Signals an event that asks the VMM to do something (stop, reset). A full counter is a request
/// already made.
fn request(fd: &vmm_sys_util::eventfd::EventFd, failures: &crate::warn::Limited) {
    match fd.write(1) {
        Err(e) if e.kind() != std::io::ErrorKind::WouldBlock => failures.hit(format_args!("{e}")),
        _ => {}
    }
}
