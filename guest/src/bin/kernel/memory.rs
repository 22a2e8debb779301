//! The memory map, page tables for all RAM, and the array of pages that the workload gets.
#![expect(unsafe_code, reason = "physical memory, mapped to itself, is handed out here once")]

use core::ops::Range;
use core::ptr;
use core::slice;
use core::sync::atomic::{AtomicU64, Ordering, fence};

use guest::content::{PAGE_SIZE, Page};
use guest::virtio::balloon::{Frames, PageMap};
use guest::workload::Pages;

use crate::processors::{MAX_PROCESSORS, STACK_BYTES};

// Linux's boot protocol, Documentation/arch/x86/zero-page.rst.
const E820_COUNT: usize = 0x1e8;
const E820_TABLE: usize = 0x2d0;
const E820_ENTRY_SIZE: usize = 20;
const E820_ENTRIES_MAX: usize = 128;
const E820_RAM: u32 = 1;
const CMDLINE_POINTER: usize = 0x228;
const CMDLINE_MAX: usize = 4096;

/// Where the program begins.
const IMAGE_START: u64 = 1 << 20;

const GIB: u64 = 1 << 30;
const FOUR_GIB: u64 = 4 * GIB;
/// The gigabyte that the hole for devices is in.
const DEVICE_GIB: u64 = 3;
const LARGE_PAGE: u64 = 2 << 20;
/// One page of page directory pointers.
const MAPPED_MAX: u64 = 512 * GIB;
const TABLE_ENTRIES: u64 = 512;

/// Present, writable, for ring 3.
const TABLE: u64 = 0x7;
/// The same, and a large page.
const LARGE: u64 = 0x87;
/// The same, and not cached.
const LARGE_UNCACHED: u64 = 0x9f;

/// Bytes of device registers that are mapped: one large page.
pub(crate) const DEVICE_BYTES: u64 = LARGE_PAGE;

unsafe extern "C" {
    /// In `start.s`: maps gigabytes; only the first is there at the start.
    static mut page_directory_pointers: [u64; 512];
    /// From the linker script: the end of the image, its stack included.
    static __image_end: u8;
}

/// A page of page table entries.
#[repr(align(4096))]
struct Table([AtomicU64; TABLE_ENTRIES as usize]);

/// Maps device registers; used by [`map_devices`].
static DEVICES: Table = Table([const { AtomicU64::new(0) }; TABLE_ENTRIES as usize]);

/// The boot parameters that the VMM left.
pub(crate) struct BootParams {
    at: *const u8,
}

impl BootParams {
    /// # Safety
    /// `at` is what the VMM passed at entry: a page of boot parameters, and a command line where
    /// they say.
    pub(crate) unsafe fn new(at: *const u8) -> Self {
        Self { at }
    }

    fn read<T: Copy>(&self, offset: usize) -> T {
        // SAFETY: offsets are constants of the boot protocol or bounded by `E820_ENTRIES_MAX`, and
        // lie in the page; `T` is an integer. Fields are not aligned.
        unsafe { self.at.add(offset).cast::<T>().read_unaligned() }
    }

    /// The ranges of RAM.
    fn ram(&self) -> impl Iterator<Item = Range<u64>> {
        let count = usize::from(self.read::<u8>(E820_COUNT)).min(E820_ENTRIES_MAX);
        (0..count).map(|entry| E820_TABLE + entry * E820_ENTRY_SIZE).filter_map(|offset| {
            let (start, length) = (self.read::<u64>(offset), self.read::<u64>(offset + 8));
            (self.read::<u32>(offset + 16) == E820_RAM).then(|| start..start.saturating_add(length))
        })
    }

    /// The value of `name=N` on the command line.
    pub(crate) fn parameter(&self, name: &str) -> Option<u64> {
        self.text(name)?.parse().ok()
    }

    /// Where virtio-mmio windows are, and how many: `virtio_mmio=0xADDRESS:N` on the command line.
    pub(crate) fn virtio_mmio(&self) -> Option<(u64, u64)> {
        let (base, count) = self.text("virtio_mmio")?.split_once(':')?;
        Some((u64::from_str_radix(base.strip_prefix("0x")?, 16).ok()?, count.parse().ok()?))
    }

