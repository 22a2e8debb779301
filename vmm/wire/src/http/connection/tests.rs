use super::*;
use crate::http::Status;
use proptest::prelude::*;
use std::cell::RefCell;
use std::collections::VecDeque;
use std::rc::Rc;

/// A client's end of a stream, shared by both sides.
#[derive(Default)]
struct Wire {
    /// Bytes that the client has sent; empty for its end.
    to_us: VecDeque<Vec<u8>>,
    from_us: Vec<u8>,
    /// How much more the client takes.
    room: usize,
    ended: bool,
}

#[derive(Clone, Default)]
struct Fake(Rc<RefCell<Wire>>);

impl Fake {
    fn sends(&self, bytes: &[u8]) {
        self.0.borrow_mut().to_us.push_back(bytes.to_vec());
    }

    fn takes(&self, bytes: usize) {
        self.0.borrow_mut().room = bytes;
    }

    fn got(&self) -> String {
        String::from_utf8_lossy(&std::mem::take(&mut self.0.borrow_mut().from_us)).into_owned()
    }
}

impl Read for Fake {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let mut wire = self.0.borrow_mut();
        let Some(mut piece) = wire.to_us.pop_front() else { return Err(io::ErrorKind::WouldBlock.into()) };
        let n = piece.len().min(buffer.len());
        buffer[..n].copy_from_slice(&piece[..n]);
        if piece.is_empty() || n < piece.len() {
            // The end stays the end.
            piece.drain(..n);
            wire.to_us.push_front(piece);
        }
        Ok(n)
    }
}

