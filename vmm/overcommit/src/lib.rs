//! Memory overcommit: which guests are admitted, which give way when memory gets short, in which
//! order.
//!
//! Everything here is a function of plain numbers. It must not know a VM, a socket or a guest's
//! memory: the daemon gathers [`view`]s, calls [`policy::step`], and carries out the [`action`]s.
//! The simulator does the same with a model. It opens no file: the host is read by `kernel_view`.
//!
//! Begin with [`policy`] (the order of actions), then [`memory_state`] (how short memory is),
//! [`allocation`] (what each guest is left) and [`admission`].
//! `resources/docs/internals/overcommit.md` says why each is as it is.
//!
//! Pages are 4096 bytes. Seconds are of a monotonic clock whose zero means nothing.

pub mod action;
pub mod admission;
pub mod allocation;
pub mod balloon_pacing;
pub mod capacity;
pub mod knobs;
pub mod ledger;
pub mod memory_state;
mod mib;
mod paging;
pub mod policy;
mod scene;
pub mod suspension;
mod throttling;
pub mod view;
