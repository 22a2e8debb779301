//! The part of HTTP/1.1 that our servers need: requests from a stream of bytes, and answers into
//! one.
//!
//! A body has a Content-Length or is not there. Transfer encodings, trailers and upgrades are
//! refused. At most [`MAX_HEAD_BYTES`] and the body's limit are kept of what a client sends.

mod connection;
mod server;

use std::io::Write;

use thiserror::Error;

pub use connection::{Connection, Rules, Step, Stream};
pub use server::{ConnectionId, Listener, Server, Service};

/// Longest request line and headers, with the empty line that ends them.
pub const MAX_HEAD_BYTES: usize = 8 << 10;
/// Most headers of a request.
pub const MAX_HEADERS: usize = 64;

/// A request, with its body whole.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HttpRequest {
    /// `GET`, `PUT`, ..., as it was sent.
    pub method: String,
    /// The path, without scheme and host.
    pub path: String,
    /// The headers, in their order.
    pub headers: Vec<(String, Vec<u8>)>,
    /// The body; empty if there was none.
    pub body: Vec<u8>,
    /// Whether the client may send more requests on this connection.
    pub keep_alive: bool,
}

/// Why bytes are no request. The connection ends after it.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum HttpError {
    /// The head cannot be parsed.
    #[error("The request is not HTTP/1.1")]
    Syntax(#[from] httparse::Error),
    /// The head does not end.
    #[error("The request line and headers are longer than {MAX_HEAD_BYTES} bytes.")]
    HeadLength,
    /// Content-Length is no number, or there are several.
    #[error("The Content-Length header must be given once, as a decimal number.")]
    ContentLength,
    /// The body is too long.
    #[error("The request has a body of {bytes} bytes, and at most {limit} are allowed.")]
    BodyLength {
        /// Its announced length.
        bytes: u64,
        /// The most it may be.
        limit: usize,
    },
    /// The body has another framing than Content-Length.
    #[error("Transfer-Encoding is not supported: send the body with a Content-Length.")]
    TransferEncoding,
    /// The client took too long.
    #[error("The request was not complete after {seconds} s.")]
    Slow { seconds: u64 },
    /// The client closed its side in the middle of a request.
    #[error("The request is not complete.")]
    Cut,
}

impl HttpError {
    /// Whether the head is longer than is read.
    pub fn is_too_long(&self) -> bool {
        matches!(self, Self::HeadLength | Self::Syntax(httparse::Error::TooManyHeaders))
    }
}

/// A head that was parsed, while its body is still coming.
#[derive(Debug)]
struct Head {
    method: String,
    path: String,
    headers: Vec<(String, Vec<u8>)>,
    keep_alive: bool,
    /// The client waits for `100 Continue` before it sends the body.
    waits: bool,
    body_bytes: usize,
}

/// Parses requests from bytes that arrive in any pieces.
#[derive(Debug)]
pub struct Parser {
    max_body_bytes: Option<usize>,
    buffer: Vec<u8>,
    head: Option<Head>,
}

impl Parser {
    /// Accepts bodies of at most `max_body_bytes`. None: a request ends with its head, whatever it
    /// says of a body.
    pub fn new(max_body_bytes: Option<usize>) -> Self {
        Self { max_body_bytes, buffer: Vec::new(), head: None }
    }

    /// Takes what the client sent. Call [`Self::next_request`] until it returns None before taking
    /// more: that bounds what is kept.
    pub fn push(&mut self, bytes: &[u8]) {
        self.buffer.extend_from_slice(bytes);
    }

    /// Whether a request has begun that is not complete.
    pub fn is_partial(&self) -> bool {
        self.head.is_some() || !self.buffer.is_empty()
    }

    /// Whether to send `100 Continue` now; true once for each body that was announced with it.
    pub fn take_expectation(&mut self) -> bool {
        self.head.as_mut().is_some_and(|h| std::mem::take(&mut h.waits))
    }

    /// The next request that is complete.
    pub fn next_request(&mut self) -> Result<Option<HttpRequest>, HttpError> {
        if self.head.is_none() {
            let seen = &self.buffer[..self.buffer.len().min(MAX_HEAD_BYTES)];
            match parse_head(seen, self.max_body_bytes)? {
                Some((head, bytes)) => {
                    self.buffer.drain(..bytes);
                    self.head = Some(head);
                }
                None if seen.len() == MAX_HEAD_BYTES => return Err(HttpError::HeadLength),
                None => return Ok(None),
            }
        }
        let Some(head) = self.head.take_if(|h| h.body_bytes <= self.buffer.len()) else {
            return Ok(None);
        };
        let body = self.buffer.drain(..head.body_bytes).collect();
        let Head { method, path, headers, keep_alive, .. } = head;
        Ok(Some(HttpRequest { method, path, headers, body, keep_alive }))
    }
}

