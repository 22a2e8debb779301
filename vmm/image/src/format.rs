//! Recognises a file by its first bytes, so that a disk image, a save file, or a packed file is not
//! taken for raw memory or for a raw disk.
//!
//! A raw file has no header and may begin with anything, but hardly with these bytes; a file that
//! is not recognised counts as raw.

use std::fmt;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

/// The bytes at the beginning that suffice: the last magic number is at 32,769, in an ISO image.
pub const HEAD_BYTES: usize = 32 * 1024 + 8;

/// A format that is not raw.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Format {
    /// Its name, as a sentence has it: "a qcow2 disk image".
    pub name: &'static str,
    /// Its use.
    pub class: Class,
}

/// The use of a format, which decides what to do with a file of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// A disk whose sectors are anywhere in the file; its name for qemu-img.
    Disk(&'static str),
    /// An ELF core: memory in segments.
    Core,
    /// Pages of memory, packed or with holes; how to make raw memory or a core of it.
    Dump(&'static str),
    /// A VM's state, with pages between other data.
    SavedVm(&'static str),
    /// A file packed by a program; the program that unpacks it.
    Packed(&'static str),
    /// An archive of files.
    Archive,
    /// A whole disk, which is raw: encrypted, or a file system that is read only.
    RawDisk,
    /// A program, an object, a kernel.
    Program,
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name)
    }
}

/// Magic numbers: offset, bytes, format. The first match counts.
const MAGIC: &[(usize, &[u8], Format)] = &[
    (0, b"QFI\xfb\0\0\0\x01", disk("a qcow disk image", "qcow")),
    (0, b"QFI\xfb", disk("a qcow2 disk image", "qcow2")),
    (0, b"KDMV", disk("a VMDK disk image", "vmdk")),
    (0, b"COWD", disk("a VMDK disk image", "vmdk")),
    (0, b"# Disk DescriptorFile", disk("the descriptor of a VMDK disk image", "vmdk")),
    (0, b"vhdxfile", disk("a VHDX disk image", "vhdx")),
    (0, b"conectix", disk("a VHD disk image", "vpc")),
    (0x40, b"\x7f\x10\xda\xbe", disk("a VDI disk image", "vdi")),
    (0, b"QED\0", disk("a QED disk image", "qed")),
    (0, b"WithoutFreeSpace", disk("a Parallels disk image", "parallels")),
    (0, b"WithouFreSpacExt", disk("a Parallels disk image", "parallels")),
    (
        0,
        b"KDUMP   ",
        dump(
            "a dump compressed by kdump",
            "`crash` reads it; makedumpfile -E makes an ELF core, and so does the hypervisor if it is asked for an uncompressed dump",
        ),
    ),
    (0, b"DISKDUMP", dump("a dump compressed by diskdump", "makedumpfile -E makes an ELF core")),
    (
        0,
        b"makedumpfile\0",
        dump("a flattened dump of makedumpfile", "`makedumpfile -R CORE < FILE` puts it together again"),
    ),
    (0, b"PAGEDUMP", dump("a Windows crash dump", "dump the VM again: uncompressed ELF or raw memory")),
    (0, b"PAGEDU64", dump("a Windows crash dump", "dump the VM again: uncompressed ELF or raw memory")),
    (
        0,
        b"EMiL\x01",
        dump(
            "a LiME dump",
            "take it again with format=padded (raw), or convert it, for each range has a header",
        ),
    ),
    (0, b"EMiL\x02", dump("an AVML dump, compressed", "`avml-convert` makes a raw one")),
    (
        0,
        b"LibvirtQemudSave",
        saved("a libvirt save file", "`virsh restore` the VM, then `virsh dump --memory-only VM CORE`"),
    ),
    (
        0,
        b"LibvirtQemudPart",
        saved(
            "a libvirt save file that is not whole",
            "save the VM again; then `virsh dump --memory-only VM CORE` of the running one",
        ),
    ),
    (
        0,
        b"QEVM",
        saved(
            "a migration stream of QEMU",
            "load it, then have QEMU's monitor write raw memory: `pmemsave 0 SIZE \"FILE\"`, or a core: `dump-guest-memory FILE`",
        ),
    ),
    (
        2,
        b"\x64\x86\x84\x19\x10\x07",
        saved("the state file of a Firecracker snapshot", "its memory file, beside it, is raw"),
    ),
    (
        2,
        b"\xaa\xaa\x84\x19\x10\x07",
        saved("the state file of a Firecracker snapshot", "its memory file, beside it, is raw"),
    ),
    (
        0,
        b"\x7fVirtualBox SavedState",
        saved(
            "a saved state of VirtualBox",
            "`VBoxManage debugvm VM dumpvmcore` of the running VM makes an ELF core",
        ),
    ),
    (0, b"\xd0\xbe\xd2\xbe", saved("a state file of VMware", "its memory file, .vmem, is raw")),
    (0, b"\xd2\xbe\xd2\xbe", saved("a state file of VMware", "its memory file, .vmem, is raw")),
    (0, b"\xd3\xbe\xd3\xbe", saved("a state file of VMware", "its memory file, .vmem, is raw")),
    (0, b"\xd1\xba\xd1\xba", saved("a state file of VMware", "its memory file, .vmem, is raw")),
    (0, b"\x1f\x8b\x08", packed("compressed by gzip", "gzip -dc")),
    (0, b"\xfd7zXZ\0", packed("compressed by xz", "xz -dc")),
    (0, b"\x28\xb5\x2f\xfd", packed("compressed by zstd", "zstd -dc")),
    (0, b"\x04\x22\x4d\x18", packed("compressed by lz4", "lz4 -dc")),
    (0, b"\x02\x21\x4c\x18", packed("compressed by lz4", "lz4 -dc")),
    (4, b"1AY&SY", packed("compressed by bzip2", "bzip2 -dc")),
    (0, b"\xff\x06\0\0sNaPpY", packed("compressed by snappy", "snzip -dc")),
    (0, b"PK\x03\x04", Format { name: "a zip archive", class: Class::Archive }),
    (0, b"7z\xbc\xaf\x27\x1c", Format { name: "a 7z archive", class: Class::Archive }),
    (257, b"ustar", Format { name: "a tar archive", class: Class::Archive }),
    (0, b"LUKS\xba\xbe", Format { name: "a LUKS volume, encrypted", class: Class::RawDisk }),
    (32_769, b"CD001", Format { name: "an ISO 9660 image", class: Class::RawDisk }),
    (0x202, b"HdrS", Format { name: "a Linux kernel (bzImage)", class: Class::Program }),
];

const fn disk(name: &'static str, called: &'static str) -> Format {
    Format { name, class: Class::Disk(called) }
}

const fn dump(name: &'static str, advice: &'static str) -> Format {
    Format { name, class: Class::Dump(advice) }
}

const fn saved(name: &'static str, advice: &'static str) -> Format {
    Format { name, class: Class::SavedVm(advice) }
}

const fn packed(name: &'static str, by: &'static str) -> Format {
    Format { name, class: Class::Packed(by) }
}

impl Format {
    /// The format of a file that begins with `head`, of [`HEAD_BYTES`] if it is that long; None if
    /// it may be raw.
    pub fn of(head: &[u8]) -> Option<Self> {
        if head.starts_with(&super::elf::MAGIC) {
            const TYPE_CORE: u8 = 4;
            // The low byte of e_type, where the byte order in e_ident puts it.
            let kind = if head.get(5) == Some(&2) { head.get(17) } else { head.get(16) };
            return Some(match kind {
                Some(&TYPE_CORE) => Self { name: "an ELF core", class: Class::Core },
                _ => Self { name: "an ELF program or kernel", class: Class::Program },
            });
        }
        let is_there = |(at, magic, _): &&(usize, &[u8], Self)| {
            head.get(*at..).is_some_and(|bytes| bytes.starts_with(magic))
        };
        MAGIC.iter().find(is_there).map(|(.., format)| *format)
    }

    /// Of an open file.
    ///
    /// # Errors
    /// It cannot be read.
    pub fn of_file(file: &File) -> io::Result<Option<Self>> {
        let mut head = vec![0; HEAD_BYTES];
        let mut done = 0;
        while done < head.len() {
            match file.read_at(&mut head[done..], done as u64) {
                Ok(0) => break,
                Ok(read) => done += read,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(Self::of(&head[..done]))
    }

    /// What to do with a file of this format where raw memory is expected. The advice never changes
    /// the file.
    pub fn advice_for_memory(&self) -> String {
        match self.class {
            Class::Disk(_) | Class::RawDisk => {
                "it holds a disk, not memory; of a running VM measure its process (--pid), or a dump"
                    .to_owned()
            }
            Class::Core => "its segments are read".to_owned(),
            Class::Dump(advice) | Class::SavedVm(advice) => advice.to_owned(),
            Class::Packed(by) => format!("`{by} FILE > RAW` unpacks it into a file of its own"),
            Class::Archive => "take the memory image out of it first".to_owned(),
            Class::Program => "of a running VM measure its process (--pid), or a dump".to_owned(),
        }
    }

    /// Why a guest may not write, or read, a file of this format as a drive; None if it may. As raw
    /// sectors a guest would see the format's own bytes, and by writing destroy its contents.
    pub fn refusal_as_drive(&self, read_only: bool) -> Option<String> {
        match self.class {
            Class::Disk(called) => Some(format!(
                "`qemu-img convert -f {called} -O raw FILE RAW` makes a raw one, and leaves it as it is"
            )),
            Class::RawDisk => None,
            // Some guests read such a file as it is, byte for byte: reading does no harm.
            _ if read_only => None,
            Class::Packed(by) => Some(format!(
                "`{by} FILE > RAW` unpacks it; a guest may have it as it is if it only reads it (FILE,ro)"
            )),
            Class::Core | Class::Dump(_) | Class::SavedVm(_) | Class::Archive | Class::Program => {
                Some("a guest may have it as it is if it only reads it (FILE,ro)".to_owned())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn head(at: usize, magic: &[u8]) -> Vec<u8> {
        let mut head = vec![0; HEAD_BYTES];
        head[at..at + magic.len()].copy_from_slice(magic);
        head
    }

    #[test]
    fn each_magic_number_is_known_and_lies_in_the_head() {
        for (at, magic, format) in MAGIC {
            assert_eq!(Format::of(&head(*at, magic)), Some(*format), "{format}");
            // Cut short within the magic number it is not recognised.
            assert_ne!(Format::of(&head(*at, magic)[..at + 2]), Some(*format), "{format}");
            assert!(!format.advice_for_memory().is_empty());
        }
    }

    #[test]
    fn cores_are_distinguished_from_programs() {
        let elf = |kind, order| {
            let mut head = head(0, b"\x7fELF\x02");
            head[5] = order;
            head[if order == 2 { 17 } else { 16 }] = kind;
            Format::of(&head).unwrap().class
        };
        assert_eq!(
            [elf(4, 1), elf(4, 2), elf(2, 1), elf(3, 1)],
            [Class::Core, Class::Core, Class::Program, Class::Program]
        );
    }

    #[test]
    fn raw_files_have_no_format() {
        // Nothing, zeros, a boot sector, the interrupt vectors of a guest, ext4's superblock.
        let boot = head(510, &[0x55, 0xaa]);
        let vectors: Vec<u8> = [0x53, 0xff, 0, 0xf0].repeat(HEAD_BYTES / 4);
        for raw in [vec![], vec![0; HEAD_BYTES], boot, vectors, head(1024 + 56, &[0x53, 0xef])] {
            assert_eq!(Format::of(&raw), None);
        }
    }

    #[test]
    fn what_writing_would_destroy_is_no_drive() {
        let refusal =
            |at, magic, read_only| Format::of(&head(at, magic)).unwrap().refusal_as_drive(read_only);
        for read_only in [true, false] {
            assert!(refusal(0, b"QFI\xfb\0\0\0\x03", read_only).unwrap().contains("-f qcow2 -O raw"));
            assert_eq!(refusal(32_769, b"CD001", read_only), None);
            assert_eq!(refusal(0, b"LUKS\xba\xbe", read_only), None);
        }
        assert!(refusal(0, b"\xfd7zXZ\0", false).unwrap().contains("xz -dc"));
        assert_eq!(refusal(0, b"\xfd7zXZ\0", true), None);
    }
}
