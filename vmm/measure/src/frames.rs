//! Which pages map which frame: every page of every guest in exactly one class, and what the
//! sharing saves.
//!
//! With CAP_SYS_ADMIN the answer is exact: pages are joined by frame number, and the host's frame
//! table says what else maps a frame. Without it the kernel hides frame numbers; then the pages
//! mapped once are still exact, pages of slabs are joined by their files, and the rest is split by
//! KSM's own counters and marked as an estimate.
//!
//! Not seen from here: a page of a file mapping that this process has not touched yet reads as
//! absent, even where its frame is in memory already.

use std::cell::LazyCell;
use std::collections::BTreeMap;
use std::ops::Deref;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::slab_runs::{SlabCounts, SlabRun};
use super::{MeasureError, Space, check};
use kernel_view::ksm_stat::{self, KsmStat};
use kernel_view::pagemap::{FrameFlags, FrameTable, PagemapEntry, PagemapError, Pfn};
use memory::Hva;
use memory::maps::Maps;

/// Frames looked up at a time.
const CHUNK_FRAMES: usize = 64 * 1024;
/// Bits of a sort key that name the guest: see [`super::MAX_SPACES`]. Of the frame number x86-64
/// has 40.
const GUEST_BITS: u32 = 16;
/// Bits below the frame number: the guest, and two for [`Kind`].
const KEY_BITS: u32 = GUEST_BITS + 2;

/// What a page that shares its frame belongs to, as far as the page table says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Anonymous = 0,
    File = 1,
    Slab = 2,
}

/// Shared pages by what shares them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SharedBy {
    /// KSM; None where neither the frames nor the process's own counters say.
    pub ksm: Option<u64>,
    pub slab: u64,
    /// Files, memfds and shared memory that are no slabs.
    pub file: u64,
    /// Anonymous memory that a fork has left shared; and KSM's, where that is not known.
    pub other: u64,
}

/// Pages by class. `total` is the sum of the others, always.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pages {
    /// Pages of guest memory.
    pub total: u64,
    /// Never touched, or given back.
    pub absent: u64,
    /// Of an image, and not touched yet: they lie in mappings of slabs and have no entry in the
    /// page table.
    #[serde(default, skip_serializing_if = "is_none")]
    pub image: u64,
    /// Mapping the kernel's zero frame.
    pub zero: u64,
    /// Alone on their frame.
    pub private: u64,
    /// On a frame that is mapped more than once, by any process.
    pub shared: u64,
    /// On swap.
    pub swapped: u64,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde asks so")]
fn is_none(pages: &u64) -> bool {
    *pages == 0
}

impl Pages {
    /// Pages that have a frame: zero, private and shared.
    pub fn present(&self) -> u64 {
        self.zero + self.private + self.shared
    }

    fn add(&mut self, other: &Self) {
        self.total += other.total;
        self.absent += other.absent;
        self.image += other.image;
        self.zero += other.zero;
        self.private += other.private;
        self.shared += other.shared;
        self.swapped += other.swapped;
    }
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct GuestFrames {
    pub name: String,
    pub pid: u32,
    /// Its pages by class.
    pub pages: Pages,
    /// Its part of the frames: a frame that n measured pages map counts 1/n for each. The sum over
    /// the guests is [`Frames::frames`].
    pub frames: f64,
    /// Present pages that are anonymous: all but those of files, which slabs are. The zero frame
    /// counts.
    pub anonymous: u64,
}

/// The frames of a fleet.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Frames {
    /// Each guest, in the order given.
    pub guests: Vec<GuestFrames>,
    pub pages: Pages,
    /// Distinct frames the present pages need, the zero frame not counted.
    pub frames: u64,
    /// How many of them are pages of slabs.
    #[serde(default)]
    pub slab_frames: u64,
    /// What sharing saves: pages on shared frames less these frames. Pages on the zero frame are
    /// not counted: reading memory that has no frame, such as zeros that were given back, adds to
    /// them.
    pub saved_pages: u64,
    /// Frames by how many pages of these guests map them, from 1 (shared only with processes
    /// outside) up. Private frames are not in here.
    pub shared_by: BTreeMap<u64, u64>,
    /// Shared frames that processes outside these guests map too.
    pub also_outside: u64,
    /// Shared pages by what shares them.
    #[serde(default)]
    pub shared_by_what: SharedBy,
    /// Zero and shared pages are distinguished by estimate, not frame by frame.
    pub estimated: bool,
    /// Notes for readers of the numbers.
    pub notes: Vec<String>,
}

/// One frame in the host's frame table.
#[derive(Clone, Copy, Debug, Default)]
struct FrameInfo {
    flags: FrameFlags,
    mappings: u64,
}

