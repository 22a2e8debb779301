//! JSON lines over a Unix socket: lines of bounded length, each way with a deadline.

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{AddressFamily, RecvFlags, SocketAddrUnix, SocketFlags, SocketType, recv, socket_with};
use serde::Serialize;
use serde::de::DeserializeOwned;
use thiserror::Error;

use super::answer::{self, Refusal};

/// Bytes read at once.
const CHUNK_BYTES: usize = 16 << 10;
/// The least timeout of a read or a write: 0 would be no limit.
const SHORTEST: Duration = Duration::from_millis(1);

/// Why no line was received or sent.
#[derive(Debug, Error)]
pub enum LineError {
    /// The deadline has passed. A line that has begun is kept: receiving may be tried again.
    #[error("nothing came in time")]
    Late,
    /// Nothing has arrived, and the caller did not wait.
    #[error("nothing has come yet")]
    NotYet,
    /// The peer disconnected between two lines.
    #[error("it disconnected without an answer")]
    Closed,
    /// The peer disconnected within a line.
    #[error("it disconnected in the middle of its answer")]
    Cut,
    /// The line is too long. The stream ends after it.
    #[error("its line is longer than {limit} bytes, the most that is read")]
    TooLong { limit: usize },
    /// A line arrived that is not what was expected.
    #[error("its answer cannot be parsed")]
    NotUnderstood(#[source] serde_json::Error),
    /// The socket failed otherwise.
    #[error(transparent)]
    Io(io::Error),
}

impl From<io::Error> for LineError {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => Self::Late,
            io::ErrorKind::UnexpectedEof => Self::Closed,
            _ => Self::Io(error),
        }
    }
}

/// Splits bytes into lines of at most `limit` bytes, the `\n` not counted.
#[derive(Debug)]
pub struct LineBuffer {
    bytes: Vec<u8>,
    /// Bytes at the beginning that have no end of a line.
    searched: usize,
    limit: usize,
}

impl LineBuffer {
    pub fn new(limit: usize) -> Self {
        Self { bytes: Vec::new(), searched: 0, limit }
    }

    /// Takes received bytes. Call [`Self::next_line`] until it returns None before taking more:
    /// that bounds what is kept.
    pub fn push(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    /// The next whole line, without its end.
    ///
    /// # Errors
    /// [`LineError::TooLong`].
    pub fn next_line(&mut self) -> Result<Option<Vec<u8>>, LineError> {
        let end = self.bytes[self.searched..].iter().position(|byte| *byte == b'\n');
        let length = end.map_or(self.bytes.len(), |end| self.searched + end);
        if length > self.limit {
            return Err(LineError::TooLong { limit: self.limit });
        }
        self.searched = length;
        if end.is_none() {
            return Ok(None);
        }
        let rest = self.bytes.split_off(length + 1);
        let mut line = std::mem::replace(&mut self.bytes, rest);
        line.pop();
        self.searched = 0;
        Ok(Some(line))
    }

    /// Reads once from `stream`, which may block.
    ///
    /// # Errors
    ///
    /// [`LineError::Closed`] or [`LineError::Cut`] at its end; a timeout of the stream is
    /// [`LineError::Late`].
    pub fn read_from(&mut self, mut stream: impl Read) -> Result<(), LineError> {
        let mut chunk = [0; CHUNK_BYTES];
        loop {
            match stream.read(&mut chunk) {
                Ok(count) => return self.took(&chunk[..count]),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e.into()),
            }
        }
    }

    fn took(&mut self, bytes: &[u8]) -> Result<(), LineError> {
        match (bytes, &self.bytes[..]) {
            ([], []) => Err(LineError::Closed),
            ([], _) => Err(LineError::Cut),
            (bytes, _) => {
                self.push(bytes);
                Ok(())
            }
        }
    }
}

/// A connected socket that carries lines.
#[derive(Debug)]
pub struct Lines {
    stream: UnixStream,
    buffer: LineBuffer,
}

impl Lines {
    /// The peer at the other end of `stream`, with lines of at most `max_line_bytes`.
    pub fn new(stream: UnixStream, max_line_bytes: usize) -> Self {
        Self { stream, buffer: LineBuffer::new(max_line_bytes) }
    }

    pub fn stream(&self) -> &UnixStream {
        &self.stream
    }

