//! Interrupt lines.
//!
//! A line is an eventfd that the VMM has bound to a GSI (an irqfd): writing to it is one edge.
//! Level-triggered lines are deliberately absent; the VMM must describe each device's interrupt to
//! the guest as edge-triggered.

use std::convert::Infallible;
use std::io::ErrorKind;

use vm_superio::Trigger;
use vmm_sys_util::eventfd::EventFd;

use crate::warn::Limited;

/// An edge-triggered interrupt line over an eventfd.
#[derive(Debug)]
pub struct IrqLine {
    fd: EventFd,
    failures: Limited,
}

impl IrqLine {
    /// A line that writes to `fd`, which should be non-blocking (`EFD_NONBLOCK`).
    pub fn new(fd: EventFd) -> Self {
        Self { fd, failures: Limited::new("interrupt not delivered") }
    }

    /// Raises one edge. Edges that are not consumed yet merge into one.
    ///
    /// Never fails from the device's point of view: there is nothing a device model could do about
    /// it, so a failure is counted and logged.
    pub fn trigger(&self) {
        match self.fd.write(1) {
            // A full eventfd counter is an edge that is already pending.
            Err(e) if e.kind() != ErrorKind::WouldBlock => self.failures.hit(format_args!("{e}")),
            _ => {}
        }
    }

    /// The descriptor behind the line, for registering it as an irqfd.
    pub fn event(&self) -> &EventFd {
        &self.fd
    }
}

impl Trigger for IrqLine {
    type E = Infallible;

    fn trigger(&self) -> Result<(), Infallible> {
        IrqLine::trigger(self);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use vmm_sys_util::eventfd::EFD_NONBLOCK;

    use super::*;

    #[test]
    fn edges_arrive_and_merge() {
        let line = IrqLine::new(EventFd::new(EFD_NONBLOCK).unwrap());
        line.trigger();
        line.trigger();
        assert_eq!(line.event().read().unwrap(), 2);
        assert_eq!(line.event().read().unwrap_err().kind(), ErrorKind::WouldBlock);
    }

    #[test]
    fn a_full_counter_is_not_a_failure() {
        let line = IrqLine::new(EventFd::new(EFD_NONBLOCK).unwrap());
        line.event().write(u64::MAX - 1).unwrap();
        line.trigger();
        assert_eq!(line.failures.count(), 0);
    }
}
