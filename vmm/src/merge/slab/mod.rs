//! Samepage's own merging: pages that are equal across guests of one trust domain are replaced by pages of sealed slabs.
//!
//! An agent in each VM process ([`agent`]) hashes the pages that nobody shares yet and offers them to the matchmaker in the host
//! ([`engine`]), which says who publishes what ([`matchmaker`]) and who merges with it. Only the agents touch guest memory.

pub mod agent;
pub mod engine;
pub mod matchmaker;
mod wire;