    /// Waits for the next line.
    ///
    /// # Errors
    ///
    /// Every [`LineError`] but [`LineError::NotYet`].
    pub fn receive(&mut self, until: Instant) -> Result<Vec<u8>, LineError> {
        loop {
            if let Some(line) = self.buffer.next_line()? {
                return Ok(line);
            }
            self.stream.set_read_timeout(Some(left(until)?))?;
            self.buffer.read_from(&self.stream)?;
        }
    }

    /// Takes what has arrived, without waiting; [`Self::next_line`] returns its lines.
    ///
    /// # Errors
    ///
    /// [`LineError::NotYet`], or the peer is gone.
    pub fn take(&mut self) -> Result<(), LineError> {
        let mut chunk = [0; CHUNK_BYTES];
        match recv(&self.stream, &mut chunk[..], RecvFlags::DONTWAIT) {
            Ok((count, _)) => self.buffer.took(&chunk[..count]),
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => Err(LineError::NotYet),
            Err(e) => Err(LineError::Io(e.into())),
        }
    }

    /// A line that has been taken.
    ///
    /// # Errors
    ///
    /// [`LineError::TooLong`].
    pub fn next_line(&mut self) -> Result<Option<Vec<u8>>, LineError> {
        self.buffer.next_line()
    }

    /// The beginning of a line whose end has not arrived: after [`LineError::Cut`], all there is.
    pub fn take_rest(&mut self) -> Vec<u8> {
        self.buffer.searched = 0;
        std::mem::take(&mut self.buffer.bytes)
    }

    /// Sends a line, which has no `\n` in it.
    ///
    /// # Errors
    ///
    /// The peer is gone, or does not take it in time: [`LineError::Late`].
    pub fn send(&mut self, mut line: Vec<u8>, until: Instant) -> Result<(), LineError> {
        line.push(b'\n');
        let mut rest = line.as_slice();
        while !rest.is_empty() {
            self.stream.set_write_timeout(Some(left(until)?))?;
            match (&self.stream).write(rest) {
                Ok(0) => return Err(LineError::Closed),
                Ok(count) => rest = &rest[count..],
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e.into()),
            }
        }
        Ok(())
    }

    /// Sends `request` as one line.
    ///
    /// # Errors
    /// As [`Self::send`].
    pub fn send_json(&mut self, request: &impl Serialize, until: Instant) -> Result<(), LineError> {
        let line = serde_json::to_vec(request).map_err(|e| LineError::Io(e.into()))?;
        self.send(line, until)
    }

    /// Sends an answer as one line.
    ///
    /// # Errors
    /// As [`Self::send`].
    pub fn answer<R: Serialize, K: Serialize>(
        &mut self,
        answer: &Result<R, Refusal<K>>,
        until: Instant,
    ) -> Result<(), LineError> {
        let line = answer::write(answer).map_err(|e| LineError::Io(e.into()))?;
        self.send(line, until)
    }

    /// Sends a request and waits for the answer; the inner error is the peer's own.
    ///
    /// # Errors
    /// There is no answer, or none that can be read.
    pub fn ask<R: DeserializeOwned, K: DeserializeOwned + Default>(
        &mut self,
        request: &impl Serialize,
        until: Instant,
    ) -> Result<Result<R, Refusal<K>>, LineError> {
        self.send_json(request, until)?;
        let line = self.receive(until)?;
        answer::read(&line).map_err(LineError::NotUnderstood)
    }
}

impl AsFd for Lines {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

fn left(until: Instant) -> Result<Duration, LineError> {
    let left = until.saturating_duration_since(Instant::now());
    if left.is_zero() { Err(LineError::Late) } else { Ok(left.max(SHORTEST)) }
}

/// Connects to the socket at `path`. If its process does not accept clients, that is an error after
/// `limit`.
///
/// # Errors
/// An error of connect(2); a full queue is `WouldBlock` once `limit` is over.
pub fn connect(path: &Path, limit: Duration) -> io::Result<UnixStream> {
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    // This limits connecting, too, where the queue is full.
    set_socket_timeout(&socket, Timeout::Send, Some(limit))?;
    rustix::net::connect(&socket, &SocketAddrUnix::new(path)?)?;
    Ok(socket.into())
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;
    use std::thread;

    use proptest::prelude::*;

    use super::*;

    const LIMIT: usize = 64;

    fn pair() -> (Lines, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        (Lines::new(ours, LIMIT), theirs)
    }

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(60)
    }

