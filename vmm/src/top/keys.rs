//! Keys from the terminal.
//!
//! Not read by crossterm: it takes the end of file of a terminal that is gone for no input and
//! polls for ever.

use std::io;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

use super::state::Key;

/// Bytes read at once: keys are shorter, and pasted text is read in parts.
const CHUNK: usize = 256;

/// What a key, or the terminal, asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Pressed {
    /// Another picture.
    Key(Key),
    Quit,
}

/// Whether there is still a terminal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Input {
    Open,
    /// Its window was closed, its connection lost.
    Gone,
}

/// Keys from standard input, which is a terminal in raw mode.
#[derive(Debug, Default)]
pub(super) struct Keys {
    bytes: Vec<u8>,
}

impl Keys {
    /// Waits for keys, at most for `limit`, and hands those that came to `pressed`.
    pub(super) fn wait(&mut self, limit: Duration, pressed: impl FnMut(Pressed)) -> io::Result<Input> {
        let input = io::stdin();
        let limit = Timespec { tv_sec: limit.as_secs() as i64, tv_nsec: limit.subsec_nanos().into() };
        match poll(&mut [PollFd::new(&input, PollFlags::IN)], Some(&limit)) {
            Ok(0) => {
                self.settle(pressed);
                return Ok(Input::Open);
            }
            Ok(_) => {}
            Err(Errno::INTR) => return Ok(Input::Open),
            Err(error) => return Err(error.into()),
        }
        let mut chunk = [0; CHUNK];
        match rustix::io::read(&input, &mut chunk) {
            // A terminal in raw mode has no end of file: it is gone.
            Ok(0) | Err(Errno::IO) => Ok(Input::Gone),
            Ok(count) => {
                self.bytes.extend_from_slice(&chunk[..count]);
                self.take(pressed);
                Ok(Input::Open)
            }
            Err(Errno::INTR | Errno::AGAIN) => Ok(Input::Open),
            Err(error) => Err(error.into()),
        }
    }

    /// Called when nothing followed for a while: a lone escape is the Escape key.
    fn settle(&mut self, mut pressed: impl FnMut(Pressed)) {
        if std::mem::take(&mut self.bytes) == [ESCAPE] {
            pressed(Pressed::Quit);
        }
    }

    /// Takes the complete keys.
    fn take(&mut self, mut pressed: impl FnMut(Pressed)) {
        let mut rest = self.bytes.as_slice();
        while let Some((bytes, meaning)) = first(rest) {
            meaning.into_iter().for_each(&mut pressed);
            rest = &rest[bytes..];
        }
        let left = self.bytes.len() - rest.len();
        self.bytes.drain(..left);
        // No key is longer.
        if self.bytes.len() > CHUNK {
            self.bytes.clear();
        }
    }
}

const ESCAPE: u8 = 0x1b;
const CONTROL_C: u8 = 3;

/// The first key of `bytes`: its length and its meaning here. None if it is incomplete.
fn first(bytes: &[u8]) -> Option<(usize, Option<Pressed>)> {
    let key = |key| Some(Pressed::Key(key));
    match *bytes {
        [] | [ESCAPE] => None,
        [ESCAPE, b'[' | b'O', ref sequence @ ..] => {
            let end = sequence.iter().position(|byte| (b'@'..=b'~').contains(byte))?;
            let meaning = match (&sequence[..end], sequence[end]) {
                (b"", b'A') => key(Key::Up),
                (b"", b'B') => key(Key::Down),
                (b"", b'H') | (b"1" | b"7", b'~') => key(Key::Home),
                (b"", b'F') | (b"4" | b"8", b'~') => key(Key::End),
                (b"5", b'~') => key(Key::PageUp),
                (b"6", b'~') => key(Key::PageDown),
                _ => None,
            };
            Some((2 + end + 1, meaning))
        }
        // Two escapes in a row, and a key that is held with Alt.
        [ESCAPE, ESCAPE, ..] => Some((1, Some(Pressed::Quit))),
        [ESCAPE, _, ..] => Some((2, None)),
        [byte, ..] => Some((
            1,
            match byte {
                CONTROL_C | b'q' | b'Q' => Some(Pressed::Quit),
                b's' => key(Key::Sort),
                b'r' => key(Key::Reverse),
                b'p' => key(Key::Pause),
                b'?' | b'h' => key(Key::Help),
                b'k' => key(Key::Up),
                b'j' => key(Key::Down),
                _ => None,
            },
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pressed(parts: &[&[u8]]) -> Vec<Pressed> {
        let (mut keys, mut all) = (Keys::default(), Vec::new());
        for part in parts {
            keys.bytes.extend_from_slice(part);
            keys.take(|one| all.push(one));
        }
        keys.settle(|one| all.push(one));
        all
    }

    #[test]
    fn keys_are_recognised_however_they_are_cut() {
        let typed = b"s\x1b[A\x1bOB\x1b[5~x\xc3\xa4\x1b[1;5Dr?\x1b[8~";
        let meant = [Key::Sort, Key::Up, Key::Down, Key::PageUp, Key::Reverse, Key::Help, Key::End];
        for cut in 0..=typed.len() {
            let (a, b) = typed.split_at(cut);
            assert_eq!(pressed(&[a, b]), meant.map(Pressed::Key), "cut at {cut}");
        }
    }

    #[test]
    fn what_ends_it() {
        for typed in [&b"q"[..], b"Q", b"\x03", b"\x1b"] {
            assert_eq!(pressed(&[typed]), [Pressed::Quit], "{typed:?}");
        }
        assert_eq!(pressed(&[b"\x1b\x1b"]), [Pressed::Quit, Pressed::Quit]);
        assert_eq!(pressed(&[b"\x1bx", b"\x1b["]), []);
        assert_eq!(pressed(&[&[b"\x1b[", &[b'1'; 1000][..]].concat(), b"q"]), [Pressed::Quit]);
    }
}
