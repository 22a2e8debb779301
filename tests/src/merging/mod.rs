//! The bench of merging: engines against each other, on the same guests, in the same run.

mod accounting;
pub mod course;
pub mod figures;
pub mod ksm_tables;
pub mod setting;
pub mod table;
