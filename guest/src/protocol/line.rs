//! Text without an allocator: short strings, and lines gathered from bytes.

use core::fmt::{self, Write};
use core::ops::Deref;

use super::{MAX_LINE, ParseError};

/// A string of at most `N` bytes, kept in place. The rest is cut off.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Inline<const N: usize> {
    bytes: [u8; N],
    len: u8,
}

/// A word quoted in an error.
pub type Word = Inline<24>;

/// The message of an `err` reply.
pub type Text = Inline<160>;

impl<const N: usize> Inline<N> {
    const FITS: () = assert!(N <= u8::MAX as usize);

    pub const fn new() -> Self {
        let () = Self::FITS;
        Self { bytes: [0; N], len: 0 }
    }

    /// `value` as displayed, cut to fit.
    pub fn of(value: impl fmt::Display) -> Self {
        let mut text = Self::new();
        // Writing into an `Inline` cuts and never fails; a `Display` that fails leaves what it
        // wrote.
        let _ = write!(text, "{value}");
        text
    }

    pub fn as_str(&self) -> &str {
        // `write_str` cuts at character boundaries only, so this is UTF-8.
        str::from_utf8(&self.bytes[..usize::from(self.len)]).unwrap_or_default()
    }
}

impl<const N: usize> Default for Inline<N> {
    fn default() -> Self {
        Self::new()
    }
}

impl<const N: usize> Write for Inline<N> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let start = usize::from(self.len);
        let mut take = text.len().min(N - start);
        while !text.is_char_boundary(take) {
            take -= 1;
        }
        self.bytes[start..start + take].copy_from_slice(&text.as_bytes()[..take]);
        self.len += take as u8;
        Ok(())
    }
}

impl<const N: usize> Deref for Inline<N> {
    type Target = str;

    fn deref(&self) -> &str {
        self.as_str()
    }
}

impl<const N: usize> fmt::Display for Inline<N> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self)
    }
}

impl<const N: usize> fmt::Debug for Inline<N> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self.as_str(), f)
    }
}

/// Gathers bytes into lines. A line that is too long is discarded to its end and reported once.
#[derive(Clone, Debug)]
pub struct LineReader {
    bytes: [u8; MAX_LINE],
    len: usize,
    state: State,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Gathering,
    Overlong,
    /// The line in `bytes` has been handed out; the next byte starts another.
    Complete,
}

impl LineReader {
    /// A reader at the start of a line.
    pub const fn new() -> Self {
        Self { bytes: [0; MAX_LINE], len: 0, state: State::Gathering }
    }

    /// Takes one byte. When it ends a line, returns it without `\n` and `\r`.
    ///
    /// # Errors
    /// [`ParseError::TooLong`] when it ends a line that did not fit, [`ParseError::NotText`] for a
    /// line with other than printable ASCII and tabs (a byte of an unconnected port must not look
    /// like a command).
    pub fn push(&mut self, byte: u8) -> Option<Result<&str, ParseError>> {
        if self.state == State::Complete {
            self.clear();
        }
        if byte == b'\n' {
            let overlong = self.state == State::Overlong;
            self.state = State::Complete;
            return Some(if overlong { Err(ParseError::TooLong) } else { self.text() });
        }
        // Room for the `\n` must be left.
        if self.len == MAX_LINE - 1 {
            self.state = State::Overlong;
        } else {
            self.bytes[self.len] = byte;
            self.len += 1;
        }
        None
    }

    /// Takes back the last byte of the line so far (the console's backspace). False if there is
    /// none.
    pub fn pop(&mut self) -> bool {
        if self.state == State::Complete {
            self.clear();
        }
        let some = self.len > 0;
        self.len = self.len.saturating_sub(1);
        some
    }

    /// The text of the line so far (to redraw it on a console).
    pub fn so_far(&self) -> &str {
        let line = if self.state == State::Complete { &[] } else { &self.bytes[..self.len] };
        checked(line).unwrap_or_default()
    }

    /// Forgets the line so far.
    pub fn clear(&mut self) {
        self.len = 0;
        self.state = State::Gathering;
    }

    fn text(&self) -> Result<&str, ParseError> {
        let line = &self.bytes[..self.len];
        let line = line.strip_suffix(b"\r").unwrap_or(line);
        checked(line)
    }
}

impl Default for LineReader {
    fn default() -> Self {
        Self::new()
    }
}

/// `line` as text, if it is printable ASCII and tabs.
pub(super) fn checked(line: &[u8]) -> Result<&str, ParseError> {
    if let Some(&byte) = line.iter().find(|&&byte| !matches!(byte, b' '..=b'~' | b'\t')) {
        return Err(ParseError::NotText { byte });
    }
    Ok(str::from_utf8(line).unwrap_or_default())
}
