//! Kernels of every kind, whole and damaged.

use std::io::{Cursor, Read, Write};
use std::path::Path;

use proptest::prelude::*;

use super::vmlinux::{self, Kernel, KernelProblem, Unpack};
use super::{Destination, ImageError, KernelFrom, Options, elf, make, progress};

/// A vmlinux with one executable segment holding `text`.
fn vmlinux(text: &[u8]) -> Vec<u8> {
    let mut file = vec![0u8; 120];
    file[..6].copy_from_slice(b"\x7fELF\x02\x01");
    let mut put = |at: usize, bytes: &[u8]| file[at..at + bytes.len()].copy_from_slice(bytes);
    put(16, &2u16.to_le_bytes());
    put(18, &62u16.to_le_bytes());
    put(24, &0x100_0000u64.to_le_bytes());
    put(32, &64u64.to_le_bytes());
    put(54, &56u16.to_le_bytes());
    put(56, &1u16.to_le_bytes());
    put(64, &1u32.to_le_bytes());
    put(68, &5u32.to_le_bytes());
    put(72, &120u64.to_le_bytes());
    put(80, &0xffff_ffff_8100_0000u64.to_le_bytes());
    put(88, &0x100_0000u64.to_le_bytes());
    put(96, &(text.len() as u64).to_le_bytes());
    put(104, &(text.len() as u64 + 4096).to_le_bytes());
    file.extend_from_slice(text);
    file
}

/// A bzImage around `payload`.
fn bzimage(payload: &[u8]) -> Vec<u8> {
    let mut file = vec![0u8; 1024];
    let mut put = |at: usize, bytes: &[u8]| file[at..at + bytes.len()].copy_from_slice(bytes);
    put(0x1f1, &[1]);
    put(0x1f4, &(payload.len() as u32 / 16).to_le_bytes());
    put(0x1fe, &[0x55, 0xaa]);
    put(0x202, b"HdrS");
    put(0x206, &0x20fu16.to_le_bytes());
    put(0x20e, &0x100u16.to_le_bytes());
    put(0x236, &1u16.to_le_bytes());
    put(0x24c, &(payload.len() as u32).to_le_bytes());
    put(0x300, b"6.12.9-test (build@host) #1\0");
    file.extend_from_slice(payload);
    file
}

fn sized(mut packed: Vec<u8>, unpacked: &[u8]) -> Vec<u8> {
    packed.extend_from_slice(&(unpacked.len() as u32).to_le_bytes());
    packed
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut out = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    out.write_all(bytes).unwrap();
    out.finish().unwrap()
}

/// As the kernel's build has it: with the x86 branch filter.
fn xz(bytes: &[u8]) -> Vec<u8> {
    let mut options = lzma_rust2::XzOptions::with_preset(1);
    options.prepend_pre_filter(lzma_rust2::FilterType::BcjX86, 0);
    let mut out = lzma_rust2::XzWriter::new(Vec::new(), options).unwrap();
    out.write_all(bytes).unwrap();
    sized(out.finish().unwrap(), bytes)
}

fn zstd(bytes: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    let mut compressor = zstd_rs::Compressor::new(zstd_rs::CompressionConfig::FAST).unwrap();
    compressor.compress(bytes, None, &mut out).unwrap();
    sized(out, bytes)
}

fn lz4(bytes: &[u8]) -> Vec<u8> {
    let mut out = vec![0x02, 0x21, 0x4c, 0x18];
    for block in bytes.chunks(8 << 20) {
        let packed = lz4_flex::block::compress(block);
        out.extend_from_slice(&(packed.len() as u32).to_le_bytes());
        out.extend_from_slice(&packed);
    }
    sized(out, bytes)
}

/// Code-like contents: calls for the branch filter, and more than one lz4 block.
fn text(bytes: usize) -> Vec<u8> {
    let word = |i: usize| [0xe8, i as u8, (i >> 8) as u8, (i >> 16) as u8, 0, 0x90, 0x48, (i * 7) as u8];
    (0..bytes / 8).flat_map(word).collect()
}

fn problem(bytes: Vec<u8>) -> String {
    let error = vmlinux::parse(bytes, Unpack::Host).unwrap_err();
    let cause = std::error::Error::source(&error).map(|c| format!(": {c}"));
    format!("{error}{}", cause.unwrap_or_default())
}

#[test]
fn payloads_of_every_format_are_unpacked() {
    // Anything behind the ELF file, such as relocations, is cut off.
    type Pack = fn(&[u8]) -> Vec<u8>;
    // For lz4 more than one block.
    let cases: [(Pack, usize); 4] = [(gzip, 1 << 18), (xz, 1 << 18), (zstd, 1 << 18), (lz4, 9 << 20)];
    for (pack, bytes) in cases {
        let kernel = vmlinux(&text(bytes));
        let with_relocations = [&kernel[..], &[7; 64]].concat();
        let packed = bzimage(&pack(&with_relocations));
        let Kernel::Elf(image) = vmlinux::parse(packed, Unpack::Host).unwrap() else {
            panic!("not unpacked")
        };
        assert!(image.into_bytes().unwrap() == kernel);
    }
}

