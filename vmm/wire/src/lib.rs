//! What is said over sockets, whoever says it: JSON lines, errors that programs can tell apart, and HTTP.
//!
//! It imports `os` alone of ours and must not know what is asked: requests, replies and kinds of errors are types of the
//! crates above, which serve and ask by what is here. Waiting has a deadline and a line has a bound, always; that
//! nothing came in time, that the peer hung up and that a line is too long are values of their own.
//!
//! The merge socket is not among it: its packets are words with descriptors (`vmm/merge/src/slab/wire.rs`). Nor is
//! COM2, whose lines a guest without an allocator has to read (`guest/src/protocol`).
//!
//! Begin with [`lines`] (a stream of lines), then [`answer`] (a reply or a [`Refusal`]); for HTTP with [`http::Server`].

pub mod answer;
pub mod http;
pub mod lines;

pub use answer::Refusal;
pub use lines::{LineBuffer, LineError, Lines, connect};
