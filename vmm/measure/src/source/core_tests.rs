//! Cores as gdb, the kernel and QEMU write them, made by hand.

use std::io::Write;

use super::*;

/// Flags, virtual and physical address, contents.
type Loaded<'a> = (u32, u64, u64, &'a [u8]);

/// A core of these segments, with a note of these files.
fn core(files: &[(u64, u64, &str)], loaded: &[Loaded<'_>]) -> Vec<u8> {
    let mut note = Vec::new();
    let mut names = Vec::new();
    note.extend((files.len() as u64).to_le_bytes());
    note.extend(PAGE_BYTES.to_le_bytes());
    for (start, end, name) in files {
        [*start, *end, 0].iter().for_each(|number| note.extend(number.to_le_bytes()));
        names.extend(name.bytes().chain([0]));
    }
    note.extend(names);
    let mut notes = Vec::new();
    // Another one comes before it, with a name of a length that is padded.
    for (kind, content) in [(1, &b"12345"[..]), (NT_FILE, &note)] {
        [5, content.len() as u32, kind].iter().for_each(|number| notes.extend(number.to_le_bytes()));
        notes.extend(b"CORE\0\0\0\0");
        notes.extend(content);
        notes.resize(notes.len().next_multiple_of(4), 0);
    }
    let mut file = vec![0; FILE_HEADER_BYTES];
    file[..6].copy_from_slice(b"\x7fELF\x02\x01");
    file[16] = 4;
    file[32] = FILE_HEADER_BYTES as u8;
    file[54] = PROGRAM_HEADER_BYTES as u8;
    file[56..58].copy_from_slice(&(loaded.len() as u16 + 1).to_le_bytes());
    let mut at = FILE_HEADER_BYTES + PROGRAM_HEADER_BYTES * (loaded.len() + 1);
    let mut header = |kind: u32, flags: u32, vaddr: u64, paddr: u64, bytes: usize| {
        [kind, flags].iter().for_each(|number| file.extend(number.to_le_bytes()));
        let bytes = bytes as u64;
        [at as u64, vaddr, paddr, bytes, bytes, 1].iter().for_each(|n| file.extend(n.to_le_bytes()));
        at += bytes as usize;
    };
    header(NOTE, 0, 0, 0, notes.len());
    loaded.iter().for_each(|(flags, vaddr, paddr, bytes)| header(LOAD, *flags, *vaddr, *paddr, bytes.len()));
    file.extend(notes);
    loaded.iter().for_each(|(.., bytes)| file.extend(*bytes));
    file
}

fn open(bytes: &[u8]) -> Result<Core, CoreError> {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(bytes).unwrap();
    Core::open(file.path(), file.as_file(), bytes.len() as u64)
}

const RW: u32 = 6;
const MIB: usize = 1 << 20;

#[test]
fn the_guest_in_a_process_is_chosen_by_what_is_not_zeros() {
    let (ram, reserved) = (vec![7; 32 * MIB], vec![0; 64 * MIB]);
    let code = vec![7; 64 * MIB];
    let bytes =
        core(&[], &[(RW, 0x1000_0000, 0, &reserved), (RW, 0x9000_0000, 0, &ram), (5, 0x4000_0000, 0, &code)]);
    let found = open(&bytes).unwrap();
    let at = bytes.len() - code.len() - ram.len();
    assert_eq!(found.parts, [Part { at: at as u64, pages: 32 << 8 }]);
    let notes = found.notes.join("\n");
    assert!(notes.contains("10000000-14000000") && notes.contains("nothing of it"), "{notes}");
}

#[test]
fn files_that_were_mapped_are_known_by_the_note() {
    let (ram, frames) = (vec![7; 72 * MIB], vec![7; 16 * MIB]);
    for (name, kind) in [
        ("/memfd:vm (deleted)", Kind::Memory),
        ("/srv/vm.mem", Kind::File),
        ("/memfd:samepage-slab (deleted)", Kind::Anonymous),
    ] {
        let files = [(0x9000_0000, 0x9000_0000 + ram.len() as u64, name)];
        let found =
            open(&core(&files, &[(RW, 0x1000_0000, 0, &frames), (RW, 0x9000_0000, 0, &ram)])).unwrap();
        let pages: u64 = found.parts.iter().map(|part| part.pages).sum();
        // A framebuffer beside it cannot be distinguished if it is of the same kind.
        let expected = if kind == Kind::Anonymous { 88 << 8 } else { 72 << 8 };
        assert_eq!(pages, expected, "{name}");
        let segment = Segment { kind: LOAD, flags: RW, at: 0, vaddr: 0x9000_0000, paddr: 0, file_bytes: 1 };
        let files: Vec<_> = files.iter().map(|(a, b, name)| (*a..*b, (*name).to_owned())).collect();
        assert_eq!(super::kind(&segment, &files).0, kind, "{name}");
    }
}

#[test]
fn a_machine_has_each_physical_page_once() {
    let (low, high) = (vec![1; 3 * 4096], vec![2; 2 * 4096]);
    // The second segment has two pages of the first again, and one more, as with page tables.
    let loaded: [Loaded<'_>; 3] = [(0, 0, 0x10_0000, &high), (0, 0, 0, &low), (0, 0, 0x1000, &low)];
    let bytes = core(&[], &loaded);
    let found = open(&bytes).unwrap();
    let at = bytes.len() as u64 - 8 * 4096;
    let part = |page: u64, pages| Part { at: at + page * 4096, pages };
    assert_eq!(found.parts, [part(2, 3), part(7, 1), part(0, 2)]);
}

#[test]
fn damage_is_reported() {
    let ram = vec![7; 16 * MIB];
    let good = core(&[], &[(RW, 0x1000_0000, 0, &ram)]);
    assert!(open(&good).is_ok());
    let error = open(&good[..good.len() - 1]).unwrap_err().to_string();
    assert!(error.contains("cut short") && error.contains("ulimit -c"), "{error}");
    assert!(matches!(open(&good[..40]), Err(CoreError::CutShort { .. })));
    let changed = |at: usize, byte: u8| {
        let mut bytes = good.clone();
        bytes[at] = byte;
        open(&bytes).unwrap_err().to_string()
    };
    assert!(changed(4, 1).contains("32 bits") && changed(5, 2).contains("big-endian"));
    assert!(changed(54, 32).contains("56 bytes"));
    let none = open(&core(&[], &[(5, 0x1000_0000, 0, &ram)])).unwrap_err().to_string();
    assert!(none.contains("gcore -a") && none.contains("executable"), "{none}");
    assert!(open(&core(&[], &[])).is_err());
    // Rubbish in the headers is an error, not a panic, and takes no memory.
    for at in 0..FILE_HEADER_BYTES + 2 * PROGRAM_HEADER_BYTES {
        let mut bytes = good[..1024].to_vec();
        bytes[at] = 0xff;
        let _ = open(&bytes);
    }
}
