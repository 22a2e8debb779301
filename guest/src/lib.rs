//! What runs inside a guest, and what the host must know about it.
//!
//! The same control protocol and the same memory workloads run in two guests: the built-in
//! bare-metal kernel (`src/bin/kernel`) and the `/init` of a Linux guest (`src/bin/agent`). This
//! library holds what they share, and what the host needs to drive them and to check their memory:
//!
//! - [`protocol`]: the lines that travel over the second serial port;
//! - [`content`]: what a page holds, as a function of its key;
//! - [`layout`]: which page has which key;
//! - [`page_type`]: what a guest's kernel uses its frames for;
//! - [`workload`]: filling, churning, verifying and freeing an array of pages, [`in_use`] which of
//!   them it uses;
//! - [`histogram`] and [`tsc`]: how long its writes take;
//! - [`virtio`]: the built-in guest's balloon driver, over registers and memory that its caller
//!   provides;
//! - [`service`]: commands in, replies out, over a workload;
//! - [`exec`]: how the host has a command run.
//!
//! It needs neither `std` nor an allocator, imports nothing of ours and must not know a VMM or a
//! host. Begin with [`protocol`] and [`service`]; the programs are in `src/bin`.
#![no_std]

#[cfg(test)]
extern crate std;

pub mod content;
pub mod exec;
pub mod histogram;
pub mod in_use;
pub mod ip;
pub mod layout;
pub mod page_type;
pub mod protocol;
pub mod root;
pub mod service;
pub mod tsc;
pub mod virtio;
pub mod workload;
