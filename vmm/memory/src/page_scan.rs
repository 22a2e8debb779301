//! A fast look at a process's page table: which pages are there, and what kind they are, in ranges.
//!
//! By the PAGEMAP_SCAN ioctl (Linux 6.7), 0.03 to 0.08 us a page; on older kernels by reading
//! `/proc/self/pagemap`, which does not tell huge pages and zero pages from others. Like pagemap it
//! touches nothing and is no snapshot.
//!
//! Source: the kernel's include/uapi/linux/fs.h and Documentation/admin-guide/mm/pagemap.rst.
#![expect(unsafe_code, reason = "PAGEMAP_SCAN is an ioctl")]

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use super::page::to_usize;
use super::{Hva, PAGE, PAGE_BYTES};
use kernel_view::pagemap::{Pagemap, PagemapEntry};

/// `_IOWR('f', 16, struct pm_scan_arg)`.
const PAGEMAP_SCAN: libc::c_ulong = 0xc060_6610;
/// Regions the kernel may find in one call; then it is called again.
const MAX_REGIONS: usize = 1024;
/// Pages looked at in one call, 256 MiB, for the kernel holds mmap_lock meanwhile, which mapping
/// memory needs.
const MAX_CALL_PAGES: u64 = 1 << 16;

/// `struct pm_scan_arg`.
#[repr(C)]
#[derive(Debug, Default)]
struct ScanArg {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

const _: () = assert!(size_of::<ScanArg>() == 96);

/// `struct page_region`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
struct Region {
    start: u64,
    end: u64,
    categories: u64,
}

const _: () = assert!(size_of::<Region>() == 24);

/// What kind of pages they are. Those that were not asked for read as false.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Categories(u64);

impl Categories {
    const FILE: u64 = 1 << 2;
    const PRESENT: u64 = 1 << 3;
    const SWAPPED: u64 = 1 << 4;
    const ZERO: u64 = 1 << 5;
    const HUGE: u64 = 1 << 6;
    const ALL: u64 = Self::FILE | Self::PRESENT | Self::SWAPPED | Self::ZERO | Self::HUGE;

    /// They have frames; the zero page counts.
    pub fn present(self) -> bool {
        self.0 & Self::PRESENT != 0
    }

    /// The frames belong to a file: a slab's do, until the page is written and has a copy of its
    /// own.
    pub fn file(self) -> bool {
        self.0 & Self::FILE != 0
    }

    /// They are on swap. An absent page that carries a marker only may look so here.
    pub fn swapped(self) -> bool {
        self.0 & Self::SWAPPED != 0
    }

    /// They are the zero page. False on kernels without PAGEMAP_SCAN; some with it do not know the
    /// huge one.
    pub fn zero(self) -> bool {
        self.0 & Self::ZERO != 0
    }

    /// They are mapped as parts of huge pages. False on kernels without PAGEMAP_SCAN.
    pub fn huge(self) -> bool {
        self.0 & Self::HUGE != 0
    }

    fn of(entry: PagemapEntry) -> Self {
        let bits = [
            (entry.file_or_shared(), Self::FILE),
            (entry.present(), Self::PRESENT),
            (entry.swapped() || entry.is_marker(), Self::SWAPPED),
        ];
        Self(bits.into_iter().filter(|(is, _)| *is).map(|(_, bit)| bit).sum())
    }
}

/// Adjacent pages of one kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pages {
    /// Address of the first.
    pub hva: Hva,
    /// How many.
    pub pages: u64,
    /// What they are, of what was asked for.
    pub categories: Categories,
}

impl Pages {
    /// The address after the last.
    pub(super) fn end(&self) -> Hva {
        self.hva + self.pages * PAGE_BYTES
    }
}

/// Which pages are wanted: those in all of `all`, in none of `none`, and in one of `any` if it is
/// not empty; and which of their categories are reported.
#[derive(Clone, Copy, Debug, Default)]
struct Wanted {
    all: u64,
    none: u64,
    any: u64,
    reported: u64,
}

