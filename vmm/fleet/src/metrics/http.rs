//! One scrape: a GET of /metrics, answered, and the connection closed.
//!
//! Whatever a client sends, at most [`MAX_HEAD_BYTES`] of it are kept, and it is gone after [`PATIENCE`].

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use super::accept;
use super::text::Format;

/// Longest request line and headers, with the empty line that ends them.
pub(super) const MAX_HEAD_BYTES: usize = 8 << 10;
/// Most headers of a request.
const MAX_HEADERS: usize = 64;
/// How long a client may take to ask, to take its answer, and to hang up, together.
pub(super) const PATIENCE: Duration = Duration::from_secs(5);
/// How long, and how far, a client that was answered is read on: closed at once, it might lose the answer.
const LINGER: Duration = Duration::from_secs(1);
const LINGER_BYTES: usize = 64 << 10;
/// Bytes read at once.
const CHUNK_BYTES: usize = 2 << 10;
/// The least a read or write is given: 0 would be no limit.
const SHORTEST: Duration = Duration::from_millis(1);
/// What is said besides metrics.
const PLAIN: &str = "text/plain; charset=utf-8";

/// A client's stream.
pub(super) trait Client: Read + Write {
    /// From now on a read and a write may take so long.
    fn limit(&self, time: Duration) -> io::Result<()>;
    /// Tells the client that nothing more comes.
    fn end_output(&self);
}

macro_rules! client {
    ($stream:ty) => {
        impl Client for $stream {
            fn limit(&self, time: Duration) -> io::Result<()> {
                self.set_read_timeout(Some(time))?;
                self.set_write_timeout(Some(time))
            }

            fn end_output(&self) {
                // It may be closed already, which is as good.
                let _ = self.shutdown(Shutdown::Write);
            }
        }
    };
}

client!(TcpStream);
client!(UnixStream);

/// Answers one request with what `metrics` gives. A client that is slow or hangs up is left.
pub(super) fn answer(client: &mut dyn Client, metrics: &dyn Fn(Format) -> String) {
    let deadline = Instant::now() + PATIENCE;
    let answer = match request(client, deadline) {
        Ok(Asked::Metrics { head_only, format }) => {
            Answer { head_only, kind: format.content_type(), ..Answer::of("200 OK", metrics(format)) }
        }
        Ok(Asked::Elsewhere) => Answer::of("404 Not Found", "there is only /metrics here\n"),
        Ok(Asked::Otherwise) => Answer::of("405 Method Not Allowed", "expected GET /metrics\n"),
        Ok(Asked::TooLong) => {
            Answer::of("431 Request Header Fields Too Large", "expected a request of at most 8 KiB\n")
        }
        Ok(Asked::Nonsense) => Answer::of("400 Bad Request", "expected HTTP/1.1: GET /metrics\n"),
        Ok(Asked::Nothing) | Err(_) => return,
    };
    send(client, &answer, deadline);
}

/// Tells a client that there are too many.
pub(super) fn turn_away(client: &mut dyn Client) {
    let answer = Answer::of("503 Service Unavailable", "too many ask for metrics at once: try again\n");
    // Nobody waits for it: it may lose the answer.
    let _ = client.limit(SHORTEST).and_then(|()| client.write_all(&answer.bytes()));
    client.end_output();
}

/// What a client wants.
enum Asked {
    Metrics { head_only: bool, format: Format },
    Elsewhere,
    Otherwise,
    TooLong,
    Nonsense,
    Nothing,
}

fn request(client: &mut dyn Client, deadline: Instant) -> io::Result<Asked> {
    let mut head = Vec::new();
    let mut chunk = [0; CHUNK_BYTES];
    loop {
        let count = within(client, deadline, |client| client.read(&mut chunk))?;
        if count == 0 {
            return Ok(if head.is_empty() { Asked::Nothing } else { Asked::Nonsense });
        }
        head.extend_from_slice(&chunk[..count]);
        let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
        let mut parsed = httparse::Request::new(&mut headers);
        match parsed.parse(&head) {
            Ok(httparse::Status::Complete(_)) => {
                return Ok(wish(&parsed));
            }
            Ok(httparse::Status::Partial) if head.len() < MAX_HEAD_BYTES => {}
            Ok(httparse::Status::Partial) | Err(httparse::Error::TooManyHeaders) => {
                return Ok(Asked::TooLong);
            }
            Err(_) => return Ok(Asked::Nonsense),
        }
    }
}

fn wish(request: &httparse::Request) -> Asked {
    let target = request.path.unwrap_or("");
    let method = request.method.unwrap_or("");
    match (method, target.split('?').next()) {
        ("GET" | "HEAD", Some("/metrics")) => {
            let accepted = request.headers.iter().filter(|h| h.name.eq_ignore_ascii_case("accept"));
            let format = accept::format(accepted.map(|h| h.value));
            Asked::Metrics { head_only: method == "HEAD", format }
        }
        (_, Some("/metrics")) => Asked::Otherwise,
        _ => Asked::Elsewhere,
    }
}

/// What a client is told.
struct Answer {
    status: &'static str,
    kind: &'static str,
    body: String,
    head_only: bool,
}

