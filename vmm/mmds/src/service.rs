//! What the service answers, without a network: bytes of requests in, bytes of responses out. The
//! words are close to Firecracker's, for programs in guests look at them.

use std::time::Instant;

use httparse::{EMPTY_HEADER, Header, Status};

use crate::format::imds;
use crate::store::Store;
use crate::token::{TTL_SECONDS, Tokens};
use crate::{Config, Version};

/// The longest request, head and body.
pub const MAX_REQUEST_BYTES: usize = 2500;
const MAX_HEADERS: usize = 32;
const TOKEN_PATH: &str = "/latest/api/token";
const TOKEN_HEADERS: [&str; 2] = ["X-metadata-token", "X-aws-ec2-metadata-token"];
const TTL_HEADERS: [&str; 2] = ["X-metadata-token-ttl-seconds", "X-aws-ec2-metadata-token-ttl-seconds"];

/// The service of one VM.
pub struct Service {
    config: Config,
    store: Store,
    tokens: Tokens,
}

/// What became of the bytes of a connection.
#[derive(Debug, PartialEq, Eq)]
pub enum Served {
    /// They are no whole request yet.
    Partial,
    /// This many bytes were a request, whose answer this is.
    Answered { bytes: usize, answer: Vec<u8>, keep_alive: bool },
}

struct Answer {
    status: &'static str,
    content_type: &'static str,
    headers: Vec<(&'static str, String)>,
    body: String,
}

impl Answer {
    fn text(status: &'static str, body: impl Into<String>) -> Self {
        Self { status, content_type: "text/plain", headers: Vec::new(), body: body.into() }
    }

    fn not_found(path: &str) -> Self {
        Self::text("404 Not Found", format!("Resource not found: {path}."))
    }

    fn with(mut self, name: &'static str, value: impl Into<String>) -> Self {
        self.headers.push((name, value.into()));
        self
    }

    fn bytes(self, keep_alive: bool) -> Vec<u8> {
        let Self { status, content_type, headers, body } = self;
        let headers: String = headers.iter().map(|(name, value)| format!("{name}: {value}\r\n")).collect();
        let connection = if keep_alive { "keep-alive" } else { "close" };
        let length = body.len();
        format!(
            "HTTP/1.1 {status}\r\nServer: Samepage MMDS\r\nConnection: {connection}\r\nContent-Type: {content_type}\r\n{headers}\
             Content-Length: {length}\r\n\r\n{body}"
        )
        .into_bytes()
    }
}

impl Service {
    pub fn new(config: Config, store: Store) -> Result<Self, getrandom::Error> {
        Ok(Self { config, store, tokens: Tokens::new()? })
    }

    /// Answers the first request in what a connection has brought.
    pub fn serve(&self, bytes: &[u8], now: Instant) -> Served {
        let mut headers = [EMPTY_HEADER; MAX_HEADERS];
        let mut request = httparse::Request::new(&mut headers);
        let wrong = |why: &str| {
            let answer = Answer::text("400 Bad Request", why).bytes(false);
            Served::Answered { bytes: bytes.len(), answer, keep_alive: false }
        };
        let head = match request.parse(bytes) {
            Ok(Status::Complete(head)) => head,
            Ok(Status::Partial) if bytes.len() < MAX_REQUEST_BYTES => return Served::Partial,
            Ok(Status::Partial) => return wrong("The request is too long."),
            Err(_) => return wrong("Invalid HTTP request."),
        };
        let body = match header(request.headers, &["Content-Length"]) {
            None => Some(0),
            Some(text) => std::str::from_utf8(text).ok().and_then(|text| text.trim().parse::<usize>().ok()),
        };
        let whole = body.and_then(|body| head.checked_add(body)).filter(|whole| *whole <= MAX_REQUEST_BYTES);
        let Some(whole) = whole else {
            return wrong("The request is too long, or its Content-Length is none.");
        };
        if header(request.headers, &["Transfer-Encoding"]).is_some() {
            return wrong("A Transfer-Encoding is not supported.");
        }
        if whole > bytes.len() {
            return Served::Partial;
        }
        let is_close = |value: &[u8]| value.eq_ignore_ascii_case(b"close");
        let keep_alive =
            request.version == Some(1) && !header(request.headers, &["Connection"]).is_some_and(is_close);
        let path = path_of(request.path.unwrap_or_default());
        let answer = self.answer(request.method.unwrap_or_default(), &path, request.headers, now);
        Served::Answered { bytes: whole, answer: answer.bytes(keep_alive), keep_alive }
    }