impl Wanted {
    fn has(self, found: Categories) -> bool {
        found.0 & self.all == self.all
            && found.0 & self.none == 0
            && (self.any == 0 || found.0 & self.any != 0)
    }
}

/// A way to look at this process's page table.
#[derive(Debug)]
pub struct PageScan(How);

#[derive(Debug)]
enum How {
    Scan { pagemap: File, regions: Vec<Region> },
    Entries { pagemap: Pagemap, entries: Vec<PagemapEntry> },
}

impl PageScan {
    /// Opens the page table of process `pid`. Needs what reading its pagemap needs.
    ///
    /// # Errors
    /// That is not allowed, the process has ended, or this kernel has no PAGEMAP_SCAN.
    pub fn open(pid: u32) -> io::Result<Self> {
        let pagemap = File::open(format!("/proc/{pid}/pagemap"))?;
        // A process that has ended has no page table, which reading tells and the ioctl must not be
        // asked: some kernels take what it is given for granted.
        match pagemap.read_at(&mut [0; 8], 0)? {
            0 => Err(io::Error::from_raw_os_error(libc::ESRCH)),
            _ => Self::by_ioctl(pagemap),
        }
    }

    fn by_ioctl(pagemap: File) -> io::Result<Self> {
        // Of no pages at all.
        scan(&pagemap, &mut ScanArg::default(), &mut [])?;
        Ok(Self(How::Scan { pagemap, regions: vec![Region::default(); MAX_REGIONS] }))
    }

    /// Opens our own page table, and finds out what this kernel has.
    pub fn open_self() -> io::Result<Self> {
        match Self::by_ioctl(File::open("/proc/self/pagemap")?) {
            Ok(scan) => Ok(scan),
            Err(error) if matches!(error.raw_os_error(), Some(libc::ENOTTY | libc::EINVAL)) => {
                Self::by_entries()
            }
            Err(error) => Err(error),
        }
    }

    fn by_entries() -> io::Result<Self> {
        let pagemap = Pagemap::open_self().map_err(io::Error::other)?;
        Ok(Self(How::Entries { pagemap, entries: Vec::new() }))
    }

    /// Calls `each` with the pages at the addresses `hvas` that have frames or are on swap, in
    /// order, adjacent ones of one kind together.
    pub fn walk(&mut self, hvas: Range<Hva>, each: impl FnMut(Pages)) -> io::Result<()> {
        let any = Categories::PRESENT | Categories::SWAPPED;
        self.find(hvas, Wanted { any, reported: Categories::ALL, ..Wanted::default() }, each)
    }

    /// As [`Self::walk`], for memory of which none is a file's: a third of the time, for the kernel
    /// need not look at the frames.
    pub fn anonymous_memory(&mut self, hvas: Range<Hva>, each: impl FnMut(Pages)) -> io::Result<()> {
        let any = Categories::PRESENT | Categories::SWAPPED;
        self.find(
            hvas,
            Wanted { any, reported: Categories::ALL & !Categories::FILE, ..Wanted::default() },
            each,
        )
    }

    /// Calls `each` with the pages whose frame is neither a file's nor the zero page: guest memory
    /// that may be worth merging. Of their categories only [`Categories::huge`] is reported.
    pub fn anonymous(&mut self, hvas: Range<Hva>, each: impl FnMut(Pages)) -> io::Result<()> {
        let none = Categories::FILE | Categories::ZERO;
        self.find(hvas, Wanted { all: Categories::PRESENT, none, any: 0, reported: Categories::HUGE }, each)
    }

    /// As [`Self::anonymous`], for pages of which none is a file's: a third of the time, for the
    /// kernel need not look at the frames.
    pub fn frames(&mut self, hvas: Range<Hva>, each: impl FnMut(Pages)) -> io::Result<()> {
        let none = Categories::ZERO;
        self.find(hvas, Wanted { all: Categories::PRESENT, none, any: 0, reported: Categories::HUGE }, each)
    }

