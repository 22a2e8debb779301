//! Free pages that stay the guest's: reporting (5.5.6.5) and hinting (5.5.6.4).
//!
//! Reporting covers pages that were written, once each until they are written again. The host
//! empties them; they are not used until it has acknowledged that. Hinting covers all free pages
//! when the host asks. It may empty them until it is done; a fill takes them back before that, as
//! Linux does when it runs out of memory: a write of the whole page does not depend on its old
//! content.

use core::ops::Range;
use core::sync::atomic::Ordering;

use super::{Driver, HINT_WORD, Rings};
use crate::content::PAGE_SIZE;
use crate::in_use::InUse;
use crate::protocol::Hinting;
use crate::virtio::Transport;
use crate::virtio::ring::{Buffer, ENTRIES_MAX, Ring, Unusable};

/// Pages in one descriptor: 4 MiB, Linux's largest block.
const RANGE_PAGES: u64 = 1024;
/// Descriptors in one report: Linux's number.
const REPORT_RANGES: usize = 32;
/// What the host asks for in `free_page_hint_cmd_id` when it wants no more hints.
const CMD_STOP: u32 = 0;
/// The same when hinted pages are the guest's again.
const CMD_DONE: u32 = 1;

/// Ranges sent to the device and not used by it yet.
#[derive(Debug, Default)]
pub(super) struct Told {
    ranges: [Range<u64>; ENTRIES_MAX as usize],
    len: usize,
}

impl Told {
    fn ranges(&self) -> &[Range<u64>] {
        &self.ranges[..self.len]
    }

    /// How many pages they have.
    fn pages(&self) -> u64 {
        self.ranges().iter().map(|range| range.end - range.start).sum()
    }

    /// Whether one of them begins below `page`.
    pub(super) fn reaches_below(&self, page: u64) -> bool {
        self.ranges().iter().any(|range| range.start < page)
    }

    fn push(&mut self, range: Range<u64>) {
        if let Some(slot) = self.ranges.get_mut(self.len) {
            *slot = range;
            self.len += 1;
        }
    }
}

/// A run of hinting.
#[derive(Debug, Default)]
pub(super) struct Hints {
    /// What the host last asked for.
    pub(super) host_cmd: u32,
    /// What it asked for in the run that was last begun.
    run: Option<u32>,
    stage: Stage,
    told: Told,
    /// The next page to look at.
    next: u64,
    /// Pages hinted in this run that are not the guest's again.
    pub(super) pages: u64,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Stage {
    #[default]
    Idle,
    Hinting,
    Stopping,
    Finished,
}

impl Hints {
    pub(super) fn stands(&self) -> Hinting {
        match self.stage {
            Stage::Idle => Hinting::Idle,
            Stage::Hinting | Stage::Stopping => Hinting::Running,
            Stage::Finished => Hinting::Finished,
        }
    }

    /// Whether pages below `page` are with the device.
    pub(super) fn reaches_below(&self, page: u64) -> bool {
        self.told.reaches_below(page)
    }

    /// Hinted pages are being written: they are the guest's again.
    pub(super) fn take_back(&mut self) {
        self.pages = 0;
        if self.stage == Stage::Finished {
            self.stage = Stage::Idle;
        }
    }
}

impl<T: Transport> Driver<'_, T> {
    /// Goes on with reporting. True if a report is out afterwards.
    pub(super) fn step_reporting(&mut self, rings: &mut Rings<'_>, in_use: &InUse) -> Result<bool, Unusable> {
        let Some(ring) = &mut rings.reporting else { return Ok(false) };
        if self.report.len > 0 {
            if !ring.all_used()? {
                return Ok(true);
            }
            self.reported_pages += self.report.pages();
            for range in self.report.ranges() {
                self.pages.set_touched(range.clone(), false);
            }
            self.report.len = 0;
        }
        if ring.in_flight() > 0 {
            return Ok(false);
        }
        let Some(mut from) = self.report_from else { return Ok(false) };
        let mut buffers = [Buffer { gpa: 0, len_bytes: 0, writable: true }; REPORT_RANGES];
        let most = ring.entries().min(REPORT_RANGES);
        while self.report.len < most
            && let Some(range) = self.pages.next_free_touched(from, RANGE_PAGES, in_use, true)
        {
            from = range.end;
            buffers[self.report.len] = self.buffer(&range);
            self.report.push(range);
        }
        if self.report.len == 0 {
            self.report_from = None;
            return Ok(false);
        }
        self.report_from = Some(from);
        // There is room: nothing else is out.
        let _ = ring.add(&buffers[..self.report.len]);
        ring.notify(&mut self.transport);
        Ok(true)
    }

    /// Goes on with hinting. True if a hint is out afterwards.
    pub(super) fn step_hinting(&mut self, rings: &mut Rings<'_>, in_use: &InUse) -> Result<bool, Unusable> {
        let Some(ring) = &mut rings.hinting else { return Ok(false) };
        let out = self.hints.told.len > 0 || matches!(self.hints.stage, Stage::Hinting | Stage::Stopping);
        if out && !ring.all_used()? {
            return Ok(true);
        }
        if ring.in_flight() > 0 {
            return Ok(false);
        }
        self.hints.pages += self.hints.told.pages();
        self.hints.told.len = 0;
        if self.hints.stage == Stage::Stopping {
            self.hints.stage = Stage::Finished;
        }
        if self.hints.stage == Stage::Hinting {
            if self.hints.run != Some(self.hints.host_cmd) || !self.hint_ranges(ring, in_use) {
                self.hints.stage = Stage::Stopping;
                self.send_command(ring, CMD_STOP);
            }
            return Ok(true);
        }
        match self.hints.host_cmd {
            CMD_STOP => {}
            CMD_DONE => self.hints.take_back(),
            cmd if self.hints.run == Some(cmd) => {}
            cmd => {
                self.hints.run = Some(cmd);
                self.hints.stage = Stage::Hinting;
                (self.hints.next, self.hints.pages) = (0, 0);
                self.send_command(ring, cmd);
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Hints the next free ranges, as many as the ring takes. False if there are none.
    fn hint_ranges(&mut self, ring: &mut Ring<'_>, in_use: &InUse) -> bool {
        while self.hints.told.len < ring.entries()
            && let Some(range) = self.pages.next_free(self.hints.next, RANGE_PAGES, in_use)
        {
            self.hints.next = range.end;
            // There is room: nothing else is out.
            let _ = ring.add(&[self.buffer(&range)]);
            self.hints.told.push(range);
        }
        ring.notify(&mut self.transport);
        self.hints.told.len > 0
    }

    fn send_command(&mut self, ring: &mut Ring<'_>, command: u32) {
        self.words[HINT_WORD].store(command, Ordering::Relaxed);
        let gpa = self.gpa + 4 * HINT_WORD as u64;
        // There is room: nothing else is out.
        let _ = ring.add(&[Buffer { gpa, len_bytes: 4, writable: false }]);
        ring.notify(&mut self.transport);
    }

    /// Free pages are for the device to write: what they hold does not matter.
    fn buffer(&self, range: &Range<u64>) -> Buffer {
        let len_bytes = (range.end - range.start) as u32 * PAGE_SIZE as u32;
        Buffer { gpa: self.pages.frames().gpa(range.start), len_bytes, writable: true }
    }
}
