//! Where a process maps pages of slabs, from `/proc/PID/maps`. Needs no privilege for a process of the same user.

use std::io;
use std::ops::Range;
use std::path::Path;

use super::slab::{MAX_SLAB_PAGES, SLAB_NAME};
use super::{Hva, PAGE_BYTES, SlabPage};

/// One mapping of a slab.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SlabMapping {
    /// Its addresses.
    pub hvas: Range<Hva>,
    /// The number of the slab's file.
    pub inode: u64,
    /// The slab's page at the first address.
    pub first: SlabPage,
}

impl SlabMapping {
    /// Which page of the slab is mapped at `hva`, which lies inside.
    pub fn slab_page(&self, hva: Hva) -> SlabPage {
        self.first + (hva - self.hvas.start) / PAGE_BYTES
    }
}

/// The mappings of a process.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Maps {
    /// How many there are of any kind.
    pub count: u64,
    /// Those of slabs, by address.
    pub slabs: Vec<SlabMapping>,
    /// The addresses of those of other files, and of memory that is shared.
    pub files: Vec<Range<Hva>>,
}

impl Maps {
    /// Of process `pid`.
    pub fn of(pid: u32) -> io::Result<Self> {
        Self::read(Path::new(&format!("/proc/{pid}/maps")))
    }

    /// Of this process.
    pub fn own() -> io::Result<Self> {
        Self::read(Path::new("/proc/self/maps"))
    }

    fn read(path: &Path) -> io::Result<Self> {
        let text = std::fs::read_to_string(path)?;
        Ok(Self {
            count: text.lines().count() as u64,
            slabs: text.lines().filter_map(slab_mapping).collect(),
            files: text.lines().filter_map(other_file).collect(),
        })
    }

    /// The mapping of a slab at `hva`.
    pub fn slab_at(&self, hva: Hva) -> Option<&SlabMapping> {
        let after = self.slabs.partition_point(|mapping| mapping.hvas.start <= hva);
        self.slabs[..after].last().filter(|mapping| hva < mapping.hvas.end)
    }
}

/// The addresses of a line, if it is of a file and of no slab.
fn other_file(line: &str) -> Option<Range<Hva>> {
    let mut fields = line.split_ascii_whitespace();
    let (start, end) = fields.next()?.split_once('-')?;
    let is_anonymous = fields.nth(3)? == "0";
    if is_anonymous || slab_mapping(line).is_some() {
        return None;
    }
    Some(Hva(hex(start)?)..Hva(hex(end)?))
}

fn hex(text: &str) -> Option<u64> {
    u64::from_str_radix(text, 16).ok()
}

/// What a line says, if it is of a slab: whatever its name, a file that is mapped further on than any slab reaches is none.
fn slab_mapping(line: &str) -> Option<SlabMapping> {
    let (fields, _) = line.split_once(SLAB_NAME)?;
    let mut fields = fields.split_ascii_whitespace();
    let (start, end) = fields.next()?.split_once('-')?;
    let hvas = Hva(hex(start)?)..Hva(hex(end)?);
    let first = hex(fields.nth(1)?)? / PAGE_BYTES;
    let end = first.checked_add(hvas.end.0.checked_sub(hvas.start.0)? / PAGE_BYTES)?;
    let first = SlabPage(u32::try_from(first).ok().filter(|_| end <= MAX_SLAB_PAGES)?);
    Some(SlabMapping { hvas, first, inode: fields.nth(1)?.parse().ok()? })
}

#[cfg(test)]
mod tests {
    use super::*;

    const LINE: &str = "7f12a0000000-7f12a0040000 rw-p 00003000 00:01 4711 /memfd:samepage-slab (deleted)";

    #[test]
    fn mappings_of_slabs_are_known_from_others() {
        let mapping = SlabMapping {
            hvas: Hva(0x7f12_a000_0000)..Hva(0x7f12_a004_0000),
            first: SlabPage(3),
            inode: 4711,
        };
        assert_eq!(slab_mapping(LINE), Some(mapping));
        for other in [
            "7f12a0000000-7f12a0040000 rw-p 00000000 00:00 0 ",
            "7f12a0000000-7f12a0040000 rw-p 00003000 00:01 4711 /memfd:samepage-ram (deleted)",
            "/memfd:samepage-slab",
        ] {
            assert_eq!(slab_mapping(other), None, "{other}");
        }
        let others = [
            LINE,
            "7f12a0000000-7f12a0040000 rw-p 00000000 00:00 0 ",
            "7f00-7f10 rw-s 0 00:01 7 /memfd:samepage-ram",
        ];
        assert_eq!(others.map(other_file), [None, None, Some(Hva(0x7f00)..Hva(0x7f10))]);
    }

    #[test]
    fn a_name_alone_makes_no_slab() {
        // 1 TiB on; and more pages than a slab has.
        for far in [
            LINE.replace("00003000", "10000000000"),
            LINE.replace("00003000", "fffffffffffff000"),
            LINE.replace("7f12a0040000", "7f13a0040000"),
        ] {
            assert_eq!(slab_mapping(&far), None, "{far}");
            assert!(other_file(&far).is_some(), "{far}");
        }
    }

    #[test]
    fn a_page_is_found_in_its_mapping() {
        let maps = Maps { count: 1, slabs: slab_mapping(LINE).into_iter().collect(), files: Vec::new() };
        let hva = Hva(0x7f12_a000_2000);
        assert_eq!(maps.slab_at(hva).map(|m| m.slab_page(hva)), Some(SlabPage(5)));
        assert!(maps.slab_at(Hva(0x7f12_a004_0000)).is_none() && maps.slab_at(Hva(0)).is_none());
    }
}