    /// The value of `name=TEXT` on the command line.
    fn text(&self, name: &str) -> Option<&str> {
        let at = self.read::<u32>(CMDLINE_POINTER) as usize as *const u8;
        if at.is_null() {
            return None;
        }
        // SAFETY: the VMM put a command line there, in the first gigabyte, which is mapped.
        let bytes = unsafe { slice::from_raw_parts(at, CMDLINE_MAX) };
        let line = bytes.split(|byte| *byte == 0).next().and_then(|line| str::from_utf8(line).ok())?;
        let mut values = line.split_ascii_whitespace().filter_map(|word| word.split_once('='));
        values.find(|(key, _)| *key == name).map(|(_, value)| value)
    }
}

/// The number in memory that the VMM changes before it lets a copy of this guest run.
pub(crate) struct Generation {
    at: Option<*const u64>,
    known: u64,
}

impl Generation {
    /// Where the command line says; if it says nothing, it never changes.
    pub(crate) fn of(boot: &BootParams) -> Self {
        // In the first mebibyte, which is mapped, and no page of the workload's.
        let at = boot.parameter("generation").filter(|at| at.is_multiple_of(8) && *at < IMAGE_START);
        let mut generation = Self { at: at.map(|at| at as *const u64), known: 0 };
        generation.known = generation.now();
        generation
    }

    fn now(&self) -> u64 {
        // SAFETY: an aligned word of mapped memory that only the VMM writes.
        self.at.map_or(0, |at| unsafe { ptr::read_volatile(at) })
    }

    /// The number, if it has changed since the last time.
    pub(crate) fn change(&mut self) -> Option<u64> {
        let now = self.now();
        (now != core::mem::replace(&mut self.known, now)).then_some(now)
    }
}

/// Everything that [`plan`] hands out.
pub(crate) struct Plan {
    /// The pages of the workload.
    pub(crate) pages: PhysicalPages,
    /// Room for a generation for each.
    pub(crate) generations: &'static mut [u32],
    /// Room for a [`PageMap`] of them. Not cleared.
    pub(crate) page_map: &'static mut [u64],
    /// Pages of RAM in all.
    pub(crate) mem_pages: u64,
    /// Where the stacks of the processors besides the first begin.
    pub(crate) stacks: u64,
}

/// The pages of the workload: from `base` to the end of the RAM below 4 GiB, and on from 4 GiB.
pub(crate) struct PhysicalPages {
    frames: Frames,
}

/// Why there is no plan.
pub(crate) enum Unfit {
    /// The memory map does not have the image in RAM.
    NoRam,
    /// Nothing is left behind the image and its tables.
    TooSmall {
        /// Bytes of RAM above 1 MiB.
        have: u64,
    },
}

/// Divides the RAM: behind the image come page directories, the tables by page, and the workload.
///
/// # Safety
/// Called once, before anything else uses memory outside the image.
pub(crate) unsafe fn plan(boot: &BootParams) -> Result<Plan, Unfit> {
    let image_end = ptr::addr_of!(__image_end) as u64;
    let low = boot.ram().find(|ram| ram.contains(&(image_end - 1))).ok_or(Unfit::NoRam)?;
    let low_end = low.end.min(FOUR_GIB);
    let high = boot.ram().find(|ram| ram.start == FOUR_GIB).unwrap_or(FOUR_GIB..FOUR_GIB);
    let high_end = high.end.min(MAPPED_MAX);
    let mem_pages = boot.ram().map(|ram| (ram.end - ram.start) / PAGE_SIZE as u64).sum();

    // SAFETY: the caller's promise: nothing uses the memory between the image and the end of its
    // range.
    let tables_end = unsafe { map(image_end, low_end, high_end) };
    let stacks = tables_end;
    let tables_end =
        stacks + STACK_BYTES * (boot.parameter("processors").unwrap_or(1).clamp(1, MAX_PROCESSORS) - 1);
    let room = (low_end.saturating_sub(tables_end) + (high_end - FOUR_GIB)) / PAGE_SIZE as u64;
    let generations_bytes = (room * size_of::<u32>() as u64).next_multiple_of(PAGE_SIZE as u64);
    let page_map_at = tables_end + generations_bytes;
    let page_map_words = PageMap::words(room);
    let base = page_map_at + (page_map_words as u64 * 8).next_multiple_of(PAGE_SIZE as u64);
    if base + PAGE_SIZE as u64 > low_end {
        return Err(Unfit::TooSmall { have: low.end - low.start });
    }
    let frames = Frames {
        base,
        low_count: (low_end - base) / PAGE_SIZE as u64,
        high_count: (high_end - FOUR_GIB) / PAGE_SIZE as u64,
    };
    // SAFETY: `room` entries fit between `tables_end` and `page_map_at`, which are RAM, mapped by
    // now, and unused. Any content is a valid `u32`.
    let generations = unsafe { slice::from_raw_parts_mut(tables_end as *mut u32, room as usize) };
    // SAFETY: as above, between `page_map_at` and `base`; any content is a valid `u64`.
    let page_map = unsafe { slice::from_raw_parts_mut(page_map_at as *mut u64, page_map_words) };
    Ok(Plan { pages: PhysicalPages { frames }, generations, page_map, mem_pages, stacks })
}

