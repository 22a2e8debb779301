//! The files of an image.

pub(super) const KERNEL_FILE: &str = "vmlinux";
/// The kernel with its decompressor.
pub const PACKED_KERNEL_FILE: &str = "vmlinuz";
pub(super) const INITRD_FILE: &str = "initrd.cpio";
pub(super) const DESCRIPTION_FILE: &str = "image.json";
