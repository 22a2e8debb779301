//! Which contents there are: a hash table of tags in bounded memory.
//!
//! An entry takes 18 bytes. Tables grow by a quarter, each by itself and at another moment than the
//! others, so that the whole has some 23 bytes for each content, and never stands in memory twice.
//! When the limit is reached, the index drops the upper half of the contents that it keeps (by
//! [`slice`] of their tags), and goes on with the lower half, of which it has seen everything: the
//! rest is for another pass. So the result is exact, and memory buys passes.
//!
//! A table has entries in groups of 16, each with a [mark](super::marks) that is compared before it
//! is: so a search reads one line of marks and, if the content is known, one of entries (the way of
//! Abseil's "Swiss tables"; its branches could not be predicted either, so there is none for each
//! entry).

use std::ops::Range;

use super::marks::{GROUP, Marks};
use super::sets::SetId;
use super::tag::{KEPT_BITS, Tag, prefetch};

/// Tables, by the low bits of a tag.
const TABLES: usize = 256;
/// Slices that a pass can be cut into.
pub const SLICES: u32 = 1 << 15;
/// The fewest groups of a table.
const LEAST: usize = 2;
/// Parts that a group is counted in, so that a quarter more is a quarter more of a small table,
/// too.
const PARTS: usize = 1024;

/// A content: 72 bits of its tag (7 more are its mark, 8 the number of its table), its set of
/// holders, where it was seen first.
#[derive(Clone, Copy, Debug)]
#[repr(C, packed)]
struct Entry {
    first: u64,
    second: u8,
    /// A [`SetId`].
    set: u32,
    at: u32,
}

impl Entry {
    const EMPTY: Self = Self { first: 0, second: 0, set: SetId::NONE.0, at: 0 };
}

/// With its mark.
const ENTRY_BYTES: u64 = 18;
const _: () = assert!(size_of::<Entry>() as u64 + 1 == ENTRY_BYTES);

/// An empty index, and the least that one may be limited to.
const LEAST_BYTES: u64 = (TABLES * LEAST * GROUP) as u64 * ENTRY_BYTES;
pub const LEAST_LIMIT_BYTES: u64 = 2 * LEAST_BYTES;

/// What a tag is kept as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Kept {
    table: usize,
    /// The rest of the tag's first number, and 11 bits of the second.
    first: u64,
    /// 8 bits more of it.
    second: u8,
    /// 7 bits more of it; the highest one says that there is an entry.
    mark: u8,
}

const _: () = assert!(TABLES.ilog2() + 53 + 11 + 8 + 7 == KEPT_BITS);

#[inline]
fn kept(Tag([first, second]): Tag) -> Kept {
    Kept {
        table: first as usize % TABLES,
        first: first >> 8 << 11 | second & 0x7ff,
        second: (second >> 11) as u8,
        mark: Marks::TAKEN | (second >> 19) as u8,
    }
}

/// Which part of all contents this one belongs to, 0 to [`SLICES`].
#[inline]
pub fn slice(tag: Tag) -> u32 {
    let Kept { second, mark, .. } = kept(tag);
    slice_of(second, mark)
}

#[inline]
fn slice_of(second: u8, mark: u8) -> u32 {
    u32::from(second) << 7 | u32::from(mark & !Marks::TAKEN)
}

/// A content that the index has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Known {
    /// The guests that held it before this page.
    pub set: SetId,
    /// The number of the page that had it first.
    pub at: u32,
}

/// The index is full; [`Index::narrow`] makes room.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Full;

/// Entries, each in its home group or, where that was full, in the first group behind it that was
/// not; the last group is followed by the first. Entries are never removed, so a group is filled
/// from its beginning, and a search ends at the first group that has room.
struct Table {
    marks: Vec<Marks>,
    entries: Vec<[Entry; GROUP]>,
    used: usize,
    /// How many groups, in parts of one.
    size: usize,
}

impl Table {
    fn new(size: usize) -> Self {
        let groups = size / PARTS;
        Self {
            marks: vec![Marks::default(); groups],
            entries: vec![[Entry::EMPTY; GROUP]; groups],
            used: 0,
            size,
        }
    }

    /// The size of the `nth` of all tables when it is new. Each is a little larger than the one
    /// before, the last one almost a quarter larger than the first; so they grow one after the
    /// other.
    fn first_size(nth: usize) -> usize {
        LEAST * PARTS + LEAST * PARTS / 4 * nth / TABLES
    }

    /// A quarter more.
    fn next_size(size: usize) -> usize {
        size + size / 4
    }

    fn bytes_of(size: usize) -> u64 {
        (size / PARTS * GROUP) as u64 * ENTRY_BYTES
    }

