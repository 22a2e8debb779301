//! What the API answers, before it is written as HTTP.

use std::fmt::Display;

use serde::Serialize;
use serde_json::json;
use wire::http::{self, Status};

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
}

impl From<Response> for http::Response {
    fn from(response: Response) -> Self {
        let Response { status, body } = response;
        let headers = vec![("Server", "Samepage API")];
        Self { status, content_type: "application/json", headers, body, head_only: false }
    }
}
