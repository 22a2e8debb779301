//! One client's connection: bytes in, requests out, answers in, bytes out. It never blocks, and it holds at most one
//! request that waits for its answer, so what a client can make the VM keep is bounded.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use super::http::{HttpError, HttpRequest, Parser, Response};

/// How long a request may take to come in, and an answer to be taken.
pub const PATIENCE: Duration = Duration::from_secs(10);
/// How long a connection may lie idle between requests.
pub const IDLE: Duration = Duration::from_secs(600);
/// How long, and how far, a client that got an error is read on: closed at once, it might lose the error.
const LINGER: Duration = Duration::from_secs(2);
const LINGER_BYTES: usize = 1 << 20;
/// Bytes read at once.
const CHUNK_BYTES: usize = 16 << 10;

/// A non-blocking stream whose sending side can be closed.
pub trait Stream: Read + Write {
    /// Tells the client that nothing more comes.
    fn end_output(&mut self);
}

impl Stream for UnixStream {
    fn end_output(&mut self) {
        // It may be closed already, which is as good.
        let _ = self.shutdown(Shutdown::Write);
    }
}

/// Where a connection stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// It is the client's turn.
    Reading,
    /// It is ours.
    Waiting { keep_alive: bool },
    /// What is left to send is the last.
    Closing,
    /// All is sent; what still comes, up to so many bytes, is thrown away.
    Lingering { bytes: usize },
}

/// What comes of going on with a connection.
#[derive(Debug, PartialEq, Eq)]
pub enum Step {
    /// Nothing, until the stream is ready for what [`Connection::interest`] says.
    Wait,
    /// A request. Nothing more is read until [`Connection::answer`].
    Ask(HttpRequest),
    /// Its end.
    Close,
}

/// A client's connection.
#[derive(Debug)]
pub struct Connection<S> {
    stream: S,
    parser: Parser,
    output: Vec<u8>,
    sent: usize,
    state: State,
    /// The client sends nothing more.
    ended: bool,
    /// When the client last did what it was waited for.
    since: Instant,
}

impl<S: Stream> Connection<S> {
    /// A client that has just come, whose bodies may have so many bytes.
    pub fn new(stream: S, max_body_bytes: usize, now: Instant) -> Self {
        Self {
            stream,
            parser: Parser::new(max_body_bytes),
            output: Vec::new(),
            sent: 0,
            state: State::Reading,
            ended: false,
            since: now,
        }
    }

    /// The stream.
    pub fn stream(&self) -> &S {
        &self.stream
    }

    /// What the stream is to be watched for: (to read, to write). With neither it must not be watched at all, for a
    /// client that is gone is reported for as long as it is.
    pub fn interest(&self) -> (bool, bool) {
        let reads = matches!(self.state, State::Reading | State::Lingering { .. });
        (reads && !self.ended && self.output.is_empty(), !self.output.is_empty())
    }

    /// Whether the client asks nothing and is owed nothing.
    pub fn is_idle(&self) -> bool {
        self.state == State::Reading && self.output.is_empty() && !self.parser.is_partial()
    }

    /// When the client last did something.
    pub fn since(&self) -> Instant {
        self.since
    }

    /// When patience with the client ends; never while it waits for us.
    pub fn deadline(&self) -> Option<Instant> {
        let limit = match self.state {
            _ if !self.output.is_empty() => PATIENCE,
            State::Waiting { .. } => return None,
            State::Reading if self.parser.is_partial() => PATIENCE,
            State::Reading => IDLE,
            State::Closing => PATIENCE,
            State::Lingering { .. } => LINGER,
        };
        Some(self.since + limit)
    }

    /// The deadline has passed. False when the connection is to be closed, true when it still says why.
    pub fn expire(&mut self, now: Instant) -> bool {
        let slow = self.state == State::Reading && self.output.is_empty() && self.parser.is_partial();
        if slow {
            self.end_with(&Response::fault(HttpError::Slow { seconds: PATIENCE.as_secs() }), now);
        }
        slow
    }

    /// Goes on as far as it goes without waiting.
    pub fn advance(&mut self, now: Instant) -> Step {
        loop {
            match self.flush(now) {
                Ok(true) => {}
                Ok(false) => return Step::Wait,
                Err(_) => return Step::Close,
            }
            match self.state {
                State::Waiting { .. } => return Step::Wait,
                State::Closing => {
                    self.stream.end_output();
                    self.since = now;
                    self.state = State::Lingering { bytes: LINGER_BYTES };
                }
                State::Lingering { bytes } => match self.read() {
                    Ok(Some(chunk)) if chunk.len() < bytes => {
                        self.state = State::Lingering { bytes: bytes - chunk.len() };
                    }
                    Ok(None) => return Step::Wait,
                    _ => return Step::Close,
                },
                State::Reading => match self.parser.next() {
                    Ok(Some(request)) => {
                        self.since = now;
                        self.state = State::Waiting { keep_alive: request.keep_alive };
                        return Step::Ask(request);
                    }
                    Ok(None) if self.parser.take_expectation() => {
                        self.output.extend_from_slice(b"HTTP/1.1 100 Continue\r\n\r\n");
                    }
                    Ok(None) if self.ended => return Step::Close,
                    Ok(None) => match self.read() {
                        Ok(Some(chunk)) => {
                            if !self.parser.is_partial() {
                                self.since = now;
                            }
                            self.parser.push(&chunk);
                        }
                        Ok(None) => return Step::Wait,
                        Err(_) => return Step::Close,
                    },
                    Err(e) => self.end_with(&Response::fault(os::one_line(&e)), now),
                },
            }
        }
    }

    /// Answers the request that waits. [`Self::advance`] sends it.
    pub fn answer(&mut self, response: &Response, now: Instant) {
        if let State::Waiting { keep_alive } = self.state {
            response.write_to(keep_alive, &mut self.output);
            self.state = if keep_alive { State::Reading } else { State::Closing };
            self.since = now;
        }
    }

    /// The last answer, whatever was asked.
    pub fn end_with(&mut self, response: &Response, now: Instant) {
        response.write_to(false, &mut self.output);
        self.state = State::Closing;
        self.since = now;
    }

    /// What the client sent; None when it has not sent any more yet. Once it has ended, what comes is empty.
    fn read(&mut self) -> io::Result<Option<Vec<u8>>> {
        let mut chunk = vec![0; CHUNK_BYTES];
        loop {
            return match self.stream.read(&mut chunk) {
                Ok(0) if matches!(self.state, State::Lingering { .. }) => {
                    Err(io::ErrorKind::UnexpectedEof.into())
                }
                Ok(n) => {
                    self.ended = n == 0;
                    chunk.truncate(n);
                    Ok(Some(chunk))
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(None),
                Err(e) => Err(e),
            };
        }
    }

    /// Sends what waits. True when nothing is left.
    fn flush(&mut self, now: Instant) -> io::Result<bool> {
        while self.sent < self.output.len() {
            match self.stream.write(&self.output[self.sent..]) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(n) => {
                    self.sent += n;
                    self.since = now;
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(e) => return Err(e),
            }
        }
        self.output.clear();
        self.sent = 0;
        Ok(true)
    }
}

#[cfg(test)]
mod tests;
