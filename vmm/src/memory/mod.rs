//! memory.

pub mod ksm_stat;
pub mod pagemap;
pub mod remote;
