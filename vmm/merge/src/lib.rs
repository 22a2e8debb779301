//! Merging the pages that guests have in common: the engines, behind one trait so that they can be
//! measured against each other on the same guests.
//!
//! An engine drives what merges; it knows a guest as "this process, these ranges" and must not know
//! fleets, devices or KVM. It maps no guest memory: what is done to pages is done by the `memory`
//! crate, inside each VM process. Marking guest RAM as mergeable is the VM process's own work and
//! comes before [`Engine::start`].
//!
//! Begin with [`Engine`], then [`slab`]: `agent.rs` in each VM process, `hub.rs`, `domain.rs` and
//! `matchmaker.rs` in the daemon, `wire.rs` between them. [`ksm`] is the host kernel's.
//! `resources/docs/internals/merging.md` has the whole.

mod engine;
mod error;
pub mod ksm;
pub mod off;
mod settled;
pub mod slab;

pub use engine::{Engine, Progress, SlabPages};
pub use error::EngineError;
pub use settled::Settling;
