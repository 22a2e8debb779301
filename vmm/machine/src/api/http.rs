//! HTTP/1.1 as far as the API needs it: requests out of a stream of bytes, and answers into one.
//!
//! A body has a Content-Length or is not there. Transfer encodings, trailers and upgrades are refused. Whatever a
//! client sends, no more than [`MAX_HEAD_BYTES`] and the body's limit of it are kept.

use std::fmt::Display;
use std::io::Write;

use serde::Serialize;
use serde_json::json;
use thiserror::Error;

/// Longest request line and headers, with the empty line that ends them.
pub const MAX_HEAD_BYTES: usize = 8 << 10;
/// Longest body unless the command line says otherwise; Firecracker's limit.
pub const MAX_BODY_BYTES: usize = 51_200;
/// Most headers of a request.
const MAX_HEADERS: usize = 64;

/// A request, with its body whole.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HttpRequest {
    /// `GET`, `PUT`, ..., as it was sent.
    pub method: String,
    /// The path, without scheme and host.
    pub path: String,
    /// The body; empty if there was none.
    pub body: Vec<u8>,
    /// Whether the client wants to ask more on this connection.
    pub keep_alive: bool,
}

/// Why bytes are no request. The connection cannot go on after it.
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
    Slow {
        /// The limit.
        seconds: u64,
    },
}

/// A head that was parsed, while its body is still coming.
#[derive(Debug)]
struct Head {
    method: String,
    path: String,
    keep_alive: bool,
    /// The client waits for leave to send the body.
    waits: bool,
    body_bytes: usize,
}

/// Makes requests of bytes, however these are cut.
#[derive(Debug)]
pub struct Parser {
    max_body_bytes: usize,
    buffer: Vec<u8>,
    head: Option<Head>,
}

impl Parser {
    /// One for requests with bodies of at most so many bytes.
    pub fn new(max_body_bytes: usize) -> Self {
        Self { max_body_bytes, buffer: Vec::new(), head: None }
    }

    /// Takes what the client sent. Call [`Self::next`] until it gives nothing before taking more: that bounds what is
    /// kept.
    pub fn push(&mut self, bytes: &[u8]) {
        self.buffer.extend_from_slice(bytes);
    }

    /// Whether a request has begun that is not complete.
    pub fn is_partial(&self) -> bool {
        self.head.is_some() || !self.buffer.is_empty()
    }

    /// Whether the client is to be told, now and once, to go on with the body it announced.
    pub fn take_expectation(&mut self) -> bool {
        self.head.as_mut().is_some_and(|h| std::mem::take(&mut h.waits))
    }

    /// The next request that is complete.
    pub fn next(&mut self) -> Result<Option<HttpRequest>, HttpError> {
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
        Ok(Some(HttpRequest { method: head.method, path: head.path, body, keep_alive: head.keep_alive }))
    }
}

/// The head at the beginning of `bytes` and its length, once it is complete.
fn parse_head(bytes: &[u8], max_body_bytes: usize) -> Result<Option<(Head, usize)>, HttpError> {
    let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
    let mut parsed = httparse::Request::new(&mut headers);
    let httparse::Status::Complete(length) = parsed.parse(bytes)? else {
        return Ok(None);
    };
    let (mut body_bytes, mut waits) = (None, false);
    // HTTP/1.0 closes unless it is told otherwise.
    let mut keep_alive = parsed.version == Some(1);
    for header in parsed.headers.iter() {
        let is = |name: &str| header.name.eq_ignore_ascii_case(name);
        if is("content-length") {
            let before = body_bytes.replace(content_length(header.value, max_body_bytes)?);
            if before.is_some() {
                return Err(HttpError::ContentLength);
            }
        } else if is("transfer-encoding") {
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
    let body_bytes = body_bytes.unwrap_or(0);
    Ok(Some((Head { method, path, keep_alive, waits: waits && body_bytes > 0, body_bytes }, length)))
}

fn content_length(value: &[u8], limit: usize) -> Result<usize, HttpError> {
    if value.is_empty() || !value.iter().all(u8::is_ascii_digit) {
        return Err(HttpError::ContentLength);
    }
    // Whatever does not fit a number is too long as well.
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
    /// 200: with what was asked for.
    Ok,
    /// 204: it was done.
    NoContent,
    /// 400: it was not.
    BadRequest,
    /// 503: nobody has time for it.
    Unavailable,
}

/// An answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Response {
    /// Its status.
    pub status: Status,
    /// Its JSON, without [`Status::NoContent`].
    pub body: Vec<u8>,
}

impl Response {
    /// The request was carried out, and there is nothing to tell.
    pub fn done() -> Self {
        Self { status: Status::NoContent, body: Vec::new() }
    }

    /// What was asked for.
    pub fn json(value: &impl Serialize) -> Self {
        match serde_json::to_vec(value) {
            Ok(body) => Self { status: Status::Ok, body },
            Err(e) => Self::fault(e),
        }
    }

    /// What went wrong, in the object that Firecracker's clients expect.
    pub fn fault(message: impl Display) -> Self {
        let body = json!({"fault_message": message.to_string()}).to_string().into_bytes();
        Self { status: Status::BadRequest, body }
    }

    /// As bytes for a client, at the end of `out`.
    pub fn write_to(&self, keep_alive: bool, out: &mut Vec<u8>) {
        let status = match self.status {
            Status::Ok => "200 OK",
            Status::NoContent => "204 No Content",
            Status::BadRequest => "400 Bad Request",
            Status::Unavailable => "503 Service Unavailable",
        };
        let connection = if keep_alive { "keep-alive" } else { "close" };
        // Writing to memory does not fail.
        let _ = write!(out, "HTTP/1.1 {status}\r\nServer: Samepage API\r\nConnection: {connection}\r\n");
        if self.status != Status::NoContent {
            let length = self.body.len();
            let _ = write!(out, "Content-Type: application/json\r\nContent-Length: {length}\r\n");
        }
        out.extend_from_slice(b"\r\n");
        out.extend_from_slice(&self.body);
    }
}

#[cfg(test)]
mod tests;