/// Classifies every page of `spaces`.
///
/// The guests may run meanwhile: a page that changes frames between two reads is counted where it
/// was when its entry was read. Memory needed: 8 bytes for each page that is not alone on its
/// frame.
pub fn measure(spaces: &[Space]) -> Result<Frames, MeasureError> {
    check(spaces)?;
    let mut census = Census::new(spaces);
    for (guest, space) in spaces.iter().enumerate() {
        // Only asked where frame numbers are hidden; where it cannot be read either, there is one
        // estimate more.
        let maps = LazyCell::new(|| Maps::of(space.pid).unwrap_or_default());
        space.each_entry(|hva, entry| census.count(guest, hva, entry, &maps))?;
    }
    census.finish(spaces)
}

/// Looks up in the host's books what is not known yet.
fn look_up(mut census: Census, spaces: &[Space]) -> Result<Frames, MeasureError> {
    // Opening the files and checking what they show costs as much as some frames.
    let mut table = match census.keys.is_empty() {
        true => return census.join(|_, _| Ok(())),
        false => FrameTable::open(),
    };
    if !table.as_mut().is_ok_and(FrameTable::tells_ksm) {
        let merging = |space: &Space| KsmStat::of(space.pid).ok().map(|stat| stat.merging_pages);
        census.ksm_by_counters = Some(spaces.iter().map(merging).collect());
    }
    let (mut flags, mut counts) = (Vec::new(), Vec::new());
    let mut frames = census.join(|batch, out| {
        out.clear();
        let Ok(table) = &mut table else {
            // Unknown: two mappings each, so that whatever is not exclusive counts as shared.
            out.resize(batch.len(), FrameInfo { flags: FrameFlags(0), mappings: 2 });
            return Ok(());
        };
        table.flags(batch, &mut flags)?;
        table.counts(batch, &mut counts)?;
        out.extend(flags.iter().zip(&counts).map(|(&flags, &mappings)| FrameInfo { flags, mappings }));
        Ok(())
    })?;
    if let Err(error) = table {
        frames.estimated = true;
        frames.notes.push(format!("zero pages are counted as shared: {error}"));
    }
    Ok(frames)
}

/// Present pages that are not alone on their frame and whose frame number the kernel hides.
#[derive(Clone, Copy, Debug, Default)]
struct Hidden {
    anonymous: u64,
    file: u64,
}

impl Hidden {
    fn any(self) -> bool {
        self.anonymous + self.file > 0
    }
}

/// The count while it is taken.
pub(super) struct Census {
    guests: Vec<GuestFrames>,
    hidden: Vec<Hidden>,
    /// Frame number and guest of each page that is not alone on its frame.
    keys: Vec<u64>,
    /// Where the kernel marks other frames as KSM's, too: how many pages of each process are KSM's,
    /// by its counters.
    ksm_by_counters: Option<Vec<Option<u64>>>,
    /// File, page in it, and guest, of each page of a slab whose frame number the kernel hides.
    slab_pages: Vec<(u64, u64, u16)>,
    /// Pages of slabs that were found in ranges.
    pub(super) slab_runs: Vec<SlabRun>,
}

impl Census {
    pub(super) fn new(spaces: &[Space]) -> Self {
        let guest = |space: &Space| GuestFrames {
            name: space.name.clone(),
            pid: space.pid,
            pages: Pages::default(),
            frames: 0.0,
            anonymous: 0,
        };
        Self {
            guests: spaces.iter().map(guest).collect(),
            hidden: vec![Hidden::default(); spaces.len()],
            keys: Vec::new(),
            ksm_by_counters: None,
            slab_pages: Vec::new(),
            slab_runs: Vec::new(),
        }
    }

    /// Counts pages of a guest that were classified by range: its own anonymous ones, those on the
    /// zero frame, those of its image, and absent ones.
    pub(super) fn add(&mut self, guest: usize, private: u64, zero: u64, (image, absent): (u64, u64)) {
        let GuestFrames { pages, anonymous, .. } = &mut self.guests[guest];
        pages.total += private + zero + image + absent;
        pages.image += image;
        pages.private += private;
        pages.zero += zero;
        pages.absent += absent;
        *anonymous += private + zero;
    }

    pub(super) fn count(
        &mut self,
        guest: usize,
        hva: Hva,
        entry: PagemapEntry,
        maps: &impl Deref<Target = Maps>,
    ) {
        let GuestFrames { pages, anonymous, .. } = &mut self.guests[guest];
        pages.total += 1;
        if !entry.present() {
            match () {
                () if entry.swapped() => pages.swapped += 1,
                () if maps.slab_at(hva).is_some() => pages.image += 1,
                () => pages.absent += 1,
            }
            return;
        }
        let is_file = entry.file_or_shared();
        *anonymous += u64::from(!is_file);
        if entry.exclusive() {
            pages.private += 1;
        } else if let Some(Pfn(pfn)) = entry.pfn() {
            let kind = match is_file {
                false => Kind::Anonymous,
                true if maps.slab_at(hva).is_some() => Kind::Slab,
                true => Kind::File,
            };
            self.keys.push(pfn << KEY_BITS | (kind as u64) << GUEST_BITS | guest as u64);
        } else if is_file {
            // A slab's frames are known by the slab's file, without their numbers.
            match maps.slab_at(hva) {
                Some(slab) => {
                    self.slab_pages.push((slab.inode, u64::from(slab.slab_page(hva).0), guest as u16))
                }
                None => self.hidden[guest].file += 1,
            }
        } else {
            self.hidden[guest].anonymous += 1;
        }
    }

