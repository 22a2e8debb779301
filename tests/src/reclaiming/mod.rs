//! The bench of taking memory from a guest: by its balloon, by swap, by both, against a guest that
//! never had it.

pub mod course;
pub mod point;
pub mod table;
