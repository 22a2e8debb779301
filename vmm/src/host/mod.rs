//! Many VMs at once: a fleet of VM processes, what they are told to do, and the daemon that keeps them.
//!
//! Opens no KVM descriptor and maps no guest memory; everything goes through each VM's control socket, its
//! COM2 socket, and the host's /proc.

pub mod balloon;
pub mod check;
pub mod client;
pub mod daemon;
mod error;
pub mod fleet;
pub mod guest;
pub mod runtime;
pub mod spaces;
pub mod spec;
pub mod status;

pub use error::HostError;