    /// The count of `spaces` that were looked at.
    pub(super) fn finish(self, spaces: &[Space]) -> Result<Frames, MeasureError> {
        match !self.slab_pages.is_empty() || self.hidden.iter().any(|hidden| hidden.any()) {
            true => Ok(self.estimate(&KsmView::read(spaces))),
            false => look_up(self, spaces),
        }
    }

    /// Shares each page of the slabs among those that map it; says on how many frames they are that
    /// more than one does.
    fn share_slabs(&mut self, result: &mut Frames) -> u64 {
        let runs = std::mem::take(&mut self.slab_runs);
        let counts = SlabCounts::of(&runs);
        for run in &runs {
            let GuestFrames { pages, frames, .. } = &mut self.guests[run.guest];
            pages.total += run.pages;
            for &mapped in counts.within(run) {
                *frames += 1.0 / f64::from(mapped);
                match mapped {
                    1 => pages.private += 1,
                    _ => {
                        pages.shared += 1;
                        result.shared_by_what.slab += 1;
                    }
                }
            }
        }
        let mut shared_frames = 0;
        result.slab_frames += counts.all().count() as u64;
        for mapped in counts.all().filter(|mapped| *mapped > 1) {
            shared_frames += 1;
            *result.shared_by.entry(u64::from(mapped)).or_default() += 1;
        }
        shared_frames
    }

    /// Joins the pages by frame; `look` fills in what the host knows of a batch of ascending
    /// frames.
    fn join(
        mut self,
        mut look: impl FnMut(&[Pfn], &mut Vec<FrameInfo>) -> Result<(), PagemapError>,
    ) -> Result<Frames, MeasureError> {
        let mut result = Frames::default();
        let (mut ksm, mut anonymous) = (0, vec![0; self.guests.len()]);
        for guest in &mut self.guests {
            guest.frames = guest.pages.private as f64;
        }
        let mut shared_frames = self.share_slabs(&mut result);
        self.keys.sort_unstable();
        let (mut batch, mut infos) = (Vec::new(), Vec::new());
        let mut rest = self.keys.as_slice();
        while !rest.is_empty() {
            batch.clear();
            let groups = rest.chunk_by(|a, b| a >> KEY_BITS == b >> KEY_BITS).take(CHUNK_FRAMES);
            let mut taken = 0;
            for group in groups {
                batch.push(Pfn(group[0] >> KEY_BITS));
                taken += group.len();
            }
            look(&batch, &mut infos).map_err(MeasureError::FrameTable)?;
            let groups = rest[..taken].chunk_by(|a, b| a >> KEY_BITS == b >> KEY_BITS);
            for (group, info) in groups.zip(&infos) {
                let mapped_here = group.len() as u64;
                let is_slab = |key: &u64| key >> GUEST_BITS & 3 == Kind::Slab as u64;
                result.slab_frames += u64::from(group.first().is_some_and(is_slab));
                // A single page with a single mapping lost its partner while we were reading.
                let shared = mapped_here > 1 || info.mappings > 1;
                for key in group {
                    let number = (key & ((1 << GUEST_BITS) - 1)) as usize;
                    let guest = &mut self.guests[number];
                    if info.flags.zero() {
                        guest.pages.zero += 1;
                        continue;
                    }
                    guest.frames += 1.0 / mapped_here as f64;
                    if !shared {
                        guest.pages.private += 1;
                        continue;
                    }
                    guest.pages.shared += 1;
                    let by = &mut result.shared_by_what;
                    *match key >> GUEST_BITS & 3 {
                        kind if kind == Kind::Slab as u64 => &mut by.slab,
                        kind if kind == Kind::File as u64 => &mut by.file,
                        _ if self.ksm_by_counters.is_some() => &mut anonymous[number],
                        _ if info.flags.ksm() => &mut ksm,
                        _ => &mut by.other,
                    } += 1;
                }
                if !info.flags.zero() && shared {
                    shared_frames += 1;
                    *result.shared_by.entry(mapped_here).or_default() += 1;
                    result.also_outside += u64::from(info.mappings > mapped_here);
                }
            }
            rest = &rest[taken..];
        }
        result.guests = self.guests;
        result.shared_by_what.ksm = Some(ksm);
        if let Some(counters) = self.ksm_by_counters {
            result.split_by_counters(&anonymous, &counters);
        }
        result.finish(shared_frames);
        Ok(result)
    }

