//! Device models: what a guest finds behind its ports and its MMIO windows.
//!
//! This crate knows guest memory, virtqueues and event descriptors. It knows no hypervisor interface, maps nothing and
//! contains no unsafe code; whoever builds the VM hands in the memory, the interrupt lines and the sinks.
//!
//! *Architecture invariant:* whatever a guest writes, no device panics, blocks for long or returns an error
//! that would stop the VM. Guest mistakes are counted and reported at a limited rate ([`warn::Limited`]), and
//! the descriptor they came with is completed.
#![forbid(unsafe_code)]

pub mod bus;
#[cfg(test)]
mod hostile;
pub mod interrupt;
pub mod legacy;
pub mod reclaim;
pub mod virtio;
pub mod warn;

/// The guest's RAM as every device sees it.
///
/// The one place that picks the concrete type, so that a dirty bitmap can be put in (`GuestMemoryMmap<B>`)
/// without touching a device.
pub type GuestMemory = vm_memory::GuestMemoryMmap<()>;