    /// Whether `used` entries are too many for this size: beyond seven eighths, searches are long.
    fn is_full(used: usize, size: usize) -> bool {
        used * 8 >= size / PARTS * GROUP * 7
    }

    fn home(first: u64, groups: usize) -> usize {
        ((u128::from(first) * groups as u128) >> 64) as usize
    }

    fn behind(group: usize, groups: usize) -> usize {
        if group + 1 == groups { 0 } else { group + 1 }
    }

    /// Where it is, or else where it belongs: group and place in it, and whether it is there. A
    /// table has room.
    #[inline]
    fn find(&self, kept: Kept) -> (usize, usize, bool) {
        let groups = self.marks.len();
        let mut group = Self::home(kept.first, groups);
        loop {
            let marks = &self.marks[group];
            for place in marks.equal(kept.mark) {
                let entry = &self.entries[group][place];
                if (entry.first, entry.second) == (kept.first, kept.second) {
                    return (group, place, true);
                }
            }
            if let Some(place) = marks.empty().next() {
                return (group, place, false);
            }
            group = Self::behind(group, groups);
        }
    }

    /// The least size from this one on that leaves room for `used` entries.
    fn size_with_room(mut size: usize, used: usize) -> usize {
        while Self::is_full(used, size) {
            size = Self::next_size(size);
        }
        size
    }

    /// Its marks and entries.
    fn contents(&self) -> impl Iterator<Item = (u8, &Entry)> {
        let groups = self.marks.iter().zip(&self.entries);
        groups.flat_map(|(marks, entries)| marks.taken().zip(entries))
    }

    /// A table of this size with the entries that `keep` accepts.
    fn resized(&self, size: usize, keep: impl Fn(u8, &Entry) -> bool) -> Self {
        let mut table = Self::new(size);
        let groups = table.marks.len();
        // How full each group is: marks that have just been written would have to be waited for.
        let mut full = vec![0u8; groups];
        for (mark, entry) in self.contents().filter(|(mark, entry)| keep(*mark, entry)) {
            let mut group = Self::home(entry.first, groups);
            while usize::from(full[group]) == GROUP {
                group = Self::behind(group, groups);
            }
            let place = usize::from(full[group]);
            table.marks[group].set(place, mark);
            table.entries[group][place] = *entry;
            full[group] += 1;
            table.used += 1;
        }
        table
    }
}

/// Contents and their holders.
pub struct Index {
    tables: Vec<Table>,
    slices: Range<u32>,
    bytes: u64,
    peak_bytes: u64,
    limit_bytes: u64,
}

impl Index {
    /// An empty index of at most `limit_bytes`, for the contents of all slices.
    pub fn new(limit_bytes: u64) -> Self {
        let limit_bytes = limit_bytes.max(LEAST_LIMIT_BYTES);
        let mut index =
            Self { tables: Vec::new(), slices: 0..SLICES, bytes: 0, peak_bytes: LEAST_BYTES, limit_bytes };
        index.restart(0..SLICES);
        index
    }

    /// The slices that it keeps.
    pub fn slices(&self) -> Range<u32> {
        self.slices.clone()
    }

    /// The most memory that it ever had, in bytes.
    pub fn peak_bytes(&self) -> u64 {
        self.peak_bytes
    }

    /// Begins another pass, over these slices.
    pub fn restart(&mut self, slices: Range<u32>) {
        self.tables = (0..TABLES).map(|nth| Table::new(Table::first_size(nth))).collect();
        self.bytes = LEAST_BYTES;
        self.slices = slices;
    }

    /// Has the processor fetch the marks that a search for `tag` reads.
    #[inline]
    pub fn prefetch_marks(&self, tag: Tag) {
        let kept = kept(tag);
        let marks = &self.tables[kept.table].marks;
        prefetch((&raw const marks[Table::home(kept.first, marks.len())]).cast());
    }

    /// Has it fetch the entry where that search will most likely end. Reads the marks.
    #[inline]
    pub fn prefetch_entry(&self, tag: Tag) {
        let kept = kept(tag);
        let table = &self.tables[kept.table];
        let group = Table::home(kept.first, table.marks.len());
        let marks = &table.marks[group];
        let place = marks.equal(kept.mark).next().or_else(|| marks.empty().next());
        prefetch((&raw const table.entries[group][place.unwrap_or_default()]).cast());
    }

