//! How a guest translates its addresses: its page tables, read as its processor would.
//!
//! Source: Intel SDM volume 3, chapter 5 (paging), 5.5.4 for the entries; AMD's are the same. What
//! is read is believed no more than a driver's ring: a table may lie outside RAM, point at itself,
//! or change meanwhile, and each look takes a bounded number of reads.

use serde::{Deserialize, Serialize};

const PRESENT: u64 = 1 << 0;
const WRITABLE: u64 = 1 << 1;
const USER: u64 = 1 << 2;
const HUGE: u64 = 1 << 7;
const NO_EXECUTE: u64 = 1 << 63;
/// Where an entry points: bits 12 to 51.
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;
const INDEX_BITS: u32 = 9;
const PAGE_BITS: u32 = 12;
/// Tables of the deepest kind, with 57 bits of address.
const MAX_LEVELS: u8 = 5;
/// Entries that one [`Paging::runs`] reads at the most: some milliseconds.
pub const MAX_READS: usize = 1 << 16;
/// Runs that it returns at the most.
pub const MAX_RUNS: usize = 256;

const CR0_WP: u64 = 1 << 16;
const CR0_PG: u64 = 1 << 31;
const CR4_LA57: u64 = 1 << 12;
const CR4_SMEP: u64 = 1 << 20;
const CR4_SMAP: u64 = 1 << 21;
const EFER_LMA: u64 = 1 << 10;
const EFER_NXE: u64 = 1 << 11;

/// A vCPU's paging: where its tables begin, and which rules hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Paging {
    /// The guest-physical address of the topmost table.
    pub root: u64,
    /// 4 or 5.
    pub levels: u8,
    /// Entries may forbid execution (EFER.NXE).
    pub no_execute: bool,
    /// Read-only pages are so for the kernel, too (CR0.WP).
    pub write_protect: bool,
    /// The kernel cannot execute user pages.
    pub smep: bool,
    /// The kernel cannot read or write user pages by accident.
    pub smap: bool,
}

/// An entry on the way to a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Step {
    /// 5 or 4 at the top, 1 for the entry of a 4 KiB page.
    pub level: u8,
    /// The guest-physical address of the table.
    pub table: u64,
    /// The entry's place in it, 0 to 511.
    pub index: u16,
    /// As it is.
    pub entry: u64,
}

/// What may be done with a page, by all entries on the way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rights {
    pub writable: bool,
    pub user: bool,
    pub executable: bool,
}

/// Where the way ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum End {
    /// A page.
    Page {
        /// The guest-physical address that was asked for.
        gpa: u64,
        /// 4 KiB, 2 MiB or 1 GiB.
        page_bytes: u64,
        rights: Rights,
    },
    /// The last entry says that nothing is there.
    NotPresent,
    /// The table that the last entry points to is not in RAM.
    NoTable {
        /// Where it should be.
        table: u64,
    },
}

/// The way to a page.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Walk {
    pub steps: Vec<Step>,
    pub end: End,
}

/// Addresses one after the other with the same rights, by pages of one size.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Run {
    /// The first address.
    pub start: u64,
    pub bytes: u64,
    pub page_bytes: u64,
    pub rights: Rights,
}

/// A part of the tables.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Runs {
    pub runs: Vec<Run>,
    /// Where the next part begins; None at the end.
    pub next: Option<u64>,
}

impl Paging {
    /// From control registers; None if the vCPU does not translate by 64-bit tables.
    pub fn of(cr0: u64, cr3: u64, cr4: u64, efer: u64) -> Option<Self> {
        if cr0 & CR0_PG == 0 || efer & EFER_LMA == 0 {
            return None;
        }
        Some(Self {
            root: cr3 & ADDRESS,
            levels: if cr4 & CR4_LA57 == 0 { 4 } else { MAX_LEVELS },
            no_execute: efer & EFER_NXE != 0,
            write_protect: cr0 & CR0_WP != 0,
            smep: cr4 & CR4_SMEP != 0,
            smap: cr4 & CR4_SMAP != 0,
        })
    }

    /// Bits of an address that are translated.
    fn bits(&self) -> u32 {
        PAGE_BITS + INDEX_BITS * u32::from(self.levels.min(MAX_LEVELS))
    }

    /// Whether the bits above those that are translated are as the highest of these.
    pub fn is_canonical(&self, address: u64) -> bool {
        self.extend(address) == address
    }

    fn extend(&self, address: u64) -> u64 {
        let unused = u64::BITS - self.bits();
        ((address << unused).cast_signed() >> unused).cast_unsigned()
    }

