//! Samepage: a small KVM hypervisor for memory.

pub mod api;
pub mod cli;
pub mod host;
pub mod image;
pub mod measure;
pub mod memory;
pub mod merge;
pub mod os;
pub mod overcommit;
pub mod vm;
