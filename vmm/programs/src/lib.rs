//! The two programs of the `guest` crate that run inside guests: built by this crate's build
//! script, held here as bytes.
//!
//! It does not know what they do. Begin with `build.rs`, which calls cargo for a target without a C
//! library; the programs are in `guest/src/bin`.

/// The agent: a static Linux program, the `/init` of the images that are made here.
pub static AGENT: &[u8] = include_bytes!(env!("SAMEPAGE_AGENT"));

/// The built-in guest: an ELF file that is booted as a kernel.
pub static BUILT_IN_KERNEL: &[u8] = include_bytes!(env!("SAMEPAGE_KERNEL"));
