//! The API over HTTP: how its clients are served, and what its answers look like. What
//! Firecracker's clients see is decided here; the bytes and the connections are [`wire::http`]'s.

use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use wire::http::{self, ConnectionId, HttpError, HttpRequest, Rules, Service, Status};

use super::call::Caller;
use super::request::Request;
use super::response::Response;

/// Longest body unless the command line says otherwise; Firecracker's limit.
pub const MAX_BODY_BYTES: usize = 51_200;
/// Clients at a time. One more takes the place of the one that has been idle longest, or is turned
/// away.
pub const MAX_CONNECTIONS: usize = 256;

/// The limits on clients, whose bodies have at most `max_body_bytes`.
pub fn rules(max_body_bytes: usize) -> Rules {
    Rules {
        connections: MAX_CONNECTIONS,
        evicts_idle: true,
        body_bytes: Some(max_body_bytes),
        keeps_alive: true,
        patience: Duration::from_secs(10),
        idle: Duration::from_secs(600),
        life: None,
        linger: Duration::from_secs(2),
        linger_bytes: 1 << 20,
        refuse: |error| match error {
            HttpError::Cut => None,
            error => Some(Response::fault(os::one_line(error)).into()),
        },
        turn_away: || {
            let mut busy = Response::fault(format_args!("{MAX_CONNECTIONS} clients are being served."));
            busy.status = Status::Unavailable;
            busy.into()
        },
    }
}

/// The API thread's side of the VM.
pub struct Api(pub Caller);

impl Service for Api {
    fn begin(&mut self) {
        jail::enter(jail::Thread::Api);
    }

    fn serve(&mut self, connection: ConnectionId, asked: HttpRequest) -> Option<http::Response> {
        tracing::info!("the API is asked for {} {:?}", asked.method, asked.path);
        match Request::parse(&asked.method, &asked.path, &asked.body) {
            Ok(request) => {
                // Without an answer the VM has ended, and so does this thread.
                self.0.call(connection, request);
                None
            }
            Err(fault) => Some(Response::fault(fault.message()).into()),
        }
    }

    fn wake(&self) -> Option<BorrowedFd<'_>> {
        Some(self.0.wake().as_fd())
    }

    fn answers(&mut self) -> Vec<(ConnectionId, http::Response)> {
        self.0.wake().clear();
        std::iter::from_fn(|| self.0.next_answer()).map(|(id, response)| (id, response.into())).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(response: Response, keep_alive: bool) -> String {
        let mut out = Vec::new();
        http::Response::from(response).write_to(keep_alive, &mut out);
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn answers_are_framed() {
        assert_eq!(
            written(Response::done(), true),
            "HTTP/1.1 204 No Content\r\nServer: Samepage API\r\nConnection: keep-alive\r\n\r\n"
        );
        let text = written(Response::fault("say \"no\"\n"), false);
        assert!(text.starts_with("HTTP/1.1 400 Bad Request\r\n"), "{text}");
        assert!(text.contains("Connection: close\r\n") && text.contains("Content-Length: 32\r\n"), "{text}");
        assert!(text.contains("Server: Samepage API\r\n"), "{text}");
        assert!(text.ends_with("\r\n\r\n{\"fault_message\":\"say \\\"no\\\"\\n\"}"), "{text}");
    }

    #[test]
    fn what_is_no_request_is_answered_and_an_end_is_not() {
        let refuse = rules(MAX_BODY_BYTES).refuse;
        assert_eq!(refuse(&HttpError::Cut), None);
        let slow = refuse(&HttpError::Slow { seconds: 10 }).unwrap();
        assert!(String::from_utf8(slow.body).unwrap().contains("not complete after 10 s"));
        assert_eq!(refuse(&HttpError::HeadLength).unwrap().status, Status::BadRequest);
        assert_eq!((rules(7).turn_away)().status, Status::Unavailable);
    }
}
