//! Mappings in the shapes that VMMs give them.

use super::*;
use crate::source::choice::Reason;

/// Each line is a mapping and, behind a `#`, the MiB that it holds.
fn all(text: &str) -> Vec<Mapping> {
    let memory = [memory_device("97 60 0:42 / /mnt/ram rw - tmpfs none rw").unwrap()].into();
    let mapping = |line: &str| {
        let (header, held) = line.split_once('#').unwrap();
        let held_bytes = held.parse::<u64>().unwrap() << 20;
        parse(&Area { header: header.to_owned(), held_bytes, is_device: false }, &memory).unwrap()
    };
    text.lines().map(mapping).collect()
}

fn ranges(extents: &[Extent]) -> Vec<(u64, u64)> {
    extents.iter().map(|e| (e.hva.0, e.bytes)).collect()
}

fn taken(text: &str) -> Vec<(u64, u64)> {
    ranges(&guest_memory(7, &all(text)).unwrap().extents())
}

const FIRECRACKER: &str = "\
555555554000-5555557a0000 r-xp 00000000 08:01 1 /usr/bin/firecracker#2
5555557a0000-555555900000 rw-p 00000000 00:00 0 [heap]#1
7f0000000000-7f00c0000000 rw-p 00000000 00:00 0 #900
7f0100000000-7f0110000000 rw-p 00000000 00:00 0 #60
7f0200000000-7f0200021000 rw-p 00000000 00:00 0 #0
7f0300000000-7f0340000000 rwxp 00000000 00:00 0 #100
7f0400000000-7f0440000000 rw-s 00000000 08:01 9 /var/lib/disk.img#200
7ffc00000000-7ffc40000000 rw-p 00000000 00:00 0 [stack]#1";

#[test]
fn memory_on_both_sides_of_the_hole_is_the_guests() {
    let found = guest_memory(7, &all(FIRECRACKER)).unwrap();
    let extents = found.extents();
    assert_eq!(ranges(&extents), [(0x7f00_0000_0000, 3 << 30), (0x7f01_0000_0000, 256 << 20)]);
    assert_eq!(extents[1].gpa, Gpa(3 << 30));
    let left: Vec<_> = found.left_out.iter().map(|(s, reason)| (s.hvas.start, *reason)).collect();
    assert_eq!(left, [(0x7f04_0000_0000, Reason::File), (0x7f03_0000_0000, Reason::Kind)]);
}

#[test]
fn a_restored_guest_is_a_private_file_mapping() {
    let text = "\
7f0000000000-7f0010000000 rw-p 00000000 08:01 12 /srv/snap/vm.mem#31
7f0100000000-7f0101000000 rw-p 00000000 00:00 0 #1";
    assert_eq!(taken(text), [(0x7f00_0000_0000, 256 << 20)]);
}

#[test]
fn shared_memory_is_ram_wherever_it_is_mounted() {
    for file in [
        "00:2a 12 /mnt/ram/vm0",
        "00:01 12 /memfd:ch_ram (deleted)",
        "00:01 12 /memfd:crosvm_guest (deleted)",
    ] {
        // And a framebuffer beside it is not.
        let text = format!(
            "7f0000000000-7f0010000000 rw-s 00000000 {file}#120\n7f0100000000-7f0101000000 rw-p 00000000 00:00 0 #16"
        );
        let found = guest_memory(7, &all(&text)).unwrap();
        assert_eq!(ranges(&found.extents()), [(0x7f00_0000_0000, 256 << 20)]);
        assert_eq!(found.taken[0].kind, Kind::Memory, "{file}");
        assert_eq!(found.left_out.len(), 1, "{found:?}");
    }
}

#[test]
fn what_merging_has_cut_up_is_one_stretch() {
    let text = "\
7f0000000000-7f0000800000 rw-p 00000000 00:00 0 #8
7f0000800000-7f0000900000 rw-p 00003000 00:01 47 /memfd:samepage-slab (deleted)#1
7f0000900000-7f0001000000 rw-p 00000000 00:00 0 #7
7f0001000000-7f0001800000 rw-p 00000000 00:00 0 #8";
    assert_eq!(taken(text), [(0x7f00_0000_0000, 16 << 20)], "and the stack above it is none of it");
}

#[test]
fn a_file_that_is_mapped_in_pieces_is_one_stretch() {
    let text = "\
7f0000000000-7f0000800000 rw-s 00000000 00:01 48 /dev/shm/ram with spaces#1
7f0000800000-7f0001000000 rw-s 00800000 00:01 48 /dev/shm/ram with spaces#1
7f0001000000-7f0001100000 rw-s 00000000 00:01 49 /memfd:other (deleted)#1";
    assert_eq!(taken(text), [(0x7f00_0000_0000, 16 << 20)]);
}

#[test]
fn a_file_that_is_mapped_twice_in_a_row_counts_once() {
    let text = "\
7f0000000000-7f0002000000 rw-s 00000000 00:01 48 /memfd:ram (deleted)#32
7f0002000000-7f0004000000 rw-s 00000000 00:01 48 /memfd:ram (deleted)#0
7f0004000000-7f0006000000 rw-s 00000000 00:01 48 /memfd:ram (deleted)#32";
    let found = guest_memory(7, &all(text)).unwrap();
    assert_eq!((found.taken.len(), found.left_out.len()), (1, 2), "{found:?}");
}

#[test]
fn without_a_guest_what_there_is_is_listed() {
    let text = "7f0000000000-7f0000800000 rw-p 00000000 00:00 0 #4\n7f0001000000-7f0001001000 r--p 00000000 00:00 0 #0";
    let error = guest_memory(7, &all(text)).unwrap_err().to_string();
    assert!(
        error.contains("7f0000000000-7f0000800000 (4.0 of 8.0 MiB in memory") && error.contains("--range"),
        "{error}"
    );
    let none = guest_memory(7, &[]).unwrap_err().to_string();
    assert!(none.contains("none at all"), "{none}");
}

#[test]
fn named_ranges_are_mapped_and_do_not_overlap() {
    let maps = all(FIRECRACKER);
    let good = [0x7f01_0000_0000..0x7f01_0000_2000, 0x7f00_0000_1000..0x7f00_0000_3000];
    let (found, choice) = named_memory(7, &maps, &good).unwrap();
    assert_eq!(ranges(&found), [(0x7f00_0000_1000, 0x2000), (0x7f01_0000_0000, 0x2000)]);
    assert!(choice.left_out.iter().all(|(stretch, _)| stretch.hvas.start >= 0x7f03_0000_0000), "{choice:?}");
    let over = [0x7f01_0000_0000..0x7f01_0000_2000, 0x7f01_0000_1000..0x7f01_0000_3000];
    assert!(matches!(named_memory(7, &maps, &over), Err(MappingError::Overlap { .. })));
    // It begins in a mapping and ends behind it.
    let off = 0x7f02_0002_0000..0x7f02_0002_2000;
    let error = named_memory(7, &maps, std::slice::from_ref(&off)).unwrap_err();
    assert!(matches!(error, MappingError::Unmapped { at: 0x7f02_0002_1000, .. }), "{error}");
}

#[test]
fn a_process_that_is_gone_is_distinguished_from_one_of_another_user() {
    assert!(matches!(mappings(u32::MAX - 1), Err(MappingError::Gone { .. })));
    assert!(!mappings(std::process::id()).unwrap().is_empty());
}
