//! Puts a kernel, its initrd and its command line into guest memory, as Linux's x86 boot protocol has it.

use std::io::{self, Cursor, Read, Seek, SeekFrom};
use std::path::Path;

use devices::GuestMemory;
use devices::legacy::power::{RESET_PORT, RESET_VALUE};
use linux_loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use linux_loader::elf::{Elf64_Ehdr, Elf64_Phdr, PT_LOAD};
use linux_loader::loader::elf::Elf;
use linux_loader::loader::{BzImage, KernelLoader};
use vm_memory::{ByteValued, Bytes, GuestAddress, ReadVolatile};

use super::config::VmConfig;
use super::error::VmError;
use super::platform::*;
use image::vmlinux::{self, Kernel};
use memory::PAGE_BYTES;
use memory::file::MappedFile;
use memory::layout::{self, Stretch};
use os::named_file;
use programs::BUILT_IN_KERNEL;

const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;
const BOOT_FLAG: u16 = 0xaa55;
const HEADER_MAGIC: u32 = 0x5372_6448;
/// "Some other loader", for those without a number of their own.
const LOADER_UNKNOWN: u8 = 0xff;
/// Offset of the 64-bit entry in a bzImage's protected-mode part.
const BZIMAGE_ENTRY64: u64 = 0x200;
/// What is asked of one read(2).
const READ_BYTES: usize = 1 << 30;

/// Loads what the VM of `config` starts from, and returns the 64-bit entry point.
pub fn load(memory: &GuestMemory, config: &VmConfig, cmdline: &str, acpi_root: u64) -> Result<u64, VmError> {
    let stretches = layout::stretches(config.memory_bytes);
    let low = stretches.first().map_or(0, |s| s.bytes);
    let loaded = match &config.kernel {
        None => load_elf(memory, &mut Cursor::new(BUILT_IN_KERNEL), low)?,
        Some(path) => match vmlinux::open(path, config.unpack)? {
            // By way of a mapping: one copy, by the fastest instructions there are, where read(2) under emulation
            // copies a byte at a time.
            Kernel::Elf(mut image) => match image.file().map(MappedFile::new).and_then(Result::ok) {
                Some(mut file) => load_elf(memory, &mut file, low)?,
                None => load_elf(memory, &mut image, low)?,
            },
            Kernel::BzImage(bytes) => load_bzimage(memory, &bytes, low)?,
        },
    };
    let mut header = loaded.header;
    header.type_of_loader = LOADER_UNKNOWN;
    header.cmd_line_ptr = CMDLINE as u32;
    header.cmdline_size = write_cmdline(memory, cmdline)?;
    if let Some(path) = &config.initrd {
        let limit = match u64::from(header.initrd_addr_max) {
            0 => low,
            max => low.min(max + 1),
        };
        (header.ramdisk_image, header.ramdisk_size) = load_initrd(memory, path, loaded.end, limit)?;
    }
    write_params(memory, header, &stretches, acpi_root)?;
    memory.write_slice(RESET_CODE, GuestAddress(RESET_VECTOR)).map_err(VmError::BootData)?;
    Ok(loaded.entry)
}

/// What is found where the BIOS would begin, in real mode. A kernel that jumps there (Linux with `reboot=bios`, or where it
/// believes that nothing else resets) wants a reset: by ACPI's register, and by the keyboard controller.
const RESET_CODE: &[u8] = &[
    0xba,
    (RESET_PORT & 0xff) as u8,
    (RESET_PORT >> 8) as u8, // mov dx, RESET_PORT
    0xb0,
    RESET_VALUE, // mov al, RESET_VALUE
    0xee,        // out dx, al
    0xb0,
    0xfe, // mov al, 0xfe
    0xe6,
    0x64, // out 0x64, al
    0xf4, // hlt
    0xeb,
    0xfd, // jmp to the hlt
];
const _: () = assert!(RESET_VECTOR + RESET_CODE.len() as u64 <= HIGH_START);

struct Loaded {
    entry: u64,
    /// First guest-physical address after everything the kernel needs at start.
    end: u64,
    header: setup_header,
}

fn load_elf<F: Read + ReadVolatile + Seek>(
    memory: &GuestMemory,
    image: &mut F,
    low: u64,
) -> Result<Loaded, VmError> {
    let result = Elf::load(memory, None, image, Some(GuestAddress(HIGH_START)));
    // What the loader cannot write lies above the guest's memory.
    let unwritable = linux_loader::loader::Error::Elf(linux_loader::loader::elf::Error::ReadKernelImage);
    let loaded = match result {
        Err(e) if e == unwritable => {
            return Err(VmError::KernelFit { end: elf_end(image).unwrap_or(low + 1), ram: low });
        }
        other => other.map_err(VmError::Load)?,
    };
    if loaded.kernel_end > low {
        return Err(VmError::KernelFit { end: loaded.kernel_end, ram: low });
    }
    Ok(Loaded { entry: loaded.kernel_load.0, end: loaded.kernel_end, header: elf_header() })
}

