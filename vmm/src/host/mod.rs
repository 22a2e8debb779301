//! Many VMs at once: a fleet of VM processes, what they are told to do, and the daemon that keeps them.
//!
//! Opens no KVM descriptor and maps no guest memory; everything goes through each VM's control socket, its
//! COM2 socket, and the host's /proc.

pub mod admission;
mod asker;
pub mod balloon;
pub mod check;
pub mod client;
pub mod daemon;
pub mod diary;
mod error;
pub mod experiment;
pub mod fleet;
pub mod governor;
pub mod guest;
mod hands;
pub mod ledger;
pub mod metrics;
mod observer;
pub mod page_types;
mod policy_state;
pub mod post;
pub mod runtime;
pub mod spaces;
pub mod spec;
pub mod status;
pub mod stress;

pub use error::HostError;
