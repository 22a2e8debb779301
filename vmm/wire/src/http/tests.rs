use super::*;
use proptest::prelude::*;

/// The limit on bodies in these tests.
const MAX_BODY_BYTES: usize = 51_200;

/// The requests in `bytes`, which arrive in pieces of these lengths, and the error that ended them.
fn parse(bytes: &[u8], pieces: &[usize]) -> (Vec<HttpRequest>, Option<HttpError>, bool) {
    let (mut parser, mut all, mut rest) = (Parser::new(Some(MAX_BODY_BYTES)), Vec::new(), bytes);
    let mut lengths = pieces.iter().copied().chain(std::iter::repeat(usize::MAX));
    while !rest.is_empty() {
        let (now, later) = rest.split_at(lengths.next().unwrap().clamp(1, rest.len()));
        rest = later;
        parser.push(now);
        loop {
            match parser.next_request() {
                Ok(Some(request)) => all.push(request),
                Ok(None) => break,
                Err(e) => return (all, Some(e), true),
            }
        }
        let most = MAX_HEAD_BYTES.max(MAX_BODY_BYTES);
        assert!(parser.buffer.len() <= most, "{} bytes are kept", parser.buffer.len());
    }
    (all, None, parser.is_partial())
}

fn one(text: &str) -> HttpRequest {
    let (mut all, error, partial) = parse(text.as_bytes(), &[]);
    assert_eq!((all.len(), &error, partial), (1, &None, false), "{text:?}");
    all.remove(0)
}

fn error(text: &str) -> HttpError {
    parse(text.as_bytes(), &[]).1.unwrap_or_else(|| panic!("{text:?} is taken"))
}

#[test]
fn a_request_is_what_was_sent() {
    let request = one("PUT /actions HTTP/1.1\r\nHost: localhost\r\ncontent-LENGTH: 4\r\n\r\n{ \n}");
    assert_eq!(
        request,
        HttpRequest {
            method: "PUT".into(),
            path: "/actions".into(),
            headers: vec![("Host".into(), b"localhost".to_vec()), ("content-LENGTH".into(), b"4".to_vec())],
            body: b"{ \n}".to_vec(),
            keep_alive: true
        }
    );
    assert_eq!(one("GET http://localhost/vm/config HTTP/1.1\r\n\r\n").path, "/vm/config");
    assert_eq!(one("GET http://localhost HTTP/1.1\r\n\r\n").path, "/");
}

#[test]
fn whether_the_connection_lives_on_is_the_clients_choice() {
    for (version, header, lives) in [
        ("1.1", "", true),
        ("1.1", "Connection: close\r\n", false),
        ("1.1", "Connection: te, Close\r\n", false),
        ("1.0", "", false),
        ("1.0", "connection: Keep-Alive\r\n", true),
    ] {
        assert_eq!(one(&format!("GET / HTTP/{version}\r\n{header}\r\n")).keep_alive, lives, "{header}");
    }
}

#[test]
fn bounds_are_held_to_the_byte() {
    let put = |bytes: usize| {
        format!("PUT / HTTP/1.1\r\nContent-Length: {bytes}\r\n\r\n{}", "x".repeat(bytes.min(60_000)))
    };
    assert_eq!(one(&put(MAX_BODY_BYTES)).body.len(), MAX_BODY_BYTES);
    assert_eq!(
        error(&put(MAX_BODY_BYTES + 1)),
        HttpError::BodyLength { bytes: 51_201, limit: MAX_BODY_BYTES }
    );
    let get = |bytes: usize| {
        let around = "GET / HTTP/1.1\r\nA: \r\n\r\n".len();
        format!("GET / HTTP/1.1\r\nA: {}\r\n\r\n", "x".repeat(bytes - around))
    };
    assert_eq!(one(&get(MAX_HEAD_BYTES)).path, "/");
    assert_eq!(error(&get(MAX_HEAD_BYTES + 1)), HttpError::HeadLength);
    let headers = |n| format!("GET / HTTP/1.1\r\n{}\r\n", "A: b\r\n".repeat(n));
    assert_eq!(one(&headers(MAX_HEADERS)).method, "GET");
    assert_eq!(error(&headers(MAX_HEADERS + 1)), HttpError::Syntax(httparse::Error::TooManyHeaders));
}

