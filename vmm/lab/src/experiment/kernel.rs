//! The kernel that the guests of a variant start from, and where it is decompressed.

use std::path::{Path, PathBuf};

use super::plan::{Plan, Variant};
use image::PACKED_KERNEL_FILE;
use image::vmlinux::{self, Kernel};
use machine::Unpack;

/// A kernel and where it is decompressed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct VariantKernel {
    /// None is the built-in guest.
    pub(super) path: Option<PathBuf>,
    pub(super) unpack: Unpack,
}

/// The kernel of `variant`. With KASLR it is the plan's, or else the `vmlinuz` beside it, as
/// `samepage image` leaves it there.
///
/// # Errors
/// There is none with a decompressor, as a clause for people.
pub(super) fn of(plan: &Plan, variant: &Variant) -> Result<VariantKernel, String> {
    let Some(path) = &plan.guest.kernel else { return Ok(VariantKernel::default()) };
    if variant.kaslr != Some(true) {
        return Ok(VariantKernel { path: Some(path.clone()), unpack: Unpack::Host });
    }
    let beside = path.with_file_name(PACKED_KERNEL_FILE);
    match [path, &beside].into_iter().find(|path| has_decompressor(path)) {
        Some(path) => Ok(VariantKernel { path: Some(path.clone()), unpack: Unpack::Guest }),
        None => Err(format!(
            "{} has no decompressor, and there is no {PACKED_KERNEL_FILE} beside it: `samepage image` makes both",
            path.display()
        )),
    }
}

fn has_decompressor(path: &Path) -> bool {
    matches!(vmlinux::open(path, Unpack::Guest), Ok(Kernel::BzImage(_)))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::super::catalogue;
    use super::*;

    /// The parts of a bzImage that are read: its magic, its version and that it is whole.
    fn bzimage() -> Vec<u8> {
        let mut file = vec![0u8; 1024 + 64];
        file[0x1f1] = 1;
        file[0x1fe..0x200].copy_from_slice(&[0x55, 0xaa]);
        file[0x202..0x206].copy_from_slice(b"HdrS");
        file[0x206..0x208].copy_from_slice(&0x20fu16.to_le_bytes());
        file[0x236] = 1;
        file
    }

    #[test]
    fn kaslr_takes_a_kernel_with_a_decompressor() {
        let dir = tempfile::tempdir().unwrap();
        let [unpacked, packed] = ["vmlinux", "vmlinuz"].map(|name| dir.path().join(name));
        let kaslr = |on| Variant { kaslr: Some(on), ..Variant::default() };
        let mut plan = catalogue::find("identical-vms").unwrap();
        assert_eq!(of(&plan, &kaslr(true)), Ok(VariantKernel::default()));
        plan.set_linux(&unpacked, None);
        let why = of(&plan, &kaslr(true)).unwrap_err();
        assert!(why.contains("samepage image"), "{why}");
        let host = VariantKernel { path: Some(unpacked.clone()), unpack: Unpack::Host };
        assert_eq!(of(&plan, &kaslr(false)), Ok(host));
        fs::write(&packed, bzimage()).unwrap();
        let guest = VariantKernel { path: Some(packed.clone()), unpack: Unpack::Guest };
        assert_eq!(of(&plan, &kaslr(true)), Ok(guest.clone()));
        plan.set_linux(&packed, None);
        assert_eq!(of(&plan, &kaslr(true)), Ok(guest));
    }
}
