//! The terminal: raw while a guest has it, as it was on every way out, and left alone while another
//! job has it.

use std::io::{self, IsTerminal};
use std::sync::Mutex;

use rustix::termios::{OptionalActions, QueueSelector, Termios, tcflush, tcgetattr, tcsetattr};

use os::signals;
use os::terminal::{Holder, holder};

/// What the terminal was like, while it is raw. Global because a panic must find it too.
static BEFORE: Mutex<Option<Termios>> = Mutex::new(None);

/// Standard input, which is a terminal. It is as it was before when this is dropped.
pub struct Terminal(());

impl Terminal {
    /// The terminal that standard input is, if it is one. It is not changed yet; a panic of any
    /// thread will restore it.
    pub fn of_input() -> Option<Self> {
        if !io::stdin().is_terminal() {
            return None;
        }
        // Between asking which job has it and using it another may get it: that is an error then,
        // and no stop that only SIGKILL would end.
        signals::ignore_job_control();
        let inner = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            restore();
            inner(info);
        }));
        Some(Self(()))
    }

    /// Makes it raw if this process has it, also once more: the shell has put it right while we
    /// were stopped. Says which job has it.
    pub fn take(&self) -> Holder {
        let holder = holder();
        match holder {
            Holder::Us => self.make_raw().map_or(Holder::None, |()| Holder::Us),
            other => other,
        }
    }

    fn make_raw(&self) -> io::Result<()> {
        let now = tcgetattr(io::stdin())?;
        let mut raw = now.clone();
        raw.make_raw();
        // Output stays as it was, so that the lines of this program and of the guest both begin at
        // the left.
        raw.output_modes = now.output_modes;
        os::lock(&BEFORE).get_or_insert(now);
        // Now: a terminal whose output is stopped (Control-S) would be waited for, beyond SIGTERM.
        // What was typed ahead is for the guest.
        Ok(tcsetattr(io::stdin(), OptionalActions::Now, &raw)?)
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        restore();
    }
}

fn restore() {
    if let Some(mut slot) = os::try_lock(&BEFORE)
        && let Some(before) = slot.take()
        && holder() == Holder::Us
    {
        // Nothing can be done if this fails: the terminal is gone.
        let _ = tcsetattr(io::stdin(), OptionalActions::Now, &before);
        // What the guest has not read is not for the shell.
        let _ = tcflush(io::stdin(), QueueSelector::IFlush);
    }
}