#[test]
fn bodies_of_doubtful_length_are_refused() {
    for header in [
        "Content-Length: 1\r\nContent-Length: 1",
        "Content-Length: 1\r\nContent-Length: 2",
        "Content-Length: +1",
        "Content-Length: -1",
        "Content-Length: 0x1",
        "Content-Length: 1, 1",
        "Content-Length:",
    ] {
        assert_eq!(error(&format!("PUT / HTTP/1.1\r\n{header}\r\n\r\n{{}}")), HttpError::ContentLength);
    }
    let endless = format!("PUT / HTTP/1.1\r\nContent-Length: 1{}\r\n\r\n", "0".repeat(30));
    assert_eq!(error(&endless), HttpError::BodyLength { bytes: u64::MAX, limit: MAX_BODY_BYTES });
    for coding in ["chunked", "identity", "gzip, chunked"] {
        let text = format!("PUT / HTTP/1.1\r\nTransfer-Encoding: {coding}\r\n\r\n2\r\n{{}}\r\n0\r\n\r\n");
        assert_eq!(error(&text), HttpError::TransferEncoding);
    }
}

#[test]
fn leave_to_send_a_body_is_given_once() {
    let mut parser = Parser::new(Some(MAX_BODY_BYTES));
    parser.push(b"PUT / HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\n");
    assert_eq!(parser.next_request(), Ok(None));
    assert!(parser.take_expectation());
    assert!(!parser.take_expectation());
    parser.push(b"{}");
    assert_eq!(parser.next_request().unwrap().unwrap().body, b"{}");
    parser.push(b"GET / HTTP/1.1\r\nExpect: 100-continue\r\n\r\n");
    assert!(parser.next_request().unwrap().is_some());
    assert!(!parser.take_expectation());
}

#[test]
fn where_bodies_are_not_read_a_request_ends_with_its_head() {
    for header in
        ["Content-Length: 3", "Content-Length: many", "Transfer-Encoding: chunked", "Expect: 100-continue"]
    {
        let mut parser = Parser::new(None);
        parser.push(format!("POST /metrics HTTP/1.1\r\n{header}\r\n\r\nabc").as_bytes());
        let request = parser.next_request().unwrap().unwrap();
        assert_eq!((request.method.as_str(), request.body), ("POST", Vec::new()), "{header}");
        assert!(!parser.take_expectation());
    }
}

#[test]
fn answers_are_framed() {
    let response = |status, head_only| Response {
        status,
        content_type: "text/plain",
        headers: vec![("Allow", "GET")],
        body: b"four".to_vec(),
        head_only,
    };
    let written = |response: Response, keep_alive| {
        let mut out = Vec::new();
        response.write_to(keep_alive, &mut out);
        String::from_utf8(out).unwrap()
    };
    let head = "Content-Type: text/plain\r\nContent-Length: 4\r\nAllow: GET\r\nConnection: close\r\n\r\n";
    let status = "HTTP/1.1 405 Method Not Allowed\r\n";
    assert_eq!(written(response(Status::MethodNotAllowed, false), false), format!("{status}{head}four"));
    assert_eq!(written(response(Status::MethodNotAllowed, true), false), format!("{status}{head}"));
    let none = "HTTP/1.1 204 No Content\r\nAllow: GET\r\nConnection: keep-alive\r\n\r\n";
    assert_eq!(written(response(Status::NoContent, false), true), none);
}

/// Bytes that are nearly HTTP: pieces of it, in any order, with rubbish between them.
fn nearly_http() -> impl Strategy<Value = Vec<u8>> {
    let piece = prop_oneof![
        4 => prop::sample::select(&[
            "GET / HTTP/1.1\r\n\r\n",
            "PUT /actions HTTP/1.1\r\nContent-Length: 2\r\n\r\n{}",
            "PATCH /vm HTTP/1.0\r\nConnection: keep-alive\r\nContent-Length: 3\r\nExpect: 100-continue\r\n\r\nabc",
            "GET ", "/balloon", " HTTP/1.1", "\r\n", "\n", "Content-Length: ", "7", ": ", "Transfer-Encoding: chunked\r\n",
        ][..]).prop_map(|text| text.as_bytes().to_vec()),
        1 => prop::collection::vec(any::<u8>(), 0..40),
    ];
    prop::collection::vec(piece, 0..24).prop_map(|pieces| pieces.concat())
}

proptest! {
    #[test]
    fn any_bytes_end_in_requests_an_error_or_a_wait(bytes in nearly_http(), pieces in prop::collection::vec(1usize..30, 0..40)) {
        prop_assert_eq!(parse(&bytes, &pieces), parse(&bytes, &[]));
    }

    #[test]
    fn whole_requests_come_out_however_they_are_cut(
        bodies in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..200), 1..6),
        pieces in prop::collection::vec(1usize..60, 0..60),
    ) {
        let mut bytes = Vec::new();
        for body in &bodies {
            write!(bytes, "PUT /balloon HTTP/1.1\r\nContent-Length: {}\r\n\r\n", body.len()).unwrap();
            bytes.extend(body);
        }
        let (requests, error, partial) = parse(&bytes, &pieces);
        prop_assert_eq!((error, partial), (None, false));
        let got: Vec<_> = requests.into_iter().map(|r| r.body).collect();
        prop_assert_eq!(got, bodies);
    }
}