impl Answer {
    fn of(status: &'static str, body: impl Into<String>) -> Self {
        Self { status, kind: PLAIN, body: body.into(), head_only: false }
    }

    fn bytes(&self) -> Vec<u8> {
        let further = match self.status.get(..3) {
            // What is sent depends on it, which a cache between has to know.
            Some("200") => "Vary: Accept\r\n",
            Some("405") => "Allow: GET, HEAD\r\n",
            _ => "",
        };
        let head = format!(
            "HTTP/1.1 {}\r\nContent-Type: {}\r\nContent-Length: {}\r\n{further}Connection: close\r\n\r\n",
            self.status,
            self.kind,
            self.body.len()
        );
        let body = if self.head_only { "" } else { self.body.as_str() };
        [head.as_bytes(), body.as_bytes()].concat()
    }
}

fn send(client: &mut dyn Client, answer: &Answer, deadline: Instant) {
    let bytes = answer.bytes();
    let mut sent = 0;
    while sent < bytes.len() {
        match within(client, deadline, |client| client.write(&bytes[sent..])) {
            Ok(count @ 1..) => sent += count,
            _ => return,
        }
    }
    client.end_output();
    let deadline = deadline.min(Instant::now() + LINGER);
    let mut chunk = [0; CHUNK_BYTES];
    let mut rest = LINGER_BYTES;
    while let Ok(count @ 1..) = within(client, deadline, |client| client.read(&mut chunk)) {
        rest = rest.saturating_sub(count);
        if rest == 0 {
            return;
        }
    }
}

/// One read or write, again if a signal broke it off, before the deadline.
fn within(
    client: &mut dyn Client,
    deadline: Instant,
    mut once: impl FnMut(&mut dyn Client) -> io::Result<usize>,
) -> io::Result<usize> {
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left < SHORTEST {
            return Err(io::ErrorKind::TimedOut.into());
        }
        client.limit(left)?;
        match once(client) {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            done => return done,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::thread;

    /// What a client gets that sends this and then nothing more.
    fn told(request: &[u8]) -> String {
        let (mut ours, mut theirs) = UnixStream::pair().unwrap();
        let server = thread::spawn(move || answer(&mut theirs, &|format| format!("{format:?}\n")));
        // It may have been answered before all was sent.
        let _ = ours.write_all(request);
        let _ = ours.shutdown(Shutdown::Write);
        let mut answer = Vec::new();
        let _ = ours.read_to_end(&mut answer);
        server.join().unwrap();
        String::from_utf8(answer).unwrap()
    }

    #[test]
    fn metrics_are_had_by_get() {
        let answer = told(b"GET /metrics HTTP/1.1\r\nHost: a\r\n\r\n");
        assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{answer}");
        assert!(
            answer.contains("\r\nContent-Type: text/plain; version=0.0.4; charset=utf-8\r\n"),
            "{answer}"
        );
        let end = "Content-Length: 5\r\nVary: Accept\r\nConnection: close\r\n\r\nText\n";
        assert!(answer.ends_with(end), "{answer}");
        assert!(told(b"GET /metrics?name[]=a HTTP/1.0\r\n\r\n").ends_with("Text\n"));
        let head = told(b"HEAD /metrics HTTP/1.1\r\n\r\n");
        assert!(head.contains("Content-Length: 5\r\n") && head.ends_with("\r\n\r\n"), "{head}");
    }

    #[test]
    fn open_metrics_is_had_by_its_name() {
        let wanted =
            b"GET /metrics HTTP/1.1\r\naccept: application/openmetrics-text;q=0.9, */*;q=0.1\r\n\r\n";
        let answer = told(wanted);
        assert!(answer.contains("\r\nContent-Type: application/openmetrics-text; version=1.0.0"), "{answer}");
        assert!(answer.ends_with("\r\n\r\nOpenMetrics\n"), "{answer}");
        let elsewhere = told(b"GET / HTTP/1.1\r\nAccept: application/openmetrics-text\r\n\r\n");
        assert!(elsewhere.contains("\r\nContent-Type: text/plain; charset=utf-8\r\n"), "{elsewhere}");
    }

    #[test]
    fn all_else_is_refused_by_name() {
        let long = format!("GET /metrics HTTP/1.1\r\nx: {}\r\n\r\n", "y".repeat(MAX_HEAD_BYTES));
        let many = format!("GET /metrics HTTP/1.1\r\n{}\r\n", "x: y\r\n".repeat(MAX_HEADERS + 1));
        for (request, status) in [
            ("GET / HTTP/1.1\r\n\r\n", "404"),
            ("GET /metrics/ HTTP/1.1\r\n\r\n", "404"),
            ("POST /metrics HTTP/1.1\r\nContent-Length: 3\r\n\r\nabc", "405"),
            (&long, "431"),
            (&many, "431"),
            ("GET /metrics HTTP/1.1\r\n", "400"),
            ("\u{1}\u{2}\u{3}\r\n\r\n", "400"),
        ] {
            let answer = told(request.as_bytes());
            assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{request:?} gave {answer:?}");
        }
        assert_eq!(told(b""), "");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn rubbish_is_answered_or_hung_up_on(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let answer = told(&bytes);
            prop_assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 4"), "{answer:?}");
        }
    }
}
