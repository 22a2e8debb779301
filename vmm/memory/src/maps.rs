//! Where a process maps pages of slabs, by its mappings.

use std::io;
use std::ops::Range;

use kernel_view::maps::{self, Mapping};

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
        maps::of(pid).map(|text| Self::parse(&text))
    }

    /// Of this process.
    pub fn own() -> io::Result<Self> {
        maps::own().map(|text| Self::parse(&text))
    }

    fn parse(text: &str) -> Self {
        let mut maps = Self::default();
        for mapping in text.lines().filter_map(Mapping::parse) {
            maps.count += 1;
            match slab_mapping(&mapping) {
                Some(slab) => maps.slabs.push(slab),
                None if mapping.inode != 0 => maps.files.push(mapping.hvas),
                None => (),
            }
        }
        maps
    }

    /// The mapping of a slab at `hva`.
    pub fn slab_at(&self, hva: Hva) -> Option<&SlabMapping> {
        let after = self.slabs.partition_point(|mapping| mapping.hvas.start <= hva);
        self.slabs[..after].last().filter(|mapping| hva < mapping.hvas.end)
    }
}

/// What a mapping is, if it is of a slab: whatever its name, a file that is mapped further on than
/// any slab reaches is none.
fn slab_mapping(mapping: &Mapping<'_>) -> Option<SlabMapping> {
    if !mapping.name.contains(SLAB_NAME) {
        return None;
    }
    let first = mapping.offset / PAGE_BYTES;
    let end = first.checked_add(mapping.bytes() / PAGE_BYTES)?;
    let first = SlabPage(u32::try_from(first).ok().filter(|_| end <= MAX_SLAB_PAGES)?);
    Some(SlabMapping { hvas: mapping.hvas.clone(), first, inode: mapping.inode })
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
        assert_eq!(Maps::parse(LINE), Maps { count: 1, slabs: vec![mapping], files: Vec::new() });
        let none = "7f12a0000000-7f12a0040000 rw-p 00000000 00:00 0 ";
        assert_eq!(Maps::parse(none), Maps { count: 1, ..Maps::default() });
        let ram = "7f12a0000000-7f12a0040000 rw-p 00003000 00:01 4711 /memfd:samepage-ram (deleted)";
        assert!(Maps::parse(ram).slabs.is_empty());
        assert_eq!(Maps::parse("/memfd:samepage-slab"), Maps::default());
        let several = format!("{LINE}\n{none}\n7f00-7f10 rw-s 00000000 00:01 7 /memfd:samepage-ram\n");
        let maps = Maps::parse(&several);
        assert_eq!((maps.count, maps.slabs.len(), maps.files), (3, 1, vec![Hva(0x7f00)..Hva(0x7f10)]));
    }

    #[test]
    fn a_name_alone_makes_no_slab() {
        // 1 TiB on; and more pages than a slab has.
        for far in [
            LINE.replace("00003000", "10000000000"),
            LINE.replace("00003000", "fffffffffffff000"),
            LINE.replace("7f12a0040000", "7f13a0040000"),
        ] {
            let maps = Maps::parse(&far);
            assert_eq!((maps.slabs.len(), maps.files.len()), (0, 1), "{far}");
        }
    }

    #[test]
    fn a_page_is_found_in_its_mapping() {
        let maps = Maps::parse(LINE);
        let hva = Hva(0x7f12_a000_2000);
        assert_eq!(maps.slab_at(hva).map(|m| m.slab_page(hva)), Some(SlabPage(5)));
        assert!(maps.slab_at(Hva(0x7f12_a004_0000)).is_none() && maps.slab_at(Hva(0)).is_none());
    }
}
