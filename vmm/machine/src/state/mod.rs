//! The state of a VM besides its memory: saved from a paused VM, restored to one on which nothing
//! has run.
//!
//! The structures are our own and have versions: what was written by an older build is read by a
//! newer one. Of what is in them nothing is believed that KVM does not check: lengths are checked
//! here, rings by the devices.
//!
//! Begin with [`vcpu`]; [`chips`] is what KVM has once for a VM; [`mirror`] has KVM's registers by
//! name; [`msrs`] says which model-specific registers there are. `other_vm_tests.rs` has the
//! built-in guest go on in another VM.

pub(crate) mod chips;
pub(crate) mod container;
pub(crate) mod counters;
mod cpuid;
#[cfg(test)]
pub(crate) mod hostile;
mod mirror;
pub(crate) mod msrs;
#[cfg(test)]
mod other_vm_tests;
pub(crate) mod saved;
pub(crate) mod setup;
pub(crate) mod vcpu;

use thiserror::Error;

/// Why a VM's state cannot be taken, or given to another.
#[derive(Debug, Error)]
pub enum StateError {
    /// KVM refuses to read something.
    #[error("KVM does not tell a vCPU's or VM's {what}")]
    Get {
        /// What, as the call's name has it.
        what: &'static str,
        /// Its answer.
        #[source]
        source: kvm_ioctls::Error,
    },
    /// KVM refuses to write something.
    #[error("KVM does not take a vCPU's or VM's {what}")]
    Set {
        /// What, as the call's name has it.
        what: &'static str,
        /// Its answer.
        #[source]
        source: kvm_ioctls::Error,
    },
    /// A register that was there cannot be read now.
    #[error("model-specific register {index:#x} cannot be read")]
    MsrUnread {
        /// Its number.
        index: u32,
    },
    /// A register that cannot be given to another vCPU is not as it is at first.
    #[error(
        "model-specific register {index:#x} is {value:#x}, and this KVM gives no other vCPU that value: the guest uses what cannot be copied here"
    )]
    MsrReadOnly {
        /// Its number.
        index: u32,
        /// What is in it.
        value: u64,
    },
    /// A saved register is not taken.
    #[error("model-specific register {index:#x} cannot be set to {value:#x} on this host")]
    MsrRefused {
        /// Its number.
        index: u32,
        /// What was saved.
        value: u64,
    },
    /// The guest's CPUID has more than this host's.
    #[error(
        "the guest's processor has a feature that this host's has not: CPUID {function:#x}.{index}, e{register}x, bits {missing:#x}"
    )]
    Cpuid {
        /// The leaf.
        function: u32,
        /// The subleaf.
        index: u32,
        /// `a` to `d`.
        register: char,
        /// The bits.
        missing: u32,
    },
    /// More extended state than fits.
    #[error("the XSAVE area has {bytes} bytes, and this host's has {host}")]
    Xsave {
        /// What was saved.
        bytes: usize,
        /// What there is.
        host: usize,
    },
    /// A part has another length than it must.
    #[error("the {what} has {bytes} bytes: expected {expected}")]
    Length {
        /// Which.
        what: &'static str,
        /// What it has.
        bytes: usize,
        /// What it should.
        expected: usize,
    },
    /// A list has more entries than there can be.
    #[error("the {0} is too long")]
    TooLong(&'static str),
}

impl StateError {
    fn get(what: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> Self {
        move |source| Self::Get { what, source }
    }

    fn set(what: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> Self {
        move |source| Self::Set { what, source }
    }
}
