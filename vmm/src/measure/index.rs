//! Which contents there are: an open-addressing table of tags in bounded memory.
//!
//! An entry has 18 bytes; tables grow by an eighth, each by itself, so that the whole has 21 to 24 bytes for each content
//! and no moment when it stands in memory twice. When the limit is reached, the index lets go of the upper half of the
//! contents that it keeps (by [`slice`] of their tags), and goes on with the lower half, of which it has seen everything: the
//! rest is for another pass. So the result is exact, and memory buys passes.

use std::ops::Range;

use super::sets::SetId;
use super::tag::{KEPT_BITS, Tag};

/// Tables, by the low bits of a tag.
const TABLES: usize = 256;
/// Slices that a pass can be cut into.
pub const SLICES: u32 = 1 << 16;
/// The fewest homes of a table, and entries behind its last home.
const LEAST: usize = 16;
const TAIL: usize = 16;

/// A content: 80 bits of its tag (8 more are the number of its table), who holds it, where it was seen first.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C, packed(2))]
struct Entry {
    first: u64,
    second: u16,
    /// A [`SetId`]; that of nobody in an empty entry.
    set: u32,
    at: u32,
}

impl Entry {
    fn is_empty(&self) -> bool {
        self.set == SetId::NONE.0
    }
}

const ENTRY_BYTES: u64 = 18;
const _: () = assert!(size_of::<Entry>() as u64 == ENTRY_BYTES);

const _: () = assert!(TABLES.ilog2() + 53 + 27 == KEPT_BITS);

/// An empty index, and the least that one may be limited to.
const LEAST_BYTES: u64 = (TABLES * (LEAST + TAIL)) as u64 * ENTRY_BYTES;
pub const LEAST_LIMIT_BYTES: u64 = 2 * LEAST_BYTES;

/// What a tag is kept as: 53 bits of its first number and 27 of the second.
fn kept(Tag([first, second]): Tag) -> (u64, u16) {
    (first >> 8 << 11 | second & 0x7ff, (second >> 11) as u16)
}

/// Which part of all contents this one belongs to, 0 to [`SLICES`].
pub fn slice(tag: Tag) -> u32 {
    u32::from(kept(tag).1)
}

/// A content that the index has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Known {
    /// Who held it before this page.
    pub set: SetId,
    /// The number of the page that had it first.
    pub at: u32,
}

/// The index is full; [`Index::narrow`] makes room.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Full;

/// Entries in the order of their tags, each at its home or as little behind it as those before it allow. So who is not
/// there is known after a few entries, and a larger table is filled from front to back.
#[derive(Default)]
struct Table {
    /// One for each home, and some behind the last.
    entries: Vec<Entry>,
    homes: usize,
    used: usize,
}

impl Table {
    fn new() -> Self {
        Self { entries: vec![Entry::default(); LEAST + TAIL], homes: LEAST, used: 0 }
    }

    /// Where an entry like this would be first; never less for a larger one.
    fn home(first: u64, homes: usize) -> usize {
        ((u128::from(first) * homes as u128) >> 64) as usize
    }

    /// Where it is, or where it belongs.
    #[inline]
    fn place(&self, first: u64, second: u16) -> usize {
        let from = Self::home(first, self.homes);
        let before = self.entries[from..].iter().position(|entry| {
            entry.is_empty() || entry.first > first || (entry.first == first && entry.second >= second)
        });
        before.map_or(self.entries.len(), |before| from + before)
    }

    /// Puts an entry where it belongs; what is there and behind moves on.
    fn insert(&mut self, place: usize, entry: Entry) {
        let empty = self.entries[place..].iter().position(Entry::is_empty);
        let empty = empty.map_or_else(
            || {
                let end = self.entries.len();
                self.entries.reserve_exact(TAIL);
                self.entries.resize(end + TAIL, Entry::default());
                end
            },
            |behind| place + behind,
        );
        self.entries.copy_within(place..empty, place + 1);
        self.entries[place] = entry;
        self.used += 1;
    }

    fn is_full(&self) -> bool {
        // 85 %: beyond that, what has to move is long.
        self.used * 20 >= self.homes * 17
    }

