//! The terminal in raw mode on its second screen, restored however the process ends.

use std::io::{self, Stdout};
use std::mem::ManuallyDrop;
use std::panic;

use ratatui::backend::CrosstermBackend;
use ratatui::crossterm::cursor::Show;
use ratatui::crossterm::execute;
use ratatui::crossterm::terminal::{
    EnterAlternateScreen, LeaveAlternateScreen, disable_raw_mode, enable_raw_mode,
};
use ratatui::{Frame, Terminal};
use rustix::termios::tcgetwinsize;

/// The terminal. Restored when dropped; a panic restores it too, before its message is printed.
pub(super) struct Screen {
    /// Never dropped itself: on a terminal that is gone its drop reports an error on standard
    /// error, and panics if that is the same terminal.
    terminal: ManuallyDrop<Terminal<CrosstermBackend<Stdout>>>,
}

impl Screen {
    /// Takes the terminal.
    ///
    /// # Errors
    /// Standard output is not a terminal. It is left as it was.
    pub(super) fn open() -> io::Result<Self> {
        let told = panic::take_hook();
        panic::set_hook(Box::new(move |panic| {
            restore();
            told(panic);
        }));
        let opened = enable_raw_mode()
            .and_then(|()| execute!(io::stdout(), EnterAlternateScreen))
            .and_then(|()| Terminal::new(CrosstermBackend::new(io::stdout())));
        match opened {
            Ok(terminal) => Ok(Self { terminal: ManuallyDrop::new(terminal) }),
            Err(error) => {
                restore();
                Err(error)
            }
        }
    }

    /// Columns and lines; None if the terminal does not report them.
    pub(super) fn size(&self) -> Option<(u16, u16)> {
        let size = tcgetwinsize(io::stdout()).ok()?;
        Some((size.ws_col, size.ws_row))
    }

    pub(super) fn draw(&mut self, picture: impl FnOnce(&mut Frame)) -> io::Result<()> {
        self.terminal.draw(picture).map(drop)
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        restore();
    }
}

fn restore() {
    // A terminal that is gone need not be restored.
    let _ = execute!(io::stdout(), LeaveAlternateScreen, Show);
    let _ = disable_raw_mode();
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::Read;
    use std::process::{Command, Stdio};
    use std::{env, thread};

    use rustix::pty::{OpenptFlags, grantpt, ioctl_tiocgptpeer, openpt, unlockpt};
    use rustix::termios::tcgetattr;

    use super::*;

    /// Set in the process that is to panic.
    const PANICS: &str = "SAMEPAGE_TEST_PANICS_ON_ITS_SCREEN";

    #[test]
    fn a_panic_leaves_the_terminal_as_it_was() {
        if env::var_os(PANICS).is_some() {
            let _screen = Screen::open().unwrap();
            // Not by unwinding: the shipped program aborts.
            panic::set_hook({
                let ours = panic::take_hook();
                Box::new(move |panic| {
                    ours(panic);
                    std::process::abort();
                })
            });
            panic!("on purpose");
        }
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let master = openpt(flags).unwrap();
        grantpt(&master).and_then(|()| unlockpt(&master)).unwrap();
        let terminal = ioctl_tiocgptpeer(&master, flags).unwrap();
        let modes = || {
            let modes = tcgetattr(&terminal).unwrap();
            (modes.input_modes, modes.output_modes, modes.local_modes)
        };
        let before = modes();
        let side = || Stdio::from(terminal.try_clone().unwrap());
        let this = "top::screen::tests::a_panic_leaves_the_terminal_as_it_was";
        let mut child = Command::new(env::current_exe().unwrap())
            .args(["--exact", this, "--nocapture"])
            .env(PANICS, "1")
            .stdin(side())
            .stdout(side())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut from = File::from(master);
        let reader = thread::spawn(move || {
            let mut all = Vec::new();
            let mut bytes = [0; 1024];
            // Ends by an error once the other side is closed.
            while let Ok(count @ 1..) = from.read(&mut bytes) {
                all.extend_from_slice(&bytes[..count]);
            }
            String::from_utf8_lossy(&all).into_owned()
        });
        assert!(!child.wait().unwrap().success());
        assert_eq!(modes(), before);
        drop(terminal);
        let printed = reader.join().unwrap();
        let (entered, left) = (printed.rfind("\u{1b}[?1049h"), printed.rfind("\u{1b}[?1049l"));
        assert!(
            entered.is_some() && left > entered && printed[left.unwrap()..].contains("\u{1b}[?25h"),
            "{printed:?}"
        );
    }
}
