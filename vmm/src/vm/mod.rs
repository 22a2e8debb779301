//! vm.

pub mod probe;