    /// The way to `address`. `read` gets an entry, None outside RAM.
    pub fn walk(&self, address: u64, read: impl Fn(u64) -> Option<u64>) -> Walk {
        let mut steps = Vec::with_capacity(usize::from(MAX_LEVELS));
        let mut table = self.root;
        let mut rights = Rights { writable: true, user: true, executable: true };
        for level in (1..=self.levels.min(MAX_LEVELS)).rev() {
            let shift = PAGE_BITS + INDEX_BITS * u32::from(level - 1);
            let index = (address >> shift) & ((1 << INDEX_BITS) - 1);
            let Some(entry) = read(table + index * 8) else {
                return Walk { steps, end: End::NoTable { table } };
            };
            // Nine bits.
            steps.push(Step { level, table, index: index as u16, entry });
            if entry & PRESENT == 0 {
                return Walk { steps, end: End::NotPresent };
            }
            rights.writable &= entry & WRITABLE != 0;
            rights.user &= entry & USER != 0;
            rights.executable &= !(self.no_execute && entry & NO_EXECUTE != 0);
            if level == 1 || (level <= 3 && entry & HUGE != 0) {
                let inside = (1 << shift) - 1;
                let gpa = (entry & ADDRESS & !inside) | (address & inside);
                return Walk { steps, end: End::Page { gpa, page_bytes: 1 << shift, rights } };
            }
            table = entry & ADDRESS;
        }
        // Not reached: level 1 ends it.
        Walk { steps, end: End::NotPresent }
    }