/// An ELF file has no setup header: what Linux needs of one.
fn elf_header() -> setup_header {
    setup_header { boot_flag: BOOT_FLAG, header: HEADER_MAGIC, ..Default::default() }
}

/// Where the last loadable segment ends, for the message when it is too far.
fn elf_end<F: Read + Seek>(image: &mut F) -> Option<u64> {
    let mut file = Elf64_Ehdr::default();
    image.rewind().ok()?;
    image.read_exact(file.as_mut_slice()).ok()?;
    image.seek(SeekFrom::Start(file.e_phoff)).ok()?;
    let mut end = None;
    for _ in 0..file.e_phnum {
        let mut segment = Elf64_Phdr::default();
        image.read_exact(segment.as_mut_slice()).ok()?;
        if segment.p_type == PT_LOAD {
            end = end.max(segment.p_paddr.checked_add(segment.p_memsz));
        }
    }
    end
}

fn load_bzimage(memory: &GuestMemory, bytes: &[u8], low: u64) -> Result<Loaded, VmError> {
    let loaded = BzImage::load(memory, None, &mut Cursor::new(bytes), Some(GuestAddress(HIGH_START)))
        .map_err(|source| match bytes.len() as u64 + HIGH_START > low {
            true => VmError::KernelFit { end: bytes.len() as u64 + HIGH_START, ram: low },
            false => VmError::Load(source),
        })?;
    let header = loaded.setup_header.unwrap_or_default();
    // The decompressor begins by moving itself to the end of the `init_size` bytes from the preferred address on. From there it unpacks
    // the kernel to their beginning, or with KASLR to any aligned place in RAM of that size that neither the initrd, the boot data nor
    // the decompressor itself overlaps; where there is none it stays, and the virtual addresses alone are random.
    let end = loaded.kernel_end.max(header.pref_address.saturating_add(header.init_size.into()));
    if end > low {
        return Err(VmError::KernelFit { end, ram: low });
    }
    Ok(Loaded { entry: loaded.kernel_load.0 + BZIMAGE_ENTRY64, end, header })
}

/// Whether a kernel could be given this command line.
///
/// # Errors
/// It is too long, or holds a zero.
pub fn check_cmdline(cmdline: &str) -> Result<(), VmError> {
    if cmdline.len() >= CMDLINE_BYTES {
        return Err(VmError::CmdlineLength { bytes: cmdline.len() });
    }
    if cmdline.bytes().any(|b| b == 0) {
        return Err(VmError::CmdlineZero);
    }
    Ok(())
}

fn write_cmdline(memory: &GuestMemory, cmdline: &str) -> Result<u32, VmError> {
    check_cmdline(cmdline)?;
    memory.write_slice(cmdline.as_bytes(), GuestAddress(CMDLINE)).map_err(VmError::BootData)?;
    memory.write_obj(0u8, GuestAddress(CMDLINE + cmdline.len() as u64)).map_err(VmError::BootData)?;
    Ok(cmdline.len() as u32)
}

/// Puts the initrd as high as it may lie, so that it is out of the kernel's way. Returns address and size.
fn load_initrd(memory: &GuestMemory, path: &Path, floor: u64, limit: u64) -> Result<(u32, u32), VmError> {
    let unreadable = |source| VmError::Initrd { path: path.into(), source };
    let (mut file, meta) = named_file::regular(path).map_err(unreadable)?;
    let (bytes, room) = (meta.len(), limit.saturating_sub(floor.next_multiple_of(PAGE_BYTES)));
    if bytes == 0 {
        return Err(unreadable(std::io::Error::other("it is empty")));
    }
    if bytes.next_multiple_of(PAGE_BYTES) > room {
        return Err(VmError::InitrdFit { path: path.into(), bytes, room });
    }
    let at = (limit - bytes) & !(PAGE_BYTES - 1);
    read_into(memory, at, &mut file, bytes).map_err(unreadable)?;
    Ok((at as u32, bytes as u32))
}

/// Reads `bytes` bytes into guest memory from `at` on: in parts, for read(2) gives 2 GiB less a page at the most.
fn read_into(memory: &GuestMemory, at: u64, from: &mut impl ReadVolatile, bytes: u64) -> io::Result<()> {
    let mut done = 0;
    while done < bytes {
        let part = usize::try_from(bytes - done).unwrap_or(READ_BYTES).min(READ_BYTES);
        match memory.read_volatile_from(GuestAddress(at + done), from, part) {
            Ok(0) => {
                let ended = format!("it ended after {done} of {bytes} bytes: it was cut short meanwhile");
                return Err(io::Error::new(io::ErrorKind::UnexpectedEof, ended));
            }
            Ok(read) => done += read as u64,
            Err(error) => return Err(io::Error::other(error)),
        }
    }
    Ok(())
}

