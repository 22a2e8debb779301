//! The field's standard experiments: a plan of fixed dimensions, run again and again on fleets of
//! its own.
//!
//! A *plan* is a TOML file. Its dimensions make *points*: an engine, a variant of the guests, a
//! number of them. One run of one point is a *trial*; a *repetition* is a trial of every point.
//! Each trial has a fleet of its own that is gone when it ends, so that the order of trials does
//! not matter and an interrupt costs one of them. What a page holds follows from the seed.

pub mod catalogue;
mod clone_fanout;
mod error;
mod file_pages;
mod huge_pages;
mod ideal;
mod identical;
mod inflate_deflate;
pub mod journal;
mod kernel;
mod mixed;
mod page_cache;
pub mod plan;
pub mod run;
mod scanner;
mod shootdown;
mod side_channel;
mod stage;
pub mod summary;
mod thrashing;
mod threads;
pub mod trial;

pub use error::ExperimentError;