    /// What is mapped from `from` on, as far as that goes with [`MAX_READS`] and [`MAX_RUNS`].
    pub fn runs(&self, from: u64, read: impl Fn(u64) -> Option<u64>) -> Runs {
        let mut found = Runs::default();
        let (mut at, mut reads) = (self.extend(from) & !((1 << PAGE_BITS) - 1), 0);
        loop {
            let walk = self.walk(at, &read);
            // A table that is not there was asked for, too.
            reads += walk.steps.len() + 1;
            let level = match walk.end {
                End::NoTable { .. } => walk.steps.last().map_or(self.levels, |step| step.level),
                _ => walk.steps.last().map_or(1, |step| step.level),
            };
            // What the last entry stands for, all of it from here on.
            let span = 1 << (PAGE_BITS + INDEX_BITS * u32::from(level.max(1) - 1));
            let bytes = span - (at & (span - 1));
            if let End::Page { page_bytes, rights, .. } = walk.end {
                let is_full = found.runs.len() == MAX_RUNS;
                let joins = |run: &&mut Run| {
                    run.start.wrapping_add(run.bytes) == at
                        && (run.page_bytes, run.rights) == (page_bytes, rights)
                };
                match found.runs.last_mut().filter(joins) {
                    Some(run) => run.bytes += bytes,
                    None if is_full => {
                        found.next = Some(at);
                        return found;
                    }
                    None => found.runs.push(Run { start: at, bytes, page_bytes, rights }),
                }
            }
            // Behind the lower half comes the upper one; behind that, nothing.
            let next = self.extend(at.wrapping_add(bytes));
            if next <= at {
                return found;
            }
            at = next;
            if reads >= MAX_READS {
                found.next = Some(at);
                return found;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashMap;

    const LONG: (u64, u64) = (CR0_PG | CR0_WP, EFER_LMA | EFER_NXE);

    fn four_levels(root: u64) -> Paging {
        Paging::of(LONG.0, root, CR4_SMEP, LONG.1).unwrap()
    }

    fn set(memory: &mut HashMap<u64, u64>, table: u64, index: u64, entry: u64) {
        memory.insert(table + index * 8, entry);
    }

    /// Tables as RAM that reads as zeros where nothing was written, up to 1 MiB.
    fn reader(memory: &HashMap<u64, u64>) -> impl Fn(u64) -> Option<u64> + '_ {
        |at| (at < 1 << 20).then(|| memory.get(&at).copied().unwrap_or(0))
    }

    #[test]
    fn a_page_is_found_with_the_rights_of_all_its_entries() {
        let mut memory = HashMap::new();
        set(&mut memory, 0x1000, 0, 0x2000 | PRESENT | WRITABLE | USER);
        set(&mut memory, 0x2000, 3, 0x3000 | PRESENT | WRITABLE | USER);
        set(&mut memory, 0x3000, 5, 0x4000 | PRESENT | WRITABLE);
        set(&mut memory, 0x4000, 7, 0x9_9000 | PRESENT | USER | NO_EXECUTE);
        let address = (3 << 30) | (5 << 21) | (7 << 12) | 0x123;
        let walk = four_levels(0x1000).walk(address, reader(&memory));
        let rights = Rights { writable: false, user: false, executable: false };
        assert_eq!(walk.end, End::Page { gpa: 0x9_9123, page_bytes: 4096, rights });
        let way: Vec<_> = walk.steps.iter().map(|step| (step.level, step.table, step.index)).collect();
        assert_eq!(way, [(4, 0x1000, 0), (3, 0x2000, 3), (2, 0x3000, 5), (1, 0x4000, 7)]);
        // Without NXE the bit is reserved and says nothing.
        let older = Paging::of(LONG.0, 0x1000, 0, EFER_LMA).unwrap();
        assert!(
            matches!(older.walk(address, reader(&memory)).end, End::Page { rights, .. } if rights.executable)
        );
    }

    #[test]
    fn huge_pages_holes_and_tables_outside_ram_end_the_way() {
        let mut memory = HashMap::new();
        set(&mut memory, 0x1000, 511, 0x2000 | PRESENT | WRITABLE);
        set(&mut memory, 0x2000, 510, 0x8000_0000 | PRESENT | WRITABLE | HUGE);
        set(&mut memory, 0x2000, 511, 0x3000 | PRESENT);
        set(&mut memory, 0x3000, 0, 0x20_0000 | PRESENT | HUGE);
        set(&mut memory, 0x1000, 1, 0xffff_f000 | PRESENT);
        let paging = four_levels(0x1000);
        let end = |address| paging.walk(address, reader(&memory)).end;
        let writable = |writable| Rights { writable, user: false, executable: true };
        let giga = End::Page { gpa: 0x8123_4567, page_bytes: 1 << 30, rights: writable(true) };
        assert_eq!(end(0xffff_ffff_8123_4567), giga);
        let two = End::Page { gpa: 0x20_1234, page_bytes: 2 << 20, rights: writable(false) };
        assert_eq!(end(0xffff_ffff_c000_1234), two);
        assert_eq!(end(0), End::NotPresent);
        assert_eq!(end(1 << 39), End::NoTable { table: 0xffff_f000 });
        assert!(!paging.is_canonical(1 << 47) && paging.is_canonical(0xffff_8000_0000_0000));
        assert!(Paging::of(LONG.0, 0, CR4_LA57, LONG.1).unwrap().is_canonical(1 << 47));
        assert_eq!(Paging::of(0, 0x1000, 0, 0), None);
    }

    #[test]
    fn runs_are_joined_and_end_at_the_top() {
        let mut memory = HashMap::new();
        set(&mut memory, 0x1000, 0, 0x2000 | PRESENT | WRITABLE | USER);
        set(&mut memory, 0x1000, 511, 0x2000 | PRESENT | WRITABLE | USER);
        set(&mut memory, 0x2000, 0, 0x3000 | PRESENT | WRITABLE | USER);
        set(&mut memory, 0x3000, 0, 0x4000 | PRESENT | WRITABLE | USER);
        for index in 0..3 {
            set(&mut memory, 0x4000, index, (0x10_0000 + index * 4096) | PRESENT | WRITABLE | USER);
        }
        set(&mut memory, 0x4000, 3, 0x10_3000 | PRESENT | USER);
        set(&mut memory, 0x2000, 511, PRESENT | HUGE);
        let found = four_levels(0x1000).runs(0, reader(&memory));
        let starts: Vec<_> = found.runs.iter().map(|run| (run.start, run.bytes, run.page_bytes)).collect();
        let high = 0xffff_ff80_0000_0000;
        let low = [(0, 3 << 12, 4096), (3 << 12, 4096, 4096), (511 << 30, 1 << 30, 1 << 30)];
        let all: Vec<_> = low.iter().copied().chain(low.map(|(start, b, p)| (high + start, b, p))).collect();
        assert_eq!((starts, found.next), (all, None));
    }

    #[test]
    fn tables_that_point_at_themselves_are_read_in_bounded_parts() {
        let mut memory = HashMap::new();
        for index in 0..512 {
            let rights = if index % 2 == 0 { WRITABLE } else { 0 };
            set(&mut memory, 0x1000, index, 0x1000 | PRESENT | rights);
        }
        let paging = four_levels(0x1000);
        let (mut from, reads) = (0, std::cell::Cell::new(0));
        for _ in 0..50 {
            let part = paging.runs(from, |at| {
                reads.set(reads.get() + 1);
                reader(&memory)(at)
            });
            assert!(part.runs.len() <= MAX_RUNS && reads.take() <= MAX_READS + 8);
            let next = part.next.unwrap();
            assert!(next > from, "no progress at {from:#x}");
            from = next;
        }
    }
}
