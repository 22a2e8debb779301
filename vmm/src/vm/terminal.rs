//! The terminal: raw while a guest has it, as it was on every way out.

use std::io::{self, IsTerminal};
use std::sync::Mutex;

use rustix::termios::{OptionalActions, Termios, tcgetattr, tcsetattr};

/// What the terminal was like, while it is raw. Global because a panic must find it too.
static BEFORE: Mutex<Option<Termios>> = Mutex::new(None);

/// A terminal in raw mode until this is dropped.
pub struct Raw(());

impl Raw {
    /// Makes standard input raw if it is a terminal. A panic of any thread restores it as well.
    pub fn enter() -> io::Result<Option<Self>> {
        if !io::stdin().is_terminal() {
            return Ok(None);
        }
        let before = tcgetattr(io::stdin())?;
        let mut raw = before.clone();
        raw.make_raw();
        // Output stays as it was, so that the lines of this program and of the guest both begin at the left.
        raw.output_modes = before.output_modes;
        if let Ok(mut slot) = BEFORE.lock() {
            *slot = Some(before);
        }
        let inner = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            restore();
            inner(info);
        }));
        tcsetattr(io::stdin(), OptionalActions::Flush, &raw)?;
        Ok(Some(Self(())))
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        restore();
    }
}

fn restore() {
    if let Ok(mut slot) = BEFORE.try_lock()
        && let Some(before) = slot.take()
    {
        // Nothing can be done if this fails: the terminal is gone.
        let _ = tcsetattr(io::stdin(), OptionalActions::Flush, &before);
    }
}