    fn next_homes(&self) -> usize {
        (self.homes * 9 / 8).max(LEAST)
    }

    fn bytes(&self) -> u64 {
        self.entries.len() as u64 * ENTRY_BYTES
    }

    /// Moves what `keep` keeps to a table of so many homes.
    fn resize(&mut self, homes: usize, keep: impl Fn(&Entry) -> bool) {
        let mut entries = Vec::with_capacity(homes + TAIL);
        self.used = 0;
        for entry in self.entries.iter().filter(|entry| !entry.is_empty() && keep(entry)) {
            let home = Self::home(entry.first, homes);
            if entries.len() < home {
                entries.resize(home, Entry::default());
            }
            entries.push(*entry);
            self.used += 1;
        }
        entries.resize(entries.len().max(homes + TAIL), Entry::default());
        (self.entries, self.homes) = (entries, homes);
    }
}

/// Contents, and who holds them.
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
        let tables = (0..TABLES).map(|_| Table::new()).collect();
        let limit_bytes = limit_bytes.max(LEAST_LIMIT_BYTES);
        Self { tables, slices: 0..SLICES, bytes: LEAST_BYTES, peak_bytes: LEAST_BYTES, limit_bytes }
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
        self.tables.iter_mut().for_each(|table| *table = Table::new());
        self.bytes = LEAST_BYTES;
        self.slices = slices;
    }

    /// Reads where `tag` would be, so that it is in the cache when it is asked for.
    #[inline]
    pub fn touch(&self, tag: Tag) -> u16 {
        let (first, _) = kept(tag);
        let table = &self.tables[tag.0[0] as usize % TABLES];
        table.entries[Table::home(first, table.homes)].second
    }

    /// Looks `tag` up, whose slice is one that is kept. A known content gets the set that `holders` makes of its own; a new
    /// one is entered with the set that it makes of [`SetId::NONE`], as first seen in page `at`.
    #[inline]
    pub fn look_up(
        &mut self,
        tag: Tag,
        at: u32,
        mut holders: impl FnMut(SetId) -> SetId,
    ) -> Result<Option<Known>, Full> {
        let (first, second) = kept(tag);
        let table = &mut self.tables[tag.0[0] as usize % TABLES];
        let mut place = table.place(first, second);
        if let Some(entry) = table.entries.get_mut(place)
            && !entry.is_empty()
            && (entry.first, entry.second) == (first, second)
        {
            let known = Known { set: SetId(entry.set), at: entry.at };
            entry.set = holders(known.set).0;
            return Ok(Some(known));
        }
        let before = table.bytes();
        if table.is_full() {
            let homes = table.next_homes();
            // While a table is moved it stands in memory twice.
            let moving = self.bytes + (homes + TAIL) as u64 * ENTRY_BYTES;
            if moving > self.limit_bytes && self.slices.len() > 1 {
                return Err(Full);
            }
            self.peak_bytes = self.peak_bytes.max(moving);
            table.resize(homes, |_| true);
            place = table.place(first, second);
        }
        table.insert(place, Entry { first, second, set: holders(SetId::NONE).0, at });
        self.bytes = self.bytes + table.bytes() - before;
        self.peak_bytes = self.peak_bytes.max(self.bytes);
        Ok(None)
    }

    /// Lets go of the contents in the upper half of its slices. Says whether it could: one slice is not divided.
    pub fn narrow(&mut self) -> bool {
        let half = self.slices.len() as u32 / 2;
        if half == 0 {
            return false;
        }
        self.slices.end = self.slices.start + half;
        let end = self.slices.end;
        for table in &mut self.tables {
            let keep = |entry: &Entry| u32::from(entry.second) < end;
            let kept = table.entries.iter().filter(|entry| !entry.is_empty() && keep(entry)).count();
            table.resize((kept * 9 / 7).max(LEAST), keep);
        }
        self.bytes = self.tables.iter().map(Table::bytes).sum();
        true
    }

    /// The contents that it has: who holds each.
    pub fn holders(&self) -> impl Iterator<Item = SetId> {
        let entries = self.tables.iter().flat_map(|table| &table.entries);
        entries.filter(|entry| !entry.is_empty()).map(|entry| SetId(entry.set))
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
