//! Device models: what a guest finds behind its ports and its MMIO windows.
//!
//! This crate knows guest memory, virtqueues and event descriptors. It must not know a hypervisor
//! interface, maps nothing and contains no unsafe code; memory, interrupt lines and sinks are
//! passed in by the builder of the VM.
//!
//! Begin with [`bus`] (ranges of ports or addresses to devices, never overlapping) and
//! `legacy/pvpanic.rs` (the smallest device); then [`virtio`]: the MMIO transport, the one loop
//! over rings, the devices (rng, balloon, block). [`reclaim`] is the trait through which a device
//! gives memory back, [`in_flight`] the one by which it says what it is writing, [`warn`] counts
//! what a guest does wrong and says so at a limited rate.
//!
//! *Architecture invariant:* whatever a guest writes, no device panics, blocks for long or returns
//! an error that would stop the VM. Guest errors are counted and reported at a limited rate
//! ([`warn::Limited`]), and the descriptor they came with is completed.
#![forbid(unsafe_code)]

pub mod bus;
#[cfg(test)]
mod hostile;
pub mod in_flight;
pub mod interrupt;
pub mod legacy;
mod lock;
pub mod rate_limiter;
pub mod reclaim;
pub mod state;
pub mod virtio;
pub mod warn;

/// The guest's RAM as every device sees it, with a bit for each page that is set after the VMM
/// itself has written there (KVM knows of what the guest writes, and of nothing else).
///
/// The one place that picks the concrete type. Writing by [`vm_memory::Bytes`] or a volatile slice
/// sets the bits; writing by a raw pointer does not.
pub type GuestMemory = vm_memory::GuestMemoryMmap<vm_memory::bitmap::AtomicBitmap>;
