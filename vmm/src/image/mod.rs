//! image.

pub mod bzimage;
pub mod elf;
pub mod unpack;
pub mod vmlinux;