/// The head at the beginning of `bytes` and its length, once it is complete.
fn parse_head(bytes: &[u8], max_body_bytes: Option<usize>) -> Result<Option<(Head, usize)>, HttpError> {
    let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
    let mut parsed = httparse::Request::new(&mut headers);
    let httparse::Status::Complete(length) = parsed.parse(bytes)? else {
        return Ok(None);
    };
    let (mut body_bytes, mut waits) = (None, false);
    // HTTP/1.0 closes unless the client asks otherwise.
    let mut keep_alive = parsed.version == Some(1);
    for header in parsed.headers.iter() {
        let is = |name: &str| header.name.eq_ignore_ascii_case(name);
        if is("content-length")
            && let Some(limit) = max_body_bytes
        {
            let before = body_bytes.replace(content_length(header.value, limit)?);
            if before.is_some() {
                return Err(HttpError::ContentLength);
            }
        } else if is("transfer-encoding") && max_body_bytes.is_some() {
            return Err(HttpError::TransferEncoding);
        } else if is("expect") {
            waits = header.value.eq_ignore_ascii_case(b"100-continue");
        } else if is("connection") {
            for option in header.value.split(|b| *b == b',').map(<[u8]>::trim_ascii) {
                if option.eq_ignore_ascii_case(b"close") {
                    keep_alive = false;
                } else if option.eq_ignore_ascii_case(b"keep-alive") {
                    keep_alive = true;
                }
            }
        }
    }
    let method = parsed.method.unwrap_or_default().to_owned();
    let path = path(parsed.path.unwrap_or_default()).to_owned();
    let headers = parsed.headers.iter().map(|h| (h.name.to_owned(), h.value.to_vec())).collect();
    let body_bytes = body_bytes.unwrap_or(0);
    let waits = waits && body_bytes > 0;
    Ok(Some((Head { method, path, headers, keep_alive, waits, body_bytes }, length)))
}

fn content_length(value: &[u8], limit: usize) -> Result<usize, HttpError> {
    if value.is_empty() || !value.iter().all(u8::is_ascii_digit) {
        return Err(HttpError::ContentLength);
    }
    // A length that does not fit the number is too long as well.
    let bytes = std::str::from_utf8(value).ok().and_then(|v| v.parse().ok()).unwrap_or(u64::MAX);
    match usize::try_from(bytes) {
        Ok(short) if short <= limit => Ok(short),
        _ => Err(HttpError::BodyLength { bytes, limit }),
    }
}

/// The path of a target that may be a whole URI.
fn path(target: &str) -> &str {
    match target.strip_prefix("http://") {
        Some(rest) => rest.find('/').map_or("/", |at| &rest[at..]),
        None => target,
    }
}

/// The status of an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// 200: with the data that was asked for.
    Ok,
    /// 204: done.
    NoContent,
    /// 400: refused.
    BadRequest,
    /// 404: nothing there.
    NotFound,
    /// 405: not with this method.
    MethodNotAllowed,
    /// 431: the request's head is too long.
    HeadTooLong,
    /// 503: there are too many clients.
    Unavailable,
}

impl Status {
    fn line(self) -> &'static str {
        match self {
            Self::Ok => "200 OK",
            Self::NoContent => "204 No Content",
            Self::BadRequest => "400 Bad Request",
            Self::NotFound => "404 Not Found",
            Self::MethodNotAllowed => "405 Method Not Allowed",
            Self::HeadTooLong => "431 Request Header Fields Too Large",
            Self::Unavailable => "503 Service Unavailable",
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Response {
    pub status: Status,
    /// The type of its body; none with [`Status::NoContent`].
    pub content_type: &'static str,
    pub headers: Vec<(&'static str, &'static str)>,
    /// Its body; none with [`Status::NoContent`].
    pub body: Vec<u8>,
    /// The body is not sent, only its length: for HEAD.
    pub head_only: bool,
}

impl Response {
    /// Appends its bytes to `out`.
    pub fn write_to(&self, keep_alive: bool, out: &mut Vec<u8>) {
        // Writing to memory does not fail.
        let _ = write!(out, "HTTP/1.1 {}\r\n", self.status.line());
        if self.status != Status::NoContent {
            let (kind, length) = (self.content_type, self.body.len());
            let _ = write!(out, "Content-Type: {kind}\r\nContent-Length: {length}\r\n");
        }
        for (name, value) in &self.headers {
            let _ = write!(out, "{name}: {value}\r\n");
        }
        let connection = if keep_alive { "keep-alive" } else { "close" };
        let _ = write!(out, "Connection: {connection}\r\n\r\n");
        if self.status != Status::NoContent && !self.head_only {
            out.extend_from_slice(&self.body);
        }
    }
}

#[cfg(test)]
mod tests;
