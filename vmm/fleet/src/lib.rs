//! Many VMs at once: a fleet of VM processes, what they are told to do, and the daemon that keeps them.
//!
//! Opens no KVM descriptor and maps no guest memory; everything goes through each VM's control socket, its
//! COM2 socket, and the host's /proc.

pub mod admission;
mod asker;
pub mod balloon;
pub mod check;
mod claim;
pub mod client;
pub mod daemon;
pub mod daemon_client;
pub mod diary;
pub mod down;
mod error;
pub mod fleet;
pub mod governor;
pub mod guest;
pub mod hands;
mod home;
pub mod ledger;
pub mod living;
pub mod management;
pub mod metrics;
mod observer;
pub mod page_types;
mod pledge;
mod policy_state;
pub mod post;
pub mod power;
pub mod preflight;
pub mod runtime;
pub mod shutdown;
pub mod spaces;
pub mod spec;
mod state;
pub mod status;
mod survey;
pub mod takeover;
pub mod target;
pub mod watch;

pub use error::HostError;
