//! Device models. Knows guest memory and queues, never KVM.
#![forbid(unsafe_code)]
