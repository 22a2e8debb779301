//! A terminal for a program that draws: a pseudo-terminal, and what is to be seen on it.
//!
//! It knows as much of the control sequences as `samepage top` uses: moving, clearing, the other screen, the cursor. Colours
//! are not seen.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::{self, JoinHandle};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::pty::{OpenptFlags, grantpt, ioctl_tiocgptpeer, openpt, unlockpt};
use rustix::termios::{Winsize, tcgetattr, tcsetwinsize};

use crate::sandbox::Sandbox;

/// A terminal. Dropped, it is gone for whoever still uses it: as when a window is closed, or a connection lost.
pub struct Terminal {
    master: File,
    slave: OwnedFd,
    screen: Arc<Mutex<Screen>>,
    /// What draws, and the other side of its nothing: closed, it ends.
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
        let screen = Arc::new(Mutex::new(Screen::default()));
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
                let answer = lock(&screen).take(&bytes[..count]);
                // A program that is gone wants no answer.
                let _ = answers.write_all(&answer);
            }
        });
        terminal.drawing = Some((drawing, ended));
        terminal
    }

    /// Closes its window.
    pub fn hang_up(self) {}

    /// Another size, of which the program is told by the kernel.
    ///
    /// # Panics
    /// If the kernel refuses.
    pub fn resize(&self, columns: u16, lines: u16) {
        let size = Winsize { ws_row: lines, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
        lock(&self.screen).resize(columns.into(), lines.into());
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

    /// Starts a shell in a session of its own, whose terminal this is, on a script in which `$SAMEPAGE` is the program and `$DIR` where its
    /// sockets may be. It has job control after `set -m`.
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

    /// The lines that are to be seen now.
    #[must_use]
    pub fn picture(&self) -> Vec<String> {
        lock(&self.screen).cells.iter().map(|line| line.iter().collect()).collect()
    }

    /// Whether a line has this.
    #[must_use]
    pub fn shows(&self, text: &str) -> bool {
        self.picture().iter().any(|line| line.contains(text))
    }

    /// Whether the program has the second screen now, and whether the cursor is to be seen.
    #[must_use]
    pub fn screen_and_cursor(&self) -> (bool, bool) {
        let screen = lock(&self.screen);
        (screen.alternate, !screen.cursor_hidden)
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

fn lock(screen: &Mutex<Screen>) -> MutexGuard<'_, Screen> {
    os::lock(screen)
}

/// What is to be seen.
#[derive(Default)]
struct Screen {
    cells: Vec<Vec<char>>,
    line: usize,
    column: usize,
    alternate: bool,
    /// Where the cursor was when the second screen was entered.
    before: (usize, usize),
    cursor_hidden: bool,
    /// The beginning of a character or sequence that is not complete.
    rest: Vec<u8>,
}

impl Screen {
    fn resize(&mut self, columns: usize, lines: usize) {
        self.cells.resize(lines, Vec::new());
        self.cells.iter_mut().for_each(|line| line.resize(columns, ' '));
    }

    /// Takes what a program prints; gives what the terminal answers.
    fn take(&mut self, bytes: &[u8]) -> Vec<u8> {
        let all = [std::mem::take(&mut self.rest), bytes.to_vec()].concat();
        let text = match std::str::from_utf8(&all) {
            Ok(text) => text.to_owned(),
            Err(e) => {
                self.rest = all[e.valid_up_to()..].to_vec();
                String::from_utf8_lossy(&all[..e.valid_up_to()]).into_owned()
            }
        };
        let mut answer = Vec::new();
        let mut left = text.as_str();
        while let Some(first) = left.chars().next() {
            let Some(sequence) = left.strip_prefix("\u{1b}[") else {
                if left == "\u{1b}" {
                    break;
                }
                self.print(first);
                left = &left[first.len_utf8()..];
                continue;
            };
            let Some(end) = sequence.find(|c: char| ('@'..='~').contains(&c)) else { break };
            let (parameters, rest) = sequence.split_at(end);
            answer.extend(self.control(parameters, rest.as_bytes()[0]));
            left = &rest[1..];
        }
        self.rest.splice(0..0, left.bytes());
        answer
    }

    fn print(&mut self, c: char) {
        match c {
            '\r' => self.column = 0,
            '\n' => self.line += 1,
            c if c.is_control() => {}
            c => {
                if let Some(cell) = self.cells.get_mut(self.line).and_then(|line| line.get_mut(self.column)) {
                    *cell = c;
                }
                self.column += 1;
            }
        }
    }

    fn control(&mut self, parameters: &str, kind: u8) -> Vec<u8> {
        match (parameters, kind) {
            (_, b'H') => {
                let mut place = parameters.split(';').map(|n| n.parse().unwrap_or(1_usize).max(1) - 1);
                (self.line, self.column) = (place.next().unwrap_or(0), place.next().unwrap_or(0));
            }
            ("2", b'J') => self.cells.iter_mut().for_each(|line| line.fill(' ')),
            ("?1049", b'h' | b'l') => {
                self.alternate = kind == b'h';
                match kind {
                    b'h' => self.before = (self.line, self.column),
                    _ => (self.line, self.column) = self.before,
                }
                self.cells.iter_mut().for_each(|line| line.fill(' '));
            }
            ("?25", b'h' | b'l') => self.cursor_hidden = kind == b'l',
            ("6", b'n') => return format!("\u{1b}[{};{}R", self.line + 1, self.column + 1).into_bytes(),
            _ => {}
        }
        Vec::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seen(screen: &Screen) -> Vec<String> {
        screen.cells.iter().map(|line| line.iter().collect()).collect()
    }

    #[test]
    fn sequences_are_understood_however_they_are_cut() {
        let printed = "\u{1b}[?1049h\u{1b}[?25l\u{1b}[2;3H\u{1b}[38;5;1m█b\u{1b}[1;1Hc\r\nd";
        for cut in 0..printed.len() {
            let mut screen = Screen::default();
            screen.resize(5, 2);
            let (first, second) = printed.as_bytes().split_at(cut);
            assert!(screen.take(first).is_empty() && screen.take(second).is_empty());
            assert_eq!(seen(&screen), ["c    ", "d █b "], "cut at {cut}");
            assert!(screen.alternate && screen.cursor_hidden);
        }
        let mut screen = Screen::default();
        screen.resize(5, 2);
        assert_eq!(screen.take(b"\x1b[2;2Hxyzuvw\x1b[6n"), b"\x1b[2;8R");
        let _ = screen.take(b"\x1b[?1049l\x1b[?25h");
        assert_eq!(
            (seen(&screen).concat().trim(), screen.alternate, screen.cursor_hidden),
            ("", false, false)
        );
    }
}