impl Write for Fake {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut wire = self.0.borrow_mut();
        let n = bytes.len().min(wire.room);
        if n == 0 {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        wire.room -= n;
        wire.from_us.extend(&bytes[..n]);
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Stream for Fake {
    fn end_output(&mut self) {
        self.0.borrow_mut().ended = true;
    }
}

const PATIENCE: Duration = Duration::from_secs(10);
const IDLE: Duration = Duration::from_secs(600);
const LINGER: Duration = Duration::from_secs(2);
const LINGER_BYTES: usize = 1 << 20;

/// As the API's.
const RULES: Rules = Rules {
    connections: 256,
    evicts_idle: true,
    body_bytes: Some(51_200),
    keeps_alive: true,
    patience: PATIENCE,
    idle: IDLE,
    life: None,
    linger: LINGER,
    linger_bytes: LINGER_BYTES,
    refuse: |error| match error {
        HttpError::Cut => None,
        error => Some(fault(&error.to_string())),
    },
    turn_away: || fault("later"),
};

fn response(status: Status, body: &str) -> Response {
    Response { status, content_type: "text/plain", headers: Vec::new(), body: body.into(), head_only: false }
}

fn fault(body: &str) -> Response {
    response(Status::BadRequest, body)
}

fn done() -> Response {
    response(Status::NoContent, "")
}

const GET: &[u8] = b"GET / HTTP/1.1\r\n\r\n";

fn connected() -> (Connection<Fake>, Fake, Instant) {
    connected_by(RULES)
}

fn connected_by(rules: Rules) -> (Connection<Fake>, Fake, Instant) {
    let fake = Fake::default();
    fake.takes(usize::MAX);
    let now = Instant::now();
    (Connection::new(fake.clone(), rules, now), fake, now)
}

fn asked(step: Step) -> HttpRequest {
    match step {
        Step::Ask(request) => request,
        other => panic!("no request but {other:?}"),
    }
}

#[test]
fn pipelined_requests_are_answered_one_after_the_other() {
    let (mut connection, client, now) = connected();
    client.sends(&[GET, b"PUT /actions HTTP/1.1\r\nContent-Length: 2\r\n\r\n{}GET /ver"].concat());
    assert_eq!(asked(connection.advance(now)).path, "/");
    assert_eq!(connection.advance(now), Step::Wait);
    assert_eq!(connection.interest(), (false, false), "it reads on before it has answered");
    assert_eq!(connection.deadline(), None, "it loses patience while the client waits for it");
    connection.answer(&done(), now);
    assert_eq!(asked(connection.advance(now)).body, b"{}");
    connection.answer(&fault("no"), now);
    assert_eq!(connection.advance(now), Step::Wait);
    let got = client.got();
    assert!(got.starts_with("HTTP/1.1 204") && got.contains("HTTP/1.1 400"), "{got}");
    assert_eq!(connection.interest(), (true, false));
    client.sends(b"sion HTTP/1.0\r\n\r\n");
    assert_eq!(asked(connection.advance(now)).path, "/version");
    connection.answer(&done(), now);
    assert_eq!(connection.advance(now), Step::Wait);
    assert!(client.got().contains("Connection: close"));
    assert!(client.0.borrow().ended);
    client.sends(b"");
    assert_eq!(connection.advance(now), Step::Close);
}

#[test]
fn an_error_is_the_last_answer_and_is_not_lost() {
    let (mut connection, client, now) = connected();
    client.sends(b"\x16\x03\x01 hello");
    assert_eq!(connection.advance(now), Step::Wait);
    let got = client.got();
    assert!(got.starts_with("HTTP/1.1 400 Bad Request\r\n") && got.contains("not HTTP/1.1"), "{got}");
    assert!(client.0.borrow().ended);
    // Later bytes are read, so that the client is not cut off while it writes, but not for ever.
    for _ in 0..LINGER_BYTES / 4096 - 1 {
        client.sends(&[b'x'; 4096]);
    }
    assert_eq!(connection.advance(now), Step::Wait);
    client.sends(&[b'x'; 4096]);
    assert_eq!(connection.advance(now), Step::Close);
    assert_eq!(client.got(), "");
}

#[test]
fn a_client_that_sends_no_more_still_gets_an_answer() {
    let (mut connection, client, now) = connected();
    client.sends(&[GET, GET].concat());
    client.sends(b"");
    for _ in 0..2 {
        asked(connection.advance(now));
        connection.answer(&response(Status::Ok, "1"), now);
    }
    assert_eq!(connection.advance(now), Step::Close);
    assert_eq!(client.got().matches("HTTP/1.1 200 OK").count(), 2);
    // Half a request and then the end is an end.
    let (mut connection, client, now) = connected();
    client.sends(&GET[..7]);
    client.sends(b"");
    assert_eq!(connection.advance(now), Step::Close);
}

#[test]
fn a_client_that_does_not_read_is_not_read_either() {
    let (mut connection, client, now) = connected();
    client.takes(10);
    client.sends(&GET.repeat(3));
    asked(connection.advance(now));
    connection.answer(&response(Status::Ok, &"x".repeat(100)), now);
    assert_eq!(connection.advance(now), Step::Wait);
    assert_eq!(connection.interest(), (false, true));
    assert_eq!(connection.deadline(), Some(now + PATIENCE));
    assert!(!connection.expire(now + PATIENCE), "a client that does not read gets no answer");
    client.takes(1000);
    let later = now + Duration::from_secs(1);
    asked(connection.advance(later));
}

#[test]
fn patience_ends() {
    let (mut connection, client, now) = connected();
    let second = Duration::from_secs(1);
    assert_eq!(connection.advance(now), Step::Wait);
    assert!(connection.is_idle());
    assert_eq!(connection.deadline(), Some(now + IDLE));
    // A byte now and then does not extend the time: the first one counts.
    for n in 1..5 {
        client.sends(&GET[n as usize..n as usize + 1]);
        assert_eq!(connection.advance(now + second * n), Step::Wait);
        assert!(!connection.is_idle());
        assert_eq!(connection.deadline(), Some(now + second + PATIENCE));
    }
    assert!(connection.expire(now + second + PATIENCE));
    assert_eq!(connection.advance(now + second + PATIENCE), Step::Wait);
    assert!(client.got().contains("not complete after 10 s"));
    assert_eq!(connection.deadline(), Some(now + second + PATIENCE + LINGER));
    assert!(!connection.expire(now + second + PATIENCE + LINGER));
}

#[test]
fn a_short_life_ends_whatever_the_client_does() {
    let second = Duration::from_secs(1);
    let rules = Rules { life: Some(second * 5), keeps_alive: false, refuse: |_| None, ..RULES };
    let (mut connection, client, now) = connected_by(rules);
    assert_eq!(connection.deadline(), Some(now + second * 5));
    client.sends(&[GET, GET].concat());
    asked(connection.advance(now + second));
    client.takes(0);
    connection.answer(&response(Status::Ok, "all"), now + second * 2);
    assert_eq!(connection.advance(now + second * 2), Step::Wait);
    assert_eq!(connection.deadline(), Some(now + second * 5), "not 10 s from the last byte");
    client.takes(1000);
    assert_eq!(connection.advance(now + second * 4), Step::Wait);
    assert!(client.got().contains("Connection: close") && client.0.borrow().ended);
    assert_eq!(connection.deadline(), Some(now + second * 5));
    // A client that has not sent all of its request gets no answer where the rules have none.
    let (mut connection, client, now) = connected_by(rules);
    client.sends(&GET[..7]);
    assert_eq!(connection.advance(now), Step::Wait);
    assert!(!connection.expire(now + second * 5));
    client.sends(b"");
    assert_eq!(connection.advance(now), Step::Close);
    assert_eq!(client.got(), "");
}

#[test]
fn a_body_is_waited_for_with_leave() {
    let (mut connection, client, now) = connected();
    client.sends(b"PUT / HTTP/1.1\r\nContent-Length: 2\r\nExpect: 100-continue\r\n\r\n");
    assert_eq!(connection.advance(now), Step::Wait);
    assert_eq!(client.got(), "HTTP/1.1 100 Continue\r\n\r\n");
    assert_eq!(connection.advance(now), Step::Wait);
    assert_eq!(client.got(), "");
    client.sends(b"{}");
    assert_eq!(asked(connection.advance(now)).body, b"{}");
}

proptest! {
    /// Whatever arrives, in any pieces, at any reader: the connection ends, and every request has
    /// one answer.
    #[test]
    fn any_client_comes_to_an_end(
        pieces in prop::collection::vec(prop_oneof![
            prop::collection::vec(any::<u8>(), 1..50),
            Just(GET.to_vec()),
            Just(b"PUT /a HTTP/1.1\r\nContent-Length: 3\r\n\r\nabc".to_vec()),
            Just(b"HTTP/1.1\r\n".to_vec()),
        ], 0..20),
        room in 1usize..300,
    ) {
        let (mut connection, client, now) = connected();
        pieces.iter().for_each(|piece| client.sends(piece));
        client.sends(b"");
        let mut asked = 0;
        let mut steps = 0;
        loop {
            client.takes(room);
            steps += 1;
            prop_assert!(steps < 2000, "it does not end");
            match connection.advance(now) {
                Step::Close => break,
                Step::Ask(_) => {
                    asked += 1;
                    connection.answer(&done(), now);
                }
                Step::Wait => {}
            }
        }
        let got = client.got();
        let refused = got.matches("HTTP/1.1 400").count();
        prop_assert_eq!(got.matches("HTTP/1.1 204").count(), asked);
        prop_assert!(refused <= 1);
    }
}