    /// Calls `each` with the pages whose frame is a file's, as those of slabs are. None of their
    /// categories is reported.
    pub fn files(&mut self, hvas: Range<Hva>, each: impl FnMut(Pages)) -> io::Result<()> {
        let all = Categories::PRESENT | Categories::FILE;
        self.find(hvas, Wanted { all, ..Wanted::default() }, each)
    }

    fn find(&mut self, hvas: Range<Hva>, wanted: Wanted, mut each: impl FnMut(Pages)) -> io::Result<()> {
        if ![hvas.start, hvas.end].iter().all(|hva| hva.is_page()) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let mut open: Option<Pages> = None;
        let mut join = |found: Pages| match &mut open {
            Some(last) if last.end() == found.hva && last.categories == found.categories => {
                last.pages += found.pages
            }
            _ => open.replace(found).into_iter().for_each(&mut each),
        };
        let mut at = hvas.start;
        while at < hvas.end {
            let end = hvas.end.min(at.span(MAX_CALL_PAGES * PAGE_BYTES).end);
            at = match &mut self.0 {
                How::Scan { pagemap, regions } => scan_once(pagemap, regions, at..end, wanted, &mut join)?,
                How::Entries { pagemap, entries } => {
                    let pages = to_usize((end - at) / PAGE_BYTES);
                    pagemap.read(at, pages, entries).map_err(io::Error::other)?;
                    for (hva, entry) in (at.0..).step_by(PAGE).map(Hva).zip(&*entries) {
                        let found = Categories::of(*entry);
                        if wanted.has(found) {
                            join(Pages { hva, pages: 1, categories: Categories(found.0 & wanted.reported) });
                        }
                    }
                    end
                }
            };
        }
        open.into_iter().for_each(each);
        Ok(())
    }
}

/// One call for some of the pages at `hvas`. Returns where it ended.
fn scan_once(
    pagemap: &File,
    regions: &mut [Region],
    hvas: Range<Hva>,
    wanted: Wanted,
    found: &mut impl FnMut(Pages),
) -> io::Result<Hva> {
    let mut arg = ScanArg {
        start: hvas.start.0,
        end: hvas.end.0,
        category_inverted: wanted.none,
        category_mask: wanted.all | wanted.none,
        category_anyof_mask: wanted.any,
        return_mask: wanted.reported,
        ..ScanArg::default()
    };
    let count = scan(pagemap, &mut arg, regions)?;
    for region in regions.iter().take(count) {
        let pages = (region.end - region.start) / PAGE_BYTES;
        found(Pages { hva: Hva(region.start), pages, categories: Categories(region.categories) });
    }
    // It stops early only when there is no room for more. Where is not taken from `walk_end`:
    // kernels (6.18 at least) leave an older place in there when the walk has gone on to the end.
    match regions.last() {
        Some(last) if count == regions.len() && last.end > hvas.start.0 => Ok(Hva(last.end)),
        // Else we would be here for ever.
        Some(_) if count == regions.len() => Err(io::Error::other("PAGEMAP_SCAN did not get on")),
        _ => Ok(hvas.end),
    }
}

/// The ioctl. Returns how many of `regions` it has filled.
fn scan(pagemap: &File, arg: &mut ScanArg, regions: &mut [Region]) -> io::Result<usize> {
    arg.size = size_of::<ScanArg>() as u64;
    arg.vec_len = regions.len() as u64;
    arg.vec = if regions.is_empty() { 0 } else { Hva::of(regions.as_mut_ptr()).0 };
    // SAFETY: the kernel reads and writes one ScanArg, and at most `vec_len` regions where `vec`
    // says, all of which are exclusively ours. Without the flags for write protection it changes
    // nothing else.
    let count = unsafe { libc::ioctl(pagemap.as_raw_fd(), PAGEMAP_SCAN, arg) };
    usize::try_from(count).map_err(|_| io::Error::last_os_error())
}

#[cfg(test)]
mod tests;