    fn answer(&self, method: &str, path: &str, headers: &[Header<'_>], now: Instant) -> Answer {
        match (method, self.config.version) {
            ("GET", Version::V1) => self.get(path, headers),
            ("GET", Version::V2) => match header(headers, &TOKEN_HEADERS) {
                Some(token) if self.tokens.is_good(token, now) => self.get(path, headers),
                Some(_) => Answer::text("401 Unauthorized", "MMDS token not valid."),
                None => Answer::text(
                    "401 Unauthorized",
                    "No MMDS token provided. Use `X-metadata-token` or `X-aws-ec2-metadata-token` header to specify the session token.",
                ),
            },
            // Version 1 has them as well, so that a guest need not know which it is.
            ("PUT", _) => self.give_token(path, headers, now),
            _ => Answer::text("405 Method Not Allowed", "Not allowed HTTP method.").with("Allow", "GET, PUT"),
        }
    }

    fn get(&self, path: &str, headers: &[Header<'_>]) -> Answer {
        let Some(value) = self.store.at(path) else { return Answer::not_found(path) };
        let accepts = header(headers, &["Accept"]).unwrap_or_default();
        let is_json = accepts
            .split(|byte| *byte == b',')
            .any(|kind| kind.trim_ascii().split(|byte| *byte == b';').next() == Some(b"application/json"));
        if is_json && !self.config.imds_compat {
            let body = value.to_string();
            return Answer { content_type: "application/json", ..Answer::text("200 OK", body) };
        }
        match imds(&value) {
            Some(text) => Answer::text("200 OK", text),
            None => Answer::text(
                "501 Not Implemented",
                "Cannot retrieve value. The value has an unsupported type.",
            ),
        }
    }

    fn give_token(&self, path: &str, headers: &[Header<'_>], now: Instant) -> Answer {
        if path != TOKEN_PATH {
            return Answer::not_found(path);
        }
        // It has come through a proxy: a token is for the guest alone.
        if header(headers, &["X-Forwarded-For"]).is_some() {
            return Answer::text("400 Bad Request", "Invalid header: `X-Forwarded-For` is not allowed.");
        }
        let Some(ttl) = header(headers, &TTL_HEADERS) else {
            return Answer::text(
                "400 Bad Request",
                "Token time to live value not found. Use `X-metadata-token-ttl-seconds` or `X-aws-ec2-metadata-token-ttl-seconds` header to \
                 specify the token's lifetime.",
            );
        };
        let seconds = std::str::from_utf8(ttl).ok().and_then(|text| text.trim().parse::<u32>().ok());
        let Some(seconds) = seconds.filter(|seconds| TTL_SECONDS.contains(seconds)) else {
            return Answer::text(
                "400 Bad Request",
                format!(
                    "Invalid time to live value provided for token: {}. Please provide a value between {} and {}.",
                    String::from_utf8_lossy(ttl),
                    TTL_SECONDS.start(),
                    TTL_SECONDS.end()
                ),
            );
        };
        match self.tokens.give(seconds, now) {
            Ok(token) => TTL_HEADERS
                .iter()
                .fold(Answer::text("200 OK", token), |answer, name| answer.with(name, seconds.to_string())),
            Err(error) => Answer::text("503 Service Unavailable", format!("No token: {error}")),
        }
    }
}

/// The first header of one of these names.
fn header<'a>(headers: &[Header<'a>], names: &[&str]) -> Option<&'a [u8]> {
    let is_one = |header: &&Header<'a>| names.iter().any(|name| header.name.eq_ignore_ascii_case(name));
    headers.iter().find(is_one).map(|header| header.value)
}

/// The path of a request's target: without a scheme and host, a query, and slashes that stand
/// together or at the end.
fn path_of(target: &str) -> String {
    let target = target.split(['?', '#']).next().unwrap_or_default();
    let target = match target.strip_prefix("http://") {
        Some(rest) => rest.find('/').map_or("", |at| &rest[at..]),
        None => target,
    };
    let keys: Vec<_> = target.split('/').filter(|key| !key.is_empty()).collect();
    format!("/{}", keys.join("/"))
}

#[cfg(test)]
mod tests;
