//! The use of a frame by a guest's kernel, from its `/proc/kpageflags`.
//!
//! Source: the kernel's Documentation/admin-guide/mm/pagemap.rst and
//! include/uapi/linux/kernel-page-flags.h.

use core::fmt;

/// What a frame is used for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PageType {
    /// Nothing: the page allocator has it.
    Free,
    /// The kernel's small objects.
    Slab,
    /// Page tables of processes.
    PageTable,
    /// Memory of processes that no file is behind.
    Anonymous,
    /// Pages of files, of tmpfs too.
    PageCache,
    /// In the balloon, or taken offline otherwise.
    Offline,
    /// Any other use by the kernel: its code and data, stacks, buffers, firmware's reservations;
    /// and free pages on a processor's list, which it does not mark.
    Kernel,
    /// The kernel knows of no memory there.
    Hole,
}

// Bits of an entry.
const LRU: u64 = 1 << 5;
const SLAB: u64 = 1 << 7;
const BUDDY: u64 = 1 << 10;
const ANON: u64 = 1 << 12;
const SWAPCACHE: u64 = 1 << 13;
const SWAPBACKED: u64 = 1 << 14;
const UNEVICTABLE: u64 = 1 << 18;
const NOPAGE: u64 = 1 << 20;
const THP: u64 = 1 << 22;
const OFFLINE: u64 = 1 << 23;
const PGTABLE: u64 = 1 << 26;

impl PageType {
    /// All of them, in the order of reports.
    pub const ALL: [PageType; 8] = [
        Self::Free,
        Self::Slab,
        Self::PageTable,
        Self::Anonymous,
        Self::PageCache,
        Self::Offline,
        Self::Kernel,
        Self::Hole,
    ];

    /// Its number in tables by type: its place in [`Self::ALL`].
    pub const fn code(self) -> usize {
        self as usize
    }

    /// Its name in reports.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Free => "free",
            Self::Slab => "slab",
            Self::PageTable => "page tables",
            Self::Anonymous => "anonymous",
            Self::PageCache => "page cache",
            Self::Offline => "balloon",
            Self::Kernel => "kernel, other",
            Self::Hole => "not in its map",
        }
    }

    /// Its letter on the wire.
    pub const fn letter(self) -> char {
        match self {
            Self::Free => 'f',
            Self::Slab => 's',
            Self::PageTable => 't',
            Self::Anonymous => 'a',
            Self::PageCache => 'c',
            Self::Offline => 'o',
            Self::Kernel => 'k',
            Self::Hole => 'h',
        }
    }

    /// The type with this letter.
    pub fn from_letter(letter: char) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.letter() == letter)
    }

    /// By an entry of `/proc/kpageflags`.
    pub fn from_flags(flags: u64) -> Self {
        let has = |bits: u64| flags & bits != 0;
        if has(NOPAGE) {
            Self::Hole
        } else if has(OFFLINE) {
            Self::Offline
        } else if has(BUDDY) {
            Self::Free
        } else if has(SLAB) {
            Self::Slab
        } else if has(PGTABLE) {
            Self::PageTable
        } else if has(ANON | SWAPCACHE) {
            Self::Anonymous
        // A page on an LRU list, or unevictable, belongs to a file, or to shared memory, which swap
        // backs. Before 6.9 the later pages of a file's huge page have no more flags than that.
        } else if has(LRU | UNEVICTABLE | SWAPBACKED | THP) {
            Self::PageCache
        } else {
            Self::Kernel
        }
    }
}

impl fmt::Display for PageType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_as_kernels_show_them_are_told_apart() {
        // As fs/proc/page.c of the kernel sets them.
        for (flags, kind) in [
            (1 << 20, PageType::Hole),
            (1 << 32, PageType::Kernel),
            (0, PageType::Kernel),
            (1 << 10, PageType::Free),
            // slab, also of several pages
            (1 << 7, PageType::Slab),
            (1 << 7 | 1 << 15, PageType::Slab),
            // mmap, pgtable
            (1 << 26 | 1 << 11, PageType::PageTable),
            // uptodate, lru, active, mmap, anonymous, swapbacked; and one of KSM
            (1 << 3 | 1 << 5 | 1 << 6 | 1 << 11 | 1 << 12 | 1 << 14, PageType::Anonymous),
            (1 << 11 | 1 << 12 | 1 << 21, PageType::Anonymous),
            // a file's; one of tmpfs; one of an initramfs
            (1 << 2 | 1 << 3 | 1 << 5 | 1 << 34, PageType::PageCache),
            (1 << 3 | 1 << 5 | 1 << 14, PageType::PageCache),
            (1 << 3 | 1 << 4 | 1 << 18, PageType::PageCache),
            // in the balloon: offline, which may carry others
            (1 << 23 | 1 << 11, PageType::Offline),
            // mapped, and no more: the kernel's, for its processes to see
            (1 << 11, PageType::Kernel),
        ] {
            assert_eq!(PageType::from_flags(flags), kind, "{flags:#x}");
        }
    }

    #[test]
    fn codes_letters_and_names_are_different() {
        for (code, kind) in PageType::ALL.into_iter().enumerate() {
            assert_eq!((kind.code(), PageType::from_letter(kind.letter())), (code, Some(kind)));
            assert_eq!(PageType::ALL.into_iter().filter(|other| other.name() == kind.name()).count(), 1);
        }
        assert_eq!(PageType::from_letter('x'), None);
    }
}