#[test]
fn other_payloads_are_left_to_the_guest() {
    for magic in [&b"BZh9"[..], b"\x5d\0\0\0", b"\x89LZO"] {
        let file = bzimage(&[magic, &[0; 60]].concat());
        assert!(
            matches!(vmlinux::parse(file.clone(), Unpack::Host), Ok(Kernel::BzImage(same)) if same == file)
        );
    }
    assert!(problem(bzimage(&[9; 64])).contains("[09, 09, 09, 09]"));
}

#[test]
fn a_kernel_is_left_to_the_guest_where_that_is_asked_for_and_it_can() {
    let kernel = vmlinux(&[0x90; 64]);
    let packed = bzimage(&gzip(&kernel));
    assert!(
        matches!(vmlinux::parse(packed.clone(), Unpack::Guest), Ok(Kernel::BzImage(same)) if same == packed)
    );
    let error = vmlinux::parse(kernel.clone(), Unpack::Guest).unwrap_err();
    assert!(error.to_string().contains("has no decompressor"), "{error}");
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("vmlinux");
    std::fs::write(&path, kernel).unwrap();
    let error = vmlinux::open(&path, Unpack::Guest).unwrap_err().to_string();
    assert!(error.contains("give the vmlinuz"), "{error}");
}

#[test]
fn what_is_wrong_with_a_kernel_is_said() {
    let change = |at: usize, byte: u8| {
        let mut file = vmlinux(&[0x90; 64]);
        file[at] = byte;
        problem(file)
    };
    assert!(change(18, 183).contains("is an ELF for AArch64; expected x86-64"));
    assert!(change(4, 1).contains("32-bit ELF"));
    assert!(change(5, 2).contains("big-endian"));
    assert!(change(16, 1).contains("object file (a kernel module?)"));
    assert!(change(16, 3).contains("position-independent"));
    assert!(change(64, 3).contains("dynamic linker"));
    assert!(change(64, 4).contains("no loadable segment"));
    assert!(change(68, 4).contains("no executable segment"));
    assert!(change(27, 0xff).contains("entry point"));
    assert!(change(96, 65).contains("cut short"));
    assert!(change(97, 0xff).contains("damaged segment"));
    assert!(problem(vmlinux(&[0x90; 64])[..150].to_vec()).contains("cut short"));
    assert!(problem(vmlinux(&[0x90; 64])[..30].to_vec()).contains("cut short"));

    let change = |at: usize, byte: u8| {
        let mut file = bzimage(&gzip(&vmlinux(&[0x90; 64])));
        file[at] = byte;
        problem(file)
    };
    assert!(change(0x206, 7).contains("boot protocol 2.07; expected 2.08"));
    assert!(change(0x236, 0).contains("32-bit bzImage"));
    assert!(change(0x24f, 1).contains("cut short"));
    assert!(change(1024 + 30, 0xff).contains("damaged"));
    assert!(problem(bzimage(&gzip(b"hello, hello"))).contains("does not unpack to a kernel"));
    assert!(problem(bzimage(&sized(gzip(b"x")[..5].to_vec(), &[]))).contains("payload"));
    let huge = [&[0x28, 0xb5, 0x2f, 0xfd][..], &[0xff; 60]].concat();
    assert!(problem(bzimage(&huge)).contains("at most 536870912 are accepted"));

    assert!(problem(Vec::new()).contains("is empty"));
    assert!(problem(b"#!/bin/sh".to_vec()).contains("script"));
    assert!(problem(b"!<arch>\ndebian-binary".to_vec()).contains("samepage image --deb"));
    assert!(problem(vec![0; 5000]).contains("all zeros"));
}

#[test]
fn files_are_opened_or_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("kernel");
    let text = |path: &Path| vmlinux::open(path, Unpack::Host).unwrap_err().to_string();
    assert_eq!(text(&path), format!("the kernel {} cannot be read", path.display()));
    assert!(text(dir.path()).ends_with("is a directory; expected a vmlinux, bzImage or vmlinuz file"));
    assert!(text(Path::new("/dev/null")).contains("is not a regular file"));
    std::fs::write(&path, b"").unwrap();
    assert!(matches!(vmlinux::open(&path, Unpack::Host).unwrap_err().problem, KernelProblem::Empty));

    let kernel = vmlinux(&[0x90; 64]);
    for file in [kernel.clone(), bzimage(&gzip(&kernel))] {
        std::fs::write(&path, file).unwrap();
        let Kernel::Elf(mut image) = vmlinux::open(&path, Unpack::Host).unwrap() else {
            panic!("not unpacked")
        };
        let mut bytes = Vec::new();
        image.read_to_end(&mut bytes).unwrap();
        assert_eq!((bytes.len() as u64, &bytes), (image.len(), &kernel));
        assert_eq!(image.into_bytes().unwrap(), kernel);
    }
}

