//! Many VMs at once: fleet files, VM processes, and the daemon that keeps them.
//!
//! Everything goes through each VM's control socket, its COM2 socket, and the host's `/proc`. It must not open a KVM
//! descriptor or map guest memory, so that a daemon that dies takes no guest with it; and it parses no command line and
//! prints nothing. What to do as memory gets short is decided in `overcommit`; here it is carried out.
//!
//! Begin with [`daemon`] (one fleet from start to end), then [`fleet`] (its guests), [`guest`] (one VM process) and
//! [`governor`] (looking and acting). [`spec`] is the fleet file, [`takeover`] what a later daemon does with guests that
//! run. `resources/docs/internals/fleet.md` tells it in order.

pub mod action_log;
pub mod actuator;
pub mod admission;
mod asker;
pub mod balloon;
pub mod check;
pub mod check_error;
pub mod checkpoints;
mod claim;
pub mod client;
pub mod daemon;
pub mod daemon_client;
mod difference;
pub mod down;
mod error;
#[cfg(test)]
mod fake_vm;
pub mod fleet;
pub mod governor;
pub mod guest;
mod home;
pub mod host_page;
pub mod images;
pub mod ledger;
mod lifetime;
pub mod living;
pub mod management;
pub mod metrics;
mod observer;
pub mod page_types;
mod pledge;
mod policy_state;
pub mod pool;
pub mod power;
pub mod preflight;
mod problem;
mod refusal;
pub mod runtime;
pub mod shutdown;
pub mod spaces;
pub mod spec;
mod state;
pub mod status;
mod survey;
pub mod takeover;
pub mod target;
pub mod vm_handle;
pub mod walk;
pub mod watch;

pub use error::HostError;
