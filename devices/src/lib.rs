//! Device models. Knows guest memory and queues, never KVM.
#![forbid(unsafe_code)]

/// Guest RAM as devices see it.
pub type GuestMemory = vm_memory::GuestMemoryMmap<()>;