    /// Looks up `tag`, whose slice must be one that is kept. A known content gets the set that
    /// `holders` makes of its own; a new one is entered with the set that it makes of
    /// [`SetId::NONE`], as first seen in page `at`.
    #[inline]
    pub fn look_up(
        &mut self,
        tag: Tag,
        at: u32,
        mut holders: impl FnMut(SetId) -> SetId,
    ) -> Result<Option<Known>, Full> {
        let kept = kept(tag);
        let table = &mut self.tables[kept.table];
        let (mut group, mut place, known) = table.find(kept);
        if known {
            let entry = &mut table.entries[group][place];
            let known = Known { set: SetId(entry.set), at: entry.at };
            entry.set = holders(known.set).0;
            return Ok(Some(known));
        }
        if Table::is_full(table.used, table.size) {
            self.grow(kept.table)?;
            (group, place, _) = self.tables[kept.table].find(kept);
        }
        let table = &mut self.tables[kept.table];
        let Kept { first, second, mark, .. } = kept;
        table.marks[group].set(place, mark);
        table.entries[group][place] = Entry { first, second, set: holders(SetId::NONE).0, at };
        table.used += 1;
        Ok(None)
    }

    /// Makes room in one table.
    #[cold]
    fn grow(&mut self, table: usize) -> Result<(), Full> {
        let table = &mut self.tables[table];
        let size = Table::size_with_room(table.size, table.used);
        // A table that is being moved is in memory twice.
        let moving = self.bytes + Table::bytes_of(size);
        if moving > self.limit_bytes && self.slices.len() > 1 {
            return Err(Full);
        }
        self.peak_bytes = self.peak_bytes.max(moving);
        self.bytes = moving - Table::bytes_of(table.size);
        *table = table.resized(size, |_, _| true);
        Ok(())
    }

    /// Drops the contents in the upper half of its slices. False if it could not: one slice is not
    /// divided.
    pub fn narrow(&mut self) -> bool {
        let half = self.slices.len() as u32 / 2;
        if half == 0 {
            return false;
        }
        self.slices.end = self.slices.start + half;
        let end = self.slices.end;
        for (nth, table) in self.tables.iter_mut().enumerate() {
            let keep = |mark: u8, entry: &Entry| slice_of(entry.second, mark) < end;
            let kept = table.contents().filter(|(mark, entry)| keep(*mark, entry)).count();
            // A size that it once had, so that tables still grow one after the other.
            let size = Table::size_with_room(Table::first_size(nth), kept);
            *table = table.resized(size, keep);
        }
        self.bytes = self.tables.iter().map(|table| Table::bytes_of(table.size)).sum();
        true
    }

    /// The set of holders of each content.
    pub fn holders(&self) -> impl Iterator<Item = SetId> {
        self.tables.iter().flat_map(Table::contents).map(|(_, entry)| SetId(entry.set))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashMap;

    /// One to one, so that different numbers are different tags.
    fn tag(number: u64) -> Tag {
        let mix = |mut x: u64| {
            x = (x ^ x >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            x = (x ^ x >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
            (x ^ x >> 31) >> 3
        };
        Tag([mix(number), mix(!number)])
    }

    #[test]
    fn it_knows_what_a_map_knows_and_keeps_to_24_bytes() {
        let mut index = Index::new(u64::MAX);
        let mut map = HashMap::new();
        for at in 0..300_000u32 {
            let number = u64::from(at).wrapping_mul(0x9e37_79b9) % 200_000;
            let found = index.look_up(tag(number), at, |_| SetId(1)).unwrap();
            let expected = map.get(&number).map(|at| Known { set: SetId(1), at: *at });
            assert_eq!(found, expected, "{number}");
            map.entry(number).or_insert(at);
        }
        assert_eq!(index.holders().count(), map.len());
        let each = index.peak_bytes() as f64 / map.len() as f64;
        assert!((18.0..24.2).contains(&each), "{each} bytes");
    }

    #[test]
    fn a_full_index_keeps_to_its_limit_and_knows_all_of_what_it_keeps() {
        let limit = 1 << 20;
        let mut index = Index::new(limit);
        let contents = 200_000;
        let mut known = 0;
        let mut passes = 0;
        let mut slices = 0..SLICES;
        while slices.start < SLICES {
            index.restart(slices);
            for round in 0..2u32 {
                for at in 0..contents {
                    while index.slices().contains(&slice(tag(at.into()))) {
                        match index.look_up(tag(at.into()), at, |set| SetId(set.0.max(round + 1))) {
                            Ok(_) => break,
                            Err(Full) => assert!(index.narrow()),
                        }
                    }
                }
            }
            assert!(index.holders().all(|set| set == SetId(2)), "what is kept was seen in both rounds");
            known += index.holders().count();
            passes += 1;
            let done = index.slices();
            slices = done.end..(done.end + done.len() as u32).min(SLICES);
        }
        assert_eq!(known, contents as usize);
        assert!(passes > 2 && index.peak_bytes() <= limit, "{passes} passes, {} bytes", index.peak_bytes());
    }
}
