//! Stress: a fleet that is overcommitted on purpose, phases of load on it, and the fate of every
//! page.

pub mod run;
pub mod scenario;
pub mod series;
pub mod verdict;
