//! One client's connection: bytes in, requests out, answers in, bytes out. It never blocks, and it holds at most one
//! request that waits for its answer, so what a client can make the VM keep is bounded.

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
    /// Whether one more takes the place of the one that has been idle longest. If not, or none is idle, it is turned away.
    pub evicts_idle: bool,
    /// The longest body; None: bodies are not read.
    pub body_bytes: Option<usize>,
    /// Whether a client may ask more than once.
    pub keeps_alive: bool,
    /// How long a request may take to come in, and an answer to be taken.
    pub patience: Duration,
    /// How long a connection may lie idle between requests.
    pub idle: Duration,
    /// How long a connection may last, whatever it does; None: as long as it likes.
    pub life: Option<Duration>,
    /// How long, and how far, a client that got its last answer is read on: closed at once, it might lose the answer.
    pub linger: Duration,
    /// See `linger`.
    pub linger_bytes: usize,
    /// What is answered to what is no request; None: nothing.
    pub refuse: fn(&HttpError) -> Option<Response>,
    /// What is answered to one client too many.
    pub turn_away: fn() -> Response,
}

/// A non-blocking stream whose sending side can be closed.
pub trait Stream: Read + Write {
    /// Tells the client that nothing more comes.
    fn end_output(&mut self);
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
    began: Instant,
    rules: Rules,
}

impl<S: Stream> Connection<S> {
    /// A client that has just come.
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

    /// The deadline has passed. False when the connection is to be closed, true when it still says why.
    pub fn expire(&mut self, now: Instant) -> bool {
        let slow = self.state == State::Reading && self.output.is_empty() && self.parser.is_partial();
        slow && self.refuse(&HttpError::Slow { seconds: self.rules.patience.as_secs() }, now)
    }

    /// What came is no request. False if nothing is to be said to that.
    fn refuse(&mut self, error: &HttpError, now: Instant) -> bool {
        match (self.rules.refuse)(error) {
            Some(response) => self.end_with(&response, now),
            None => return false,
        }
        true
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
