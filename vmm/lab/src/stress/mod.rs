//! Stress: a fleet that is overcommitted on purpose, what is done to it, and what became of every page.

pub mod run;
pub mod scenario;
pub mod series;
pub mod verdict;
