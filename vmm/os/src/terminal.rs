//! Which process group holds the terminal on standard input.

use std::io;

use rustix::io::Errno;
use rustix::process::getpgrp;
use rustix::termios::tcgetpgrp;

/// The holder of the terminal on standard input.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Holder {
    /// This process: it may read it and change its modes.
    Us,
    /// Another job of the shell's, or the shell. A background process that touches it is stopped
    /// (SIGTTIN, SIGTTOU).
    Others,
    /// Its window is closed, its connection lost.
    None,
}

/// The holder now.
pub fn holder() -> Holder {
    match tcgetpgrp(io::stdin()) {
        Ok(group) if group == getpgrp() => Holder::Us,
        // A group of another PID namespace has no number here.
        Ok(_) | Err(Errno::OPNOTSUPP) => Holder::Others,
        // Not the terminal of our session, which alone has jobs in the background.
        Err(Errno::NOTTY) => Holder::Us,
        Err(_) => Holder::None,
    }
}
