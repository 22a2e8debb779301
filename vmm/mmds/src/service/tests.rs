use std::time::Duration;

use proptest::prelude::*;
use serde_json::json;

use super::*;
use crate::{ADDRESS, SIZE_LIMIT};

fn service(version: Version, imds_compat: bool) -> Service {
    let store = Store::default();
    let contents = json!({"latest": {"meta-data": {"ami-id": "ami-1", "n": 5}, "user-data": "hello"}});
    store.put(contents, SIZE_LIMIT).unwrap();
    Service::new(Config { version, address: ADDRESS, imds_compat }, store).unwrap()
}

/// The status line's number, the whole head, and the body.
fn ask(service: &Service, request: &str) -> (u16, String, String) {
    match service.serve(request.as_bytes(), Instant::now()) {
        Served::Answered { bytes, answer, .. } => {
            assert!(bytes <= request.len());
            let text = String::from_utf8(answer).unwrap();
            let (head, body) = text.split_once("\r\n\r\n").unwrap();
            assert!(head.contains(&format!("Content-Length: {}", body.len())), "{head}");
            (head[9..12].parse().unwrap(), head.to_owned(), body.to_owned())
        }
        Served::Partial => panic!("{request:?} is partial"),
    }
}

fn get(service: &Service, path: &str, headers: &str) -> (u16, String) {
    let (status, _, body) = ask(service, &format!("GET {path} HTTP/1.1\r\nHost: x\r\n{headers}\r\n"));
    (status, body)
}

#[test]
fn version_1_answers_whoever_asks() {
    let service = service(Version::V1, false);
    let json = "Accept: application/json\r\n";
    for (path, headers, status, body) in [
        ("/latest", "", 200, "meta-data/\nuser-data"),
        ("/latest/meta-data/ami-id", "", 200, "ami-1"),
        ("//latest///user-data/?a=b", "", 200, "hello"),
        ("http://169.254.169.254/latest/user-data", "", 200, "hello"),
        ("/latest/meta-data", json, 200, r#"{"ami-id":"ami-1","n":5}"#),
        ("/latest/meta-data/n", "Accept: text/plain, application/json;q=0.5\r\n", 200, "5"),
        ("/latest/meta-data/n", "", 501, "Cannot retrieve value. The value has an unsupported type."),
        ("/nothing", "", 404, "Resource not found: /nothing."),
        ("/latest/user-data/deeper", "", 404, "Resource not found: /latest/user-data/deeper."),
    ] {
        assert_eq!(get(&service, path, headers), (status, body.to_owned()), "{path}");
    }
    let (status, head, _) = ask(&service, "POST / HTTP/1.1\r\n\r\n");
    assert_eq!(status, 405);
    assert!(head.contains("Allow: GET, PUT"), "{head}");
    let compat = super::tests::service(Version::V1, true);
    assert_eq!(get(&compat, "/latest", json).1, "meta-data/\nuser-data");
}

#[test]
fn version_2_wants_a_token() {
    let service = service(Version::V2, false);
    let (status, body) = get(&service, "/latest", "");
    assert_eq!(status, 401);
    assert!(body.starts_with("No MMDS token provided."), "{body}");
    assert_eq!(get(&service, "/latest", "X-metadata-token: x\r\n"), (401, "MMDS token not valid.".into()));
    let put = |headers: &str, path: &str| ask(&service, &format!("PUT {path} HTTP/1.1\r\n{headers}\r\n"));
    for (headers, said) in [
        ("", "Token time to live value not found"),
        ("X-metadata-token-ttl-seconds: 0\r\n", "Invalid time to live value provided for token: 0."),
        ("X-metadata-token-ttl-seconds: 21601\r\n", "between 1 and 21600"),
        ("X-metadata-token-ttl-seconds: x\r\n", "Invalid time to live"),
        ("X-metadata-token-ttl-seconds: 9\r\nX-forwarded-for: a\r\n", "X-Forwarded-For"),
    ] {
        let (status, _, body) = put(headers, TOKEN_PATH);
        assert_eq!(status, 400, "{headers}");
        assert!(body.contains(said), "{body}");
    }
    assert_eq!(put("X-metadata-token-ttl-seconds: 9\r\n", "/latest").0, 404);
    for (ttl, header) in TTL_HEADERS.iter().zip(TOKEN_HEADERS) {
        let (status, head, token) = put(&format!("{}: 60\r\n", ttl.to_lowercase()), TOKEN_PATH);
        assert_eq!(status, 200);
        assert!(head.contains(&format!("{ttl}: 60")), "{head}");
        assert_eq!(
            get(&service, "/latest/user-data", &format!("{header}: {token}\r\n")),
            (200, "hello".into())
        );
        let later = format!("GET / HTTP/1.1\r\n{header}: {token}\r\n\r\n");
        let answer = service.serve(later.as_bytes(), Instant::now() + Duration::from_secs(61));
        assert!(matches!(answer, Served::Answered { answer, .. } if answer.starts_with(b"HTTP/1.1 401")));
    }
}

#[test]
fn requests_may_come_in_pieces_and_one_after_the_other() {
    let service = service(Version::V1, false);
    let one = "GET /latest/user-data HTTP/1.1\r\nContent-Length: 3\r\n\r\nabc";
    for end in 0..one.len() {
        assert_eq!(service.serve(&one.as_bytes()[..end], Instant::now()), Served::Partial, "{end}");
    }
    let two = format!("{one}GET / HTTP/1.0\r\n\r\n");
    let first = service.serve(two.as_bytes(), Instant::now());
    assert!(matches!(first, Served::Answered { bytes, keep_alive: true, .. } if bytes == one.len()));
    let second = service.serve(&two.as_bytes()[one.len()..], Instant::now());
    assert!(matches!(second, Served::Answered { keep_alive: false, .. }));
    for wrong in [
        "x\r\n\r\n".to_owned(),
        "GET / HTTP/1.1\r\nContent-Length: 99999\r\n\r\n".into(),
        "GET / HTTP/1.1\r\nContent-Length: -1\r\n\r\n".into(),
        "GET / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n".into(),
        format!("GET /{} HTTP/1.1", "x".repeat(MAX_REQUEST_BYTES)),
        format!("GET / HTTP/1.1\r\n{}\r\n", "a: b\r\n".repeat(MAX_HEADERS + 1)),
    ] {
        assert_eq!(ask(&service, &wrong).0, 400, "{wrong:.60}");
    }
}

proptest! {
    #[test]
    fn any_bytes_are_answered_or_waited_for(bytes in prop::collection::vec(any::<u8>(), 0..3000), is_get in any::<bool>()) {
        let service = service(Version::V2, false);
        let bytes = if is_get { [b"GET /", &bytes[..]].concat() } else { bytes };
        match service.serve(&bytes, Instant::now()) {
            Served::Partial => prop_assert!(bytes.len() < MAX_REQUEST_BYTES),
            Served::Answered { bytes: taken, answer, .. } => {
                prop_assert!(taken <= bytes.len() && !answer.is_empty());
            }
        }
    }
}
