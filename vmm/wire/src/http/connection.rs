//! One client's connection: bytes in, requests out, answers in, bytes out. It never blocks, and it
//! holds at most one request that waits for its answer, so what a client can make the VM keep is
//! bounded.

use std::io::{self, Read, Write};
use std::time::{Duration, Instant};

use super::{HttpError, HttpRequest, Parser, Response};

/// Bytes read at once.
const CHUNK_BYTES: usize = 16 << 10;

/// How a server deals with its clients.
#[derive(Clone, Copy, Debug)]
pub struct Rules {
    /// Clients at a time.
    pub connections: usize,
    /// Whether a new client takes the place of the one that has been idle longest. If not, or none
    /// is idle, it is turned away.
    pub evicts_idle: bool,
    /// The longest body; None: bodies are not read.
    pub body_bytes: Option<usize>,
    /// Whether a client may ask more than once.
    pub keeps_alive: bool,
    /// The longest time for a request to arrive, and for an answer to be taken.
    pub patience: Duration,
    /// The longest time that a connection may be idle between requests.
    pub idle: Duration,
    /// The longest life of a connection; None is no limit.
    pub life: Option<Duration>,
    /// How long a client is still read after its last answer: if the connection were closed at
    /// once, it might lose the answer.
    pub linger: Duration,
    /// See `linger`.
    pub linger_bytes: usize,
    /// The answer to bytes that are no request; None: no answer.
    pub refuse: fn(&HttpError) -> Option<Response>,
    /// The answer to a client beyond the limit.
    pub turn_away: fn() -> Response,
}

/// A non-blocking stream whose sending side can be closed.
pub trait Stream: Read + Write {
    /// Signals the end of our output to the client.
    fn end_output(&mut self);
}

/// Where a connection stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// It is the client's turn.
    Reading,
    /// It is ours.
    Waiting { keep_alive: bool },
    /// The last bytes are being sent.
    Closing,
    /// All is sent; up to `bytes` more bytes of the client's are read and dropped.
    Lingering { bytes: usize },
}

/// The result of advancing a connection.
#[derive(Debug, PartialEq, Eq)]
pub enum Step {
    /// Nothing, until the stream is ready for what [`Connection::interest`] says.
    Wait,
    /// A request. Nothing more is read until [`Connection::answer`].
    Ask(HttpRequest),
    Close,
}

#[derive(Debug)]
pub struct Connection<S> {
    stream: S,
    parser: Parser,
    output: Vec<u8>,
    sent: usize,
    state: State,
    /// The client has closed its side.
    ended: bool,
    /// When the client last did what it was waited for.
    since: Instant,
    began: Instant,
    rules: Rules,
}

impl<S: Stream> Connection<S> {
    /// A client that has just connected.
    pub fn new(stream: S, rules: Rules, now: Instant) -> Self {
        Self {
            stream,
            parser: Parser::new(rules.body_bytes),
            output: Vec::new(),
            sent: 0,
            state: State::Reading,
            ended: false,
            since: now,
            began: now,
            rules,
        }
    }

    pub fn stream(&self) -> &S {
        &self.stream
    }

    /// Events to poll the stream for: (to read, to write). With neither it must not be polled at
    /// all: poll would report a client that is gone again and again.
    pub fn interest(&self) -> (bool, bool) {
        let reads = matches!(self.state, State::Reading | State::Lingering { .. });
        (reads && !self.ended && self.output.is_empty(), !self.output.is_empty())
    }

    /// Whether the client has no request and no answer outstanding.
    pub fn is_idle(&self) -> bool {
        self.state == State::Reading && self.output.is_empty() && !self.parser.is_partial()
    }

    /// When the client last did something.
    pub fn since(&self) -> Instant {
        self.since
    }

    /// When the client's time is over; None while it waits for us.
    pub fn deadline(&self) -> Option<Instant> {
        let Rules { patience, idle, linger, life, .. } = self.rules;
        let limit = match self.state {
            _ if !self.output.is_empty() => patience,
            State::Waiting { .. } => return None,
            State::Reading if self.parser.is_partial() => patience,
            State::Reading => idle,
            State::Closing => patience,
            State::Lingering { .. } => linger,
        };
        let until = self.since + limit;
        Some(life.map_or(until, |life| until.min(self.began + life)))
    }

    /// Called when the deadline has passed. False if the connection is to be closed now, true if an
    /// answer is still sent.
    pub fn expire(&mut self, now: Instant) -> bool {
        let slow = self.state == State::Reading && self.output.is_empty() && self.parser.is_partial();
        slow && self.refuse(&HttpError::Slow { seconds: self.rules.patience.as_secs() }, now)
    }

    /// Answers bytes that are no request. False if there is no answer to that.
    fn refuse(&mut self, error: &HttpError, now: Instant) -> bool {
        match (self.rules.refuse)(error) {
            Some(response) => self.end_with(&response, now),
            None => return false,
        }
        true
    }

    /// Advances as far as possible without waiting.
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
                    self.state = State::Lingering { bytes: self.rules.linger_bytes };
                }
                State::Lingering { bytes } => match self.read() {
                    Ok(Some(chunk)) if chunk.len() < bytes => {
                        self.state = State::Lingering { bytes: bytes - chunk.len() };
                    }
                    Ok(None) => return Step::Wait,
                    _ => return Step::Close,
                },
                State::Reading => match self.parser.next_request() {
                    Ok(Some(request)) => {
                        self.since = now;
                        let keep_alive = request.keep_alive && self.rules.keeps_alive;
                        self.state = State::Waiting { keep_alive };
                        return Step::Ask(request);
                    }
                    Ok(None) if self.parser.take_expectation() => {
                        self.output.extend_from_slice(b"HTTP/1.1 100 Continue\r\n\r\n");
                    }
                    Ok(None) if self.ended => {
                        if !self.parser.is_partial() || !self.refuse(&HttpError::Cut, now) {
                            return Step::Close;
                        }
                    }
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
                    Err(e) if self.refuse(&e, now) => {}
                    Err(_) => return Step::Close,
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

    /// Sends the last answer, whatever was asked.
    pub fn end_with(&mut self, response: &Response, now: Instant) {
        response.write_to(false, &mut self.output);
        self.state = State::Closing;
        self.since = now;
    }

    /// Reads what the client sent; None if nothing has arrived. Empty once it has closed its side.
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

    /// Sends what is buffered. True when nothing is left.
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
