//! Samepage's own merging: pages that are equal across guests of one trust domain are replaced by
//! pages of sealed slabs.
//!
//! An agent in each VM process ([`agent`]) learns from the log of writes which pages are quiet
//! ([`watcher`]), hashes them, and offers them to the hub in the host ([`hub`]), whose matchmaker
//! ([`matchmaker`], one for each [`domain`]) orders which agent publishes what and which merge with
//! it ([`merger`]). Only the agents touch guest memory.

pub mod agent;
mod breaks;
mod compaction;
pub mod counters;
mod credit;
mod domain;
pub mod engine;
mod hub;
mod image_slabs;
mod index;
pub mod matchmaker;
mod merger;
pub mod pins;
mod refusal;
mod shared_state;
pub mod statistics;
mod watcher;
mod wire;
mod yielding;

pub use counters::Counters;
pub use pins::Pins;
pub use refusal::{ErrorKind, Refusal};
pub use shared_state::Applicant;
pub use wire::OFFER_PAGES;
