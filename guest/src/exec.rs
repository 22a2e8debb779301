//! How a program on the host has a command run in a guest: frames over a stream to the agent's
//! port, one stream for each command.
//!
//! A frame is its kind, one byte, the length of its content, a u32, little-endian, and the content.
//! The host sends one [`Kind::Run`], then any number of [`Kind::Input`], [`Kind::InputEnd`] and
//! [`Kind::Signal`]; the guest any number of [`Kind::Output`] and [`Kind::Error`], and at the end
//! one [`Kind::Exited`] or [`Kind::Refused`]. When the host's end of the stream is closed, the
//! command gets SIGHUP.

/// The port in the guest on which the agent waits.
pub const PORT: u32 = 1043;
pub const HEADER_BYTES: usize = 5;
/// The most bytes of a frame's content.
pub const MAX_CONTENT_BYTES: usize = 16 << 10;
/// The most arguments of a command, its name among them.
pub const MAX_ARGUMENTS: usize = 256;

/// What a frame is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// The command and its arguments, each with a NUL behind it.
    Run = 1,
    /// Bytes for its standard input.
    Input = 2,
    /// Its standard input ends.
    InputEnd = 3,
    /// A signal for its process group: the number, one byte.
    Signal = 4,
    /// Bytes of its standard output.
    Output = 5,
    /// Bytes of its standard error.
    Error = 6,
    /// How it ended: the status of wait(2), an i32, little-endian.
    Exited = 7,
    /// Why it was not started, as text.
    Refused = 8,
}

/// What a frame begins with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    pub kind: Kind,
    pub len: usize,
}

impl Header {
    /// None of what is no frame.
    pub fn parse(bytes: [u8; HEADER_BYTES]) -> Option<Self> {
        use Kind::{Error, Exited, Input, InputEnd, Output, Refused, Run, Signal};
        let [kind, len @ ..] = bytes;
        let kinds = [Run, Input, InputEnd, Signal, Output, Error, Exited, Refused];
        let kind = kinds.into_iter().find(|known| *known as u8 == kind)?;
        let len = u32::from_le_bytes(len) as usize;
        (len <= MAX_CONTENT_BYTES).then_some(Self { kind, len })
    }

    pub fn bytes(self) -> [u8; HEADER_BYTES] {
        let [a, b, c, d] = (self.len as u32).to_le_bytes();
        [self.kind as u8, a, b, c, d]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn what_was_written_is_read(kind in 1..=8_u8, len in 0..=MAX_CONTENT_BYTES) {
            let [a, b, c, d] = (len as u32).to_le_bytes();
            let bytes = [kind, a, b, c, d];
            prop_assert_eq!(Header::parse(bytes).unwrap().bytes(), bytes);
        }

        #[test]
        fn what_is_no_frame_is_none(bytes: [u8; HEADER_BYTES]) {
            if let Some(header) = Header::parse(bytes) {
                prop_assert!(header.len <= MAX_CONTENT_BYTES && (1..=8).contains(&bytes[0]));
            }
        }
    }
}