    #[test]
    fn each_way_to_fail_is_its_own() {
        let (mut lines, mut peer) = pair();
        assert!(matches!(lines.take(), Err(LineError::NotYet)));
        assert!(matches!(lines.receive(Instant::now()), Err(LineError::Late)));
        peer.write_all(b"{\"a\"").unwrap();
        let short = Instant::now() + Duration::from_millis(30);
        assert!(matches!(lines.receive(short), Err(LineError::Late)));
        // Received bytes are kept.
        peer.write_all(b":1}\n{").unwrap();
        assert_eq!(lines.receive(soon()).unwrap(), b"{\"a\":1}");
        drop(peer);
        assert!(matches!(lines.receive(soon()), Err(LineError::Cut)));
        assert_eq!((lines.take_rest(), lines.take_rest()), (b"{".to_vec(), Vec::new()));
        let (mut lines, peer) = pair();
        drop(peer);
        assert!(matches!(lines.receive(soon()), Err(LineError::Closed)));
        assert!(matches!(lines.take(), Err(LineError::Closed)));
    }

    #[test]
    fn bounds_are_held_to_the_byte() {
        let (mut lines, mut peer) = pair();
        peer.write_all(&[b'x'; LIMIT]).unwrap();
        peer.write_all(b"\n\n").unwrap();
        assert_eq!(lines.receive(soon()).unwrap().len(), LIMIT);
        assert_eq!(lines.receive(soon()).unwrap(), b"");
        peer.write_all(&[b'x'; LIMIT + 1]).unwrap();
        assert!(matches!(lines.receive(soon()), Err(LineError::TooLong { limit: LIMIT })));
    }

    #[test]
    fn a_peer_that_does_not_read_is_given_up_on() {
        let (mut lines, _peer) = pair();
        let until = Instant::now() + Duration::from_millis(100);
        assert!(matches!(lines.send(vec![b'x'; 8 << 20], until), Err(LineError::Late)));
    }

    #[test]
    fn a_deadline_is_for_the_whole_line() {
        let (mut lines, mut peer) = pair();
        let (begin, limit) = (Instant::now(), Duration::from_millis(200));
        let dribble = thread::spawn(move || {
            // Until the reader is gone.
            while begin.elapsed() < Duration::from_secs(60) && peer.write_all(b" ").is_ok() {
                thread::sleep(Duration::from_millis(20));
            }
        });
        let mut more = LineBuffer::new(1 << 20);
        std::mem::swap(&mut lines.buffer, &mut more);
        assert!(matches!(lines.receive(begin + limit), Err(LineError::Late)));
        assert!(begin.elapsed() >= limit);
        drop(lines);
        dribble.join().unwrap();
    }

    #[test]
    fn questions_are_answered() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        let listener = UnixListener::bind(&path).unwrap();
        let server = thread::spawn(move || {
            let mut client = Lines::new(listener.accept().unwrap().0, LIMIT);
            for answer in [Ok(7u64), Err(Refusal::new("k".to_owned(), "no"))] {
                assert_eq!(client.receive(soon()).unwrap(), b"\"how much?\"");
                client.answer(&answer, soon()).unwrap();
            }
            client.receive(soon()).unwrap();
            client.send(b"rubbish".to_vec(), soon()).unwrap();
        });
        let mut lines = Lines::new(connect(&path, Duration::from_secs(60)).unwrap(), LIMIT);
        let mut ask = || lines.ask::<u64, String>(&"how much?", soon());
        assert_eq!(ask().unwrap(), Ok(7));
        assert_eq!(ask().unwrap(), Err(Refusal::new("k".to_owned(), "no")));
        assert!(matches!(ask(), Err(LineError::NotUnderstood(_))));
        server.join().unwrap();
        assert_eq!(
            connect(&path, Duration::from_secs(1)).unwrap_err().kind(),
            io::ErrorKind::ConnectionRefused
        );
    }

    proptest! {
        #[test]
        fn lines_come_out_however_they_are_cut(
            lines in prop::collection::vec("[^\n]{0,16}", 0..8),
            pieces in prop::collection::vec(1usize..9, 1..40),
        ) {
            let all: Vec<u8> = lines.iter().flat_map(|line| format!("{line}\n").into_bytes()).collect();
            let (mut buffer, mut found, mut rest) = (LineBuffer::new(LIMIT), Vec::new(), &all[..]);
            for piece in pieces.iter().cycle() {
                let (now, later) = rest.split_at((*piece).min(rest.len()));
                buffer.push(now);
                rest = later;
                while let Some(line) = buffer.next_line().unwrap() {
                    found.push(String::from_utf8(line).unwrap());
                }
                if rest.is_empty() {
                    break;
                }
            }
            prop_assert_eq!(found, lines);
        }
    }
}