#[test]
fn an_image_appears_whole_or_not_at_all() {
    let dir = tempfile::tempdir().unwrap();
    let kernel = dir.path().join("kernel");
    std::fs::write(&kernel, bzimage(&zstd(&vmlinux(&text(4096))))).unwrap();
    let listing = |path: &Path| -> Vec<_> {
        let mut names: Vec<_> = std::fs::read_dir(path).unwrap().map(|e| e.unwrap().file_name()).collect();
        names.sort();
        names
    };
    let images = dir.path().join("cache/images");
    let from = |source: &Path, to: Destination| {
        let source = KernelFrom::Files { kernel: source.into(), modules: None };
        make(&Options { source, modules: Vec::new(), to }, &vmlinux(b"agent"), &mut progress::Quiet)
    };

    // A failure leaves nothing, not even the directories above.
    from(dir.path(), Destination::Collection(images.clone())).unwrap_err();
    assert_eq!(listing(dir.path()), ["kernel"]);

    for _ in 0..2 {
        let image = from(&kernel, Destination::Collection(images.clone())).unwrap();
        assert_eq!(image.name, "6.12.9-test");
        assert_eq!(listing(&images), ["6.12.9-test", "latest"]);
        assert_eq!(listing(&images.join("latest")), ["image.json", "initrd.cpio", "vmlinux", "vmlinuz"]);
        let packed = image.packed_kernel.expect("it came packed");
        assert_eq!(std::fs::read(packed).unwrap(), std::fs::read(&kernel).unwrap());
        assert_eq!(std::fs::metadata(&image.initrd).unwrap().len(), image.initrd_bytes);
        assert!(
            matches!(vmlinux::open(&image.kernel, Unpack::Host), Ok(Kernel::Elf(k)) if k.len() == image.kernel_bytes)
        );
    }

    // A directory of another program's is left alone.
    let refused = from(&kernel, Destination::Dir(dir.path().into())).unwrap_err();
    assert!(matches!(&refused, ImageError::Occupied { .. }), "{refused}");
    let no_agent = make(
        &Options {
            source: KernelFrom::Package(kernel.clone()),
            modules: Vec::new(),
            to: Destination::Dir(dir.path().join("out")),
        },
        b"#!/bin/sh",
        &mut progress::Quiet,
    );
    assert!(matches!(no_agent, Err(ImageError::Agent(9))));
    assert_eq!(listing(dir.path()), ["cache", "kernel"]);
}

/// Something a kernel file might be, for damaging.
fn seeds() -> impl Strategy<Value = Vec<u8>> {
    let kernel = || vmlinux(&text(512));
    prop_oneof![
        Just(kernel()),
        Just(bzimage(&gzip(&kernel()))),
        Just(bzimage(&xz(&kernel()))),
        Just(bzimage(&zstd(&kernel()))),
        Just(bzimage(&lz4(&kernel()))),
    ]
}

proptest! {
    #[test]
    fn damaged_kernels_never_panic(
        mut file in seeds(),
        changes in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..8),
        cut in any::<prop::sample::Index>(),
        shorten: bool,
    ) {
        for (at, byte) in changes {
            let at = at.index(file.len());
            file[at] = byte;
        }
        if shorten {
            file.truncate(cut.index(file.len()));
        }
        if let Ok(Kernel::Elf(image)) = vmlinux::parse(file, Unpack::Host) {
            prop_assert!(image.len() >= 120);
        }
    }

    #[test]
    fn random_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..2000), kind in 0..4u8) {
        let bytes = match kind {
            0 => bytes,
            1 => [&b"\x7fELF\x02\x01"[..], &bytes].concat(),
            2 => bzimage(&bytes),
            _ => [&vmlinux(&[])[..64], &bytes].concat(),
        };
        let _ = elf::section(&bytes, ".modinfo");
        let _ = elf::is_static_program(&bytes);
        let _ = elf::check_kernel(&mut Cursor::new(&bytes), bytes.len() as u64);
        let _ = vmlinux::parse(bytes, Unpack::Host);
    }

    #[test]
    fn random_compressed_data_never_panics(
        magic in prop::sample::select(vec![
            &[0x1f, 0x8b, 8, 0][..], &[0xfd, b'7', b'z', b'X', b'Z', 0][..], &[0x28, 0xb5, 0x2f, 0xfd][..],
            &[0x02, 0x21, 0x4c, 0x18][..],
        ]),
        bytes in proptest::collection::vec(any::<u8>(), 0..400),
        size in 0u32..100_000,
    ) {
        let mut packed = [magic, &bytes].concat();
        let _ = super::unpack::unpack(&packed, 1 << 20);
        packed.extend_from_slice(&size.to_le_bytes());
        let _ = super::unpack::unpack_payload(&packed, 1 << 20);
    }
}
