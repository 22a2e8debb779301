//! A terminal for a program that draws: a pseudo-terminal, and the picture on it.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{Read, Write};
use std::num::NonZeroU16;
use std::os::fd::OwnedFd;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::pty::{OpenptFlags, grantpt, ioctl_tiocgptpeer, openpt, unlockpt};
use rustix::termios::{Winsize, tcgetattr, tcsetwinsize};
use vt100::Callbacks;

use crate::sandbox::Sandbox;

type Screen = vt100::Parser<Answers>;

/// A terminal. Dropped, it is gone for its users, as when a window is closed or a connection lost.
pub struct Terminal {
    master: File,
    slave: OwnedFd,
    screen: Arc<Mutex<Screen>>,
    /// The thread that draws, and a pipe that ends it when closed.
    drawing: Option<(JoinHandle<()>, OwnedFd)>,
}

impl Terminal {
    /// One of this size.
    ///
    /// # Panics
    /// If none can be had.
    #[must_use]
    pub fn new(columns: u16, lines: u16) -> Self {
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let master = openpt(flags).expect("a pseudo-terminal");
        grantpt(&master).and_then(|()| unlockpt(&master)).expect("a pseudo-terminal that can be used");
        let slave = ioctl_tiocgptpeer(&master, flags).expect("its other side");
        let screen = Arc::new(Mutex::new(Screen::new_with_callbacks(
            Self::cells(lines),
            Self::cells(columns),
            0,
            Answers::default(),
        )));
        let mut terminal = Self { master: File::from(master), slave, screen, drawing: None };
        terminal.resize(columns, lines);
        let (mut from, screen) = (terminal.copy(), terminal.screen.clone());
        let mut answers = terminal.copy();
        // No program that is started has it.
        let (end, ended) = pipe_with(PipeFlags::CLOEXEC).expect("a pipe");
        let drawing = thread::spawn(move || {
            let mut bytes = [0; 4096];
            loop {
                let mut waits = [PollFd::new(&from, PollFlags::IN), PollFd::new(&end, PollFlags::IN)];
                let waited = poll(&mut waits, None);
                if !waits[1].revents().is_empty() || waited.is_err_and(|e| e != Errno::INTR) {
                    return;
                }
                let Ok(count @ 1..) = from.read(&mut bytes) else { return };
                let answer = {
                    let mut screen = os::lock(&screen);
                    screen.process(&bytes[..count]);
                    std::mem::take(&mut screen.callbacks_mut().0)
                };
                // A program that is gone wants no answer.
                let _ = answers.write_all(&answer);
            }
        });
        terminal.drawing = Some((drawing, ended));
        terminal
    }

    pub fn hang_up(self) {}

    /// Sets another size; the kernel signals the program.
    ///
    /// # Panics
    /// If the kernel refuses, or a side is 0.
    pub fn resize(&self, columns: u16, lines: u16) {
        let size = Winsize { ws_row: lines, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
        os::lock(&self.screen).set_size(Self::cells(lines), Self::cells(columns));
        tcsetwinsize(&self.master, size).expect("a size");
    }

    /// Starts `samepage` in a session of its own, whose terminal this is.
    ///
    /// # Panics
    /// If it cannot be started.
    #[must_use]
    pub fn samepage(&self, sandbox: &Sandbox, args: &[&str]) -> Child {
        let program = crate::samepage();
        self.session(
            sandbox,
            &[&[program.as_os_str()], &args.iter().map(OsStr::new).collect::<Vec<_>>()[..]].concat(),
        )
    }

    /// Starts a shell in a session of its own, whose terminal this is, on a script in which
    /// `$SAMEPAGE` is the program and `$DIR` where its sockets may be. It has job control after
    /// `set -m`.
    ///
    /// # Panics
    /// If it cannot be started.
    #[must_use]
    pub fn shell(&self, sandbox: &Sandbox, script: &str) -> Child {
        self.session(sandbox, &["bash", "--norc", "-c", script].map(OsStr::new))
    }

    fn session(&self, sandbox: &Sandbox, command: &[&OsStr]) -> Child {
        let side = || Stdio::from(self.slave.try_clone().expect("a copy of the terminal"));
        Command::new("setsid")
            .arg("--ctty")
            .args(command)
            .env("SAMEPAGE", crate::samepage())
            .env("DIR", sandbox.runtime_dir())
            .env("SAMEPAGE_RUNTIME_DIR", sandbox.runtime_dir())
            .env("TERM", "xterm-256color")
            .stdin(side())
            .stdout(side())
            .stderr(side())
            .spawn()
            .expect("setsid")
    }

    /// Types.
    ///
    /// # Panics
    /// If the terminal takes nothing.
    pub fn type_keys(&self, keys: &str) {
        self.copy().write_all(keys.as_bytes()).expect("keys typed");
    }

    /// The visible lines.
    #[must_use]
    pub fn picture(&self) -> Vec<String> {
        let screen = os::lock(&self.screen);
        let (_, columns) = screen.screen().size();
        screen.screen().rows(0, columns.get()).collect()
    }

    /// Whether a line has this.
    #[must_use]
    pub fn shows(&self, text: &str) -> bool {
        self.picture().iter().any(|line| line.contains(text))
    }

    /// Whether the program has the second screen, and whether the cursor is visible.
    #[must_use]
    pub fn screen_and_cursor(&self) -> (bool, bool) {
        let screen = os::lock(&self.screen);
        (screen.screen().alternate_screen(), !screen.screen().hide_cursor())
    }

    /// How the terminal treats what is typed and printed.
    ///
    /// # Panics
    /// If the kernel does not say.
    #[must_use]
    pub fn modes(&self) -> String {
        let modes = tcgetattr(&self.slave).expect("the terminal's modes");
        format!("{:?} {:?} {:?}", modes.input_modes, modes.output_modes, modes.local_modes)
    }

    fn cells(count: u16) -> NonZeroU16 {
        NonZeroU16::new(count).expect("a side of more than 0 cells")
    }

    fn copy(&self) -> File {
        self.master.try_clone().expect("a copy of a descriptor")
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        if let Some((drawing, ended)) = self.drawing.take() {
            drop(ended);
            // It has the last copies of the terminal's own side, but for ours.
            let _ = drawing.join();
        }
    }
}

/// Answers the one question that programs ask their terminal.
#[derive(Default)]
struct Answers(Vec<u8>);

impl Callbacks for Answers {
    fn unhandled_csi(
        &mut self,
        screen: &mut vt100::Screen,
        private: Option<u8>,
        _: Option<u8>,
        params: &[&[u16]],
        kind: char,
    ) {
        // DSR 6, cursor position.
        if (private, params, kind) == (None, &[&[6]], 'n') {
            let (line, column) = screen.cursor_position();
            self.0.extend(format!("\u{1b}[{};{}R", line + 1, column + 1).bytes());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cursor_position_is_answered_however_the_request_is_cut() {
        let asked = b"\x1b[2;2H\xe2\x96\x88yz\x1b[6n";
        for cut in 0..asked.len() {
            let size = |cells| NonZeroU16::new(cells).expect("a size");
            let mut screen = Screen::new_with_callbacks(size(2), size(9), 0, Answers::default());
            let (first, second) = asked.split_at(cut);
            screen.process(first);
            screen.process(second);
            assert_eq!(screen.callbacks().0, b"\x1b[2;5R", "cut at {cut}");
        }
    }
}
