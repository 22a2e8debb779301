//! A scrape: a GET of /metrics, answered, and the connection closed.
//!
//! Whatever a client sends, no more than a head's worth of it is kept, and it is gone after
//! [`LIFE`].

use std::sync::Arc;
use std::time::Duration;

use wire::http::{ConnectionId, HttpError, HttpRequest, Response, Rules, Service, Status};

use super::accept;
use super::text::Format;

/// What is served, made anew for each client.
pub type Page = dyn Fn(Format) -> String + Send + Sync;

/// Clients at a time; a further one is told to try again.
pub(super) const MAX_CLIENTS: usize = 8;
/// How long a client may take to ask, to take its answer, and to disconnect, together.
const LIFE: Duration = Duration::from_secs(5);
/// What is said besides metrics.
const PLAIN: &str = "text/plain; charset=utf-8";

/// How clients are dealt with.
pub(super) const RULES: Rules = Rules {
    connections: MAX_CLIENTS,
    evicts_idle: false,
    body_bytes: None,
    keeps_alive: false,
    patience: LIFE,
    idle: LIFE,
    life: Some(LIFE),
    linger: Duration::from_secs(1),
    linger_bytes: 64 << 10,
    refuse: |error| match error {
        HttpError::Slow { .. } => None,
        error if error.is_too_long() => {
            Some(plain(Status::HeadTooLong, "expected a request of at most 8 KiB\n"))
        }
        _ => Some(plain(Status::BadRequest, "expected HTTP/1.1: GET /metrics\n")),
    },
    turn_away: || plain(Status::Unavailable, "too many ask for metrics at once: try again\n"),
};

/// Answers scrapes.
pub(super) struct Scrapes(pub(super) Arc<Page>);

impl Service for Scrapes {
    fn serve(&mut self, _: ConnectionId, request: HttpRequest) -> Option<Response> {
        let is_metrics = request.path.split('?').next() == Some("/metrics");
        Some(match (request.method.as_str(), is_metrics) {
            ("GET" | "HEAD", true) => {
                let accepted = request.headers.iter().filter(|(name, _)| name.eq_ignore_ascii_case("accept"));
                let format = accept::format(accepted.map(|(_, value)| value.as_slice()));
                Response {
                    status: Status::Ok,
                    content_type: format.content_type(),
                    // What is sent depends on it, which a cache between has to know.
                    headers: vec![("Vary", "Accept")],
                    body: (self.0)(format).into_bytes(),
                    head_only: request.method == "HEAD",
                }
            }
            (_, true) => {
                let headers = vec![("Allow", "GET, HEAD")];
                Response { headers, ..plain(Status::MethodNotAllowed, "expected GET /metrics\n") }
            }
            _ => plain(Status::NotFound, "there is only /metrics here\n"),
        })
    }
}

fn plain(status: Status, body: &str) -> Response {
    Response { status, content_type: PLAIN, headers: Vec::new(), body: body.into(), head_only: false }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::io::{Read, Write};
    use std::net::Shutdown;
    use std::os::unix::net::{UnixListener, UnixStream};
    use std::thread;
    use wire::http::{Listener, MAX_HEAD_BYTES, MAX_HEADERS, Server};

    /// What a client gets that sends this and then nothing more.
    fn answered(request: &[u8]) -> String {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        let listener = UnixListener::bind(&path).unwrap();
        listener.set_nonblocking(true).unwrap();
        let scrapes = Scrapes(Arc::new(|format| format!("{format:?}\n")));
        let _server =
            Server::start(thread::Builder::new(), Listener::Unix(listener), RULES, scrapes).unwrap();
        let mut ours = UnixStream::connect(&path).unwrap();
        // It may have been answered before all was sent.
        let _ = ours.write_all(request);
        let _ = ours.shutdown(Shutdown::Write);
        let mut answer = Vec::new();
        let _ = ours.read_to_end(&mut answer);
        String::from_utf8(answer).unwrap()
    }

    #[test]
    fn metrics_are_had_by_get() {
        let answer = answered(b"GET /metrics HTTP/1.1\r\nHost: a\r\n\r\n");
        assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{answer}");
        assert!(
            answer.contains("\r\nContent-Type: text/plain; version=0.0.4; charset=utf-8\r\n"),
            "{answer}"
        );
        let end = "Content-Length: 5\r\nVary: Accept\r\nConnection: close\r\n\r\nText\n";
        assert!(answer.ends_with(end), "{answer}");
        assert!(answered(b"GET /metrics?name[]=a HTTP/1.0\r\n\r\n").ends_with("Text\n"));
        let head = answered(b"HEAD /metrics HTTP/1.1\r\n\r\n");
        assert!(head.contains("Content-Length: 5\r\n") && head.ends_with("\r\n\r\n"), "{head}");
    }

    #[test]
    fn open_metrics_is_had_by_its_name() {
        let wanted =
            b"GET /metrics HTTP/1.1\r\naccept: application/openmetrics-text;q=0.9, */*;q=0.1\r\n\r\n";
        let answer = answered(wanted);
        assert!(answer.contains("\r\nContent-Type: application/openmetrics-text; version=1.0.0"), "{answer}");
        assert!(answer.ends_with("\r\n\r\nOpenMetrics\n"), "{answer}");
        let elsewhere = answered(b"GET / HTTP/1.1\r\nAccept: application/openmetrics-text\r\n\r\n");
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
            let answer = answered(request.as_bytes());
            assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{request:?} gave {answer:?}");
        }
        assert_eq!(answered(b""), "");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn rubbish_is_answered_or_hung_up_on(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let answer = answered(&bytes);
            prop_assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 4"), "{answer:?}");
        }
    }
}