fn write_params(
    memory: &GuestMemory,
    hdr: setup_header,
    stretches: &[Stretch],
    acpi_root: u64,
) -> Result<(), VmError> {
    let mut params = boot_params { hdr, acpi_rsdp_addr: acpi_root, ..Default::default() };
    let mut add = |addr: u64, end: u64, r#type: u32| {
        let slot = usize::from(params.e820_entries);
        params.e820_table[slot] = boot_e820_entry { addr, size: end - addr, r#type };
        params.e820_entries += 1;
    };
    for s in stretches {
        if s.gpa == 0 {
            add(0, LOW_END, E820_RAM);
            add(LOW_END, HIGH_START, E820_RESERVED);
            add(HIGH_START, s.bytes, E820_RAM);
        } else {
            add(s.gpa, s.gpa + s.bytes, E820_RAM);
        }
    }
    memory.write_slice(params.as_slice(), GuestAddress(BOOT_PARAMS)).map_err(VmError::BootData)
}

#[cfg(test)]
mod tests {
    use super::*;
    use memory::layout;
    use memory::ram::{Backing, Ram};

    #[test]
    fn a_command_line_is_bounded_and_ends_with_zero() {
        let ram = Ram::new(16 << 20, Backing::Anonymous).unwrap();
        assert_eq!(write_cmdline(ram.memory(), "quiet").unwrap(), 5);
        let long = "x".repeat(CMDLINE_BYTES);
        assert!(matches!(write_cmdline(ram.memory(), &long), Err(VmError::CmdlineLength { bytes: 2048 })));
        assert!(matches!(write_cmdline(ram.memory(), "a\0b"), Err(VmError::CmdlineZero)));
        let mut back = [1u8; 6];
        ram.memory().read_slice(&mut back, GuestAddress(CMDLINE)).unwrap();
        assert_eq!(&back, b"quiet\0");
    }

    #[test]
    fn an_initrd_lies_at_the_top_and_must_fit() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("initrd");
        std::fs::write(&path, vec![7u8; 10_000]).unwrap();
        let ram = Ram::new(16 << 20, Backing::Anonymous).unwrap();
        let (at, bytes) = load_initrd(ram.memory(), &path, 1 << 20, 16 << 20).unwrap();
        assert_eq!(bytes, 10_000);
        assert!(u64::from(at) + 10_000 <= 16 << 20 && at.is_multiple_of(4096));
        let too_small = load_initrd(ram.memory(), &path, (16 << 20) - 8192, 16 << 20);
        assert!(matches!(too_small, Err(VmError::InitrdFit { .. })));
        assert!(matches!(load_initrd(ram.memory(), dir.path(), 0, 1 << 20), Err(VmError::Initrd { .. })));
    }

    /// Gives as little as it likes, as read(2) may.
    struct Trickle(u64);

    impl ReadVolatile for Trickle {
        fn read_volatile<B: vm_memory::bitmap::BitmapSlice>(
            &mut self,
            buffer: &mut vm_memory::VolatileSlice<B>,
        ) -> Result<usize, vm_memory::VolatileMemoryError> {
            let count = (buffer.len() as u64).min(1000).min(self.0);
            self.0 -= count;
            buffer.subslice(0, count as usize)?.write_slice(&vec![7; count as usize], 0)?;
            Ok(count as usize)
        }
    }

    #[test]
    fn what_comes_in_parts_is_read_whole_and_what_ends_early_is_said() {
        let ram = Ram::new(16 << 20, Backing::Anonymous).unwrap();
        read_into(ram.memory(), 4096, &mut Trickle(10_001), 10_001).unwrap();
        let mut bytes = vec![0; 10_002];
        ram.memory().read_slice(&mut bytes, GuestAddress(4096)).unwrap();
        assert!(bytes[..10_001].iter().all(|b| *b == 7) && bytes[10_001] == 0);
        let short = read_into(ram.memory(), 4096, &mut Trickle(999), 1000).unwrap_err().to_string();
        assert!(short.contains("999 of 1000"), "{short}");
    }

    #[test]
    fn the_memory_map_leaves_the_hole_out() {
        let ram = Ram::new(4 << 30, Backing::Anonymous).unwrap();
        write_params(ram.memory(), setup_header::default(), &layout::stretches(4 << 30), ACPI).unwrap();
        let params: boot_params = ram.memory().read_obj(GuestAddress(BOOT_PARAMS)).unwrap();
        let (entries, table) = (params.e820_entries, params.e820_table);
        assert_eq!(entries, 4);
        let (last_at, last_size) = (table[3].addr, table[3].size);
        assert_eq!((last_at, last_size), (4 << 30, 1 << 30));
    }
}