/// Identity-maps the RAM above the first gigabyte, with page directories from `at` on. Returns
/// their end.
///
/// # Safety
/// The RAM from `at` on is unused.
unsafe fn map(mut at: u64, low_end: u64, high_end: u64) -> u64 {
    let gibs = 1..MAPPED_MAX / GIB;
    let has_ram = |gib: &u64| {
        let start = gib * GIB;
        if start < FOUR_GIB { start < low_end } else { start < high_end }
    };
    for gib in gibs.filter(has_ram) {
        let directory = at as *mut u64;
        for entry in 0..TABLE_ENTRIES {
            // SAFETY: a page from `at` on, by the caller's promise; a large guest has room for its
            // tables.
            unsafe { directory.add(entry as usize).write(gib * GIB + entry * LARGE_PAGE + LARGE) };
        }
        // SAFETY: below 512. The processor reads this entry behind our back, but not before an
        // address in that gigabyte is used: nothing was mapped there, so nothing is cached.
        unsafe {
            ptr::addr_of_mut!(page_directory_pointers)
                .cast::<u64>()
                .add(gib as usize)
                .write_volatile(at + TABLE);
        }
        at += PAGE_SIZE as u64;
    }
    at
}

/// Identity-maps the large page of device registers around `address`, uncached. False if it is not
/// in the fourth gigabyte: no device of the VMM's is elsewhere, and no RAM is there.
pub(crate) fn map_devices(address: u64) -> bool {
    if address / GIB != DEVICE_GIB {
        return false;
    }
    let entry = (address % GIB / LARGE_PAGE) as usize;
    DEVICES.0[entry].store(address / LARGE_PAGE * LARGE_PAGE + LARGE_UNCACHED, Ordering::Relaxed);
    // SAFETY: below 512, and the processor reads it behind our back, as in `map`. `DEVICES` is part
    // of the image, which is mapped to itself; no RAM is mapped through this entry.
    unsafe {
        ptr::addr_of_mut!(page_directory_pointers)
            .cast::<u64>()
            .add(DEVICE_GIB as usize)
            .write_volatile(DEVICES.0.as_ptr() as u64 + TABLE);
    }
    // The first access must not come before the entries.
    fence(Ordering::SeqCst);
    true
}

impl PhysicalPages {
    pub(crate) fn frames(&self) -> Frames {
        self.frames
    }

    /// The addresses of these pages, as far as they are below 4 GiB.
    pub(crate) fn addresses(&self, pages: Range<u64>) -> Range<u64> {
        let low = |page: u64| self.frames.base + page.min(self.frames.low_count) * PAGE_SIZE as u64;
        low(pages.start)..low(pages.end)
    }

    /// Guest-physical address of the first page.
    pub(crate) fn base(&self) -> u64 {
        self.frames.base
    }
}

impl Pages for PhysicalPages {
    fn count(&self) -> u64 {
        self.frames.count()
    }

    fn page(&mut self, index: u64) -> &mut Page {
        assert!(index < self.count(), "page {index} of {}", self.count());
        let address = self.frames.gpa(index);
        // SAFETY: RAM that `plan` set aside for this array alone, mapped, page-aligned; `&mut self`
        // makes the borrow unique.
        unsafe { &mut *(address as *mut Page) }
    }

    /// The balloon driver asks which pages are free and gives them to the host. Without one they
    /// keep their content.
    fn release(&mut self, _pages: Range<u64>) {}
}