    /// Splits what has no visible frame by what KSM says of each process.
    fn estimate(mut self, ksm: &KsmView) -> Frames {
        let (mut merged, mut file) = (0, 0);
        for ((guest, hidden), &merging) in self.guests.iter_mut().zip(&self.hidden).zip(&ksm.merging_pages) {
            let shared = hidden.anonymous.min(merging);
            guest.pages.zero += hidden.anonymous - shared;
            guest.pages.shared += shared + hidden.file;
            guest.frames =
                guest.pages.private as f64 + shared as f64 * ksm.frames_per_page + hidden.file as f64 / 2.0;
            merged += shared;
            file += hidden.file;
        }
        let mut frames = (merged as f64 * ksm.frames_per_page).ceil() as u64 + file.div_ceil(2);
        let mut by_runs = Frames::default();
        frames += self.share_slabs(&mut by_runs);
        let mut slab_pages = by_runs.shared_by_what.slab;
        let mut slab_frames = by_runs.slab_frames;
        self.slab_pages.sort_unstable();
        for same in self.slab_pages.chunk_by(|a, b| (a.0, a.1) == (b.0, b.1)) {
            frames += 1;
            slab_frames += 1;
            for (_, _, guest) in same {
                let guest = &mut self.guests[usize::from(*guest)];
                guest.pages.shared += 1;
                guest.frames += 1.0 / same.len() as f64;
                slab_pages += 1;
            }
        }
        let shared_by_what = SharedBy { ksm: Some(merged), slab: slab_pages, file, other: 0 };
        let guests = self.guests;
        let mut result = Frames { guests, slab_frames, shared_by_what, estimated: true, ..Frames::default() };
        result.notes.push(
            "frame numbers are hidden from this user: pages of slabs are counted by their files, zero pages and those that KSM shares are \
             distinguished by its counters; run as root for exact frames"
                .to_owned(),
        );
        if file > 0 {
            result.notes.push(format!("{file} shared pages of files are taken to be mapped twice each"));
        }
        result.finish(frames);
        result
    }
}

impl Frames {
    /// Pages that need no frame: saved by sharing, and on the zero frame. If all of them are
    /// written, that many frames are needed.
    pub fn freed_pages(&self) -> u64 {
        self.saved_pages + self.pages.zero
    }

    /// Splits shared anonymous pages of each guest by how many pages of its process are KSM's.
    fn split_by_counters(&mut self, anonymous: &[u64], counters: &[Option<u64>]) {
        let all: u64 = anonymous.iter().sum();
        if all == 0 {
            return;
        }
        let merged = |(anonymous, ksm): (&u64, &Option<u64>)| ksm.map(|ksm| ksm.min(*anonymous));
        self.shared_by_what.ksm = anonymous.iter().zip(counters).map(merged).sum();
        self.shared_by_what.other += all - self.shared_by_what.ksm.unwrap_or(0);
        self.notes.push(match self.shared_by_what.ksm {
            Some(_) => "this kernel marks all anonymous pages as KSM's (Linux 6.12 does): how many KSM shares is by /proc/PID/ksm_stat, which \
                        counts the whole process"
                .to_owned(),
            None => "this kernel marks all anonymous pages as KSM's and /proc/PID/ksm_stat cannot be read: those that KSM shares are among \
                     the others"
                .to_owned(),
        });
    }

    fn finish(&mut self, shared_frames: u64) {
        for guest in &self.guests {
            self.pages.add(&guest.pages);
        }
        self.frames = self.pages.private + shared_frames;
        self.saved_pages = self.pages.present().saturating_sub(self.frames + self.pages.zero);
    }
}

/// What KSM shows every user.
struct KsmView {
    /// By guest.
    merging_pages: Vec<u64>,
    /// Merged frames for each merged page, over the whole host.
    frames_per_page: f64,
}

impl KsmView {
    fn read(spaces: &[Space]) -> Self {
        let directory = Path::new("/sys/kernel/mm/ksm");
        let counter = |name| ksm_stat::counter(directory, name).unwrap_or(0);
        // pages_shared counts frames, pages_sharing the pages on them beyond the first.
        let (frames, more) = (counter("pages_shared"), counter("pages_sharing"));
        let merging = |space: &Space| KsmStat::of(space.pid).map_or(0, |stat| stat.merging_pages);
        Self {
            merging_pages: spaces.iter().map(merging).collect(),
            frames_per_page: if frames == 0 { 1.0 } else { frames as f64 / (frames + more) as f64 },
        }
    }
}

#[cfg(test)]
#[path = "frames_tests.rs"]
mod tests;
