//! The protocols on sockets, for clients and servers: JSON lines, errors with kinds that programs
//! can match, and HTTP.
//!
//! Of our crates it imports `os` alone, and it must not know what is asked: requests, replies and
//! kinds of errors are types of the crates above. Every wait has a deadline and every line a bound;
//! a timeout, a peer that disconnected and a line that is too long are errors of their own.
//!
//! What the packets of the merge socket and of a capture say is not here, only how they are sent
//! ([`packets`]). Nor is COM2, whose lines a guest without an allocator has to
//! read (`guest/src/protocol`).
//!
//! Begin with [`lines`] (a stream of lines), then [`answer`] (a reply or a [`Refusal`]); for HTTP
//! with [`http::Server`].

pub mod answer;
pub mod http;
pub mod lines;
pub mod packets;

pub use answer::Refusal;
pub use lines::{LineBuffer, LineError, Lines, connect};
