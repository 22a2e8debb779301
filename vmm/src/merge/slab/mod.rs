//! Samepage's own merging: pages that are equal across guests of one trust domain are replaced by pages of sealed slabs.

pub mod matchmaker;
