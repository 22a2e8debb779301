//! Where a process maps pages of slabs, from `/proc/PID/maps`. Needs no privilege for a process of the same user.

use std::io;
use std::ops::Range;
use std::path::Path;

use super::PAGE_BYTES;
use super::slab::SLAB_NAME;

/// One mapping of a slab.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SlabMapping {
    /// Its addresses.
    pub hvas: Range<u64>,
    /// The number of the slab's file.
    pub inode: u64,
    /// The slab's page at the first address.
    pub first: u64,
}

impl SlabMapping {
    /// Which page of the slab is mapped at `hva`, which lies inside.
    pub fn slab_page(&self, hva: u64) -> u64 {
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
    pub files: Vec<Range<u64>>,
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
    pub fn slab_at(&self, hva: u64) -> Option<&SlabMapping> {
        let after = self.slabs.partition_point(|mapping| mapping.hvas.start <= hva);
        self.slabs[..after].last().filter(|mapping| hva < mapping.hvas.end)
    }
}

/// The addresses of a line, if it is of a file and of no slab.
fn other_file(line: &str) -> Option<Range<u64>> {
    let mut fields = line.split_ascii_whitespace();
    let (start, end) = fields.next()?.split_once('-')?;
    let is_anonymous = fields.nth(3)? == "0";
    if is_anonymous || line.contains(SLAB_NAME) {
        return None;
    }
    let hex = |text: &str| u64::from_str_radix(text, 16).ok();
    Some(hex(start)?..hex(end)?)
}

/// What a line says, if it is of a slab.
fn slab_mapping(line: &str) -> Option<SlabMapping> {
    let (fields, _) = line.split_once(SLAB_NAME)?;
    let mut fields = fields.split_ascii_whitespace();
    let (start, end) = fields.next()?.split_once('-')?;
    let hex = |text: &str| u64::from_str_radix(text, 16).ok();
    Some(SlabMapping {
        hvas: hex(start)?..hex(end)?,
        first: hex(fields.nth(1)?)? / PAGE_BYTES,
        inode: fields.nth(1)?.parse().ok()?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const LINE: &str = "7f12a0000000-7f12a0040000 rw-p 00003000 00:01 4711 /memfd:samepage-slab (deleted)";

    #[test]
    fn mappings_of_slabs_are_known_from_others() {
        let mapping = SlabMapping { hvas: 0x7f12_a000_0000..0x7f12_a004_0000, first: 3, inode: 4711 };
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
        assert_eq!(others.map(other_file), [None, None, Some(0x7f00..0x7f10)]);
    }

    #[test]
    fn a_page_is_found_in_its_mapping() {
        let maps = Maps { count: 1, slabs: slab_mapping(LINE).into_iter().collect(), files: Vec::new() };
        assert_eq!(maps.slab_at(0x7f12_a000_2000).map(|m| m.slab_page(0x7f12_a000_2000)), Some(5));
        assert!(maps.slab_at(0x7f12_a004_0000).is_none() && maps.slab_at(0).is_none());
    }
}
