//! A VM's memory as pages of sealed slabs: captured from a paused VM, and mapped under one that has
//! not run yet.
//!
//! What is taken are *runs*: adjacent pages of guest RAM that are adjacent pages of a slab. Pages
//! that are in slabs already are referenced where they lie; other pages are copied once, in guest
//! order; zeros and absent pages are in no run, and read as zeros in the copy. Gaps of a few zeros
//! are bridged: written once per image, they save two mappings in each copy.
//!
//! Most of it is copied while the guest runs ([`Ram::copy_ahead`]). What it has written since a log
//! of writes tells ([`Ram::capture_written`]); where there is none it is seen by comparing
//! ([`Ram::capture`]): of the time for which a guest is paused most is otherwise the frames of the
//! copies.
//!
//! RAM that is mapped so is private anonymous memory with mappings of slabs over it, as merging
//! leaves it: giving back, parking, merging and pushing out know no other case.

mod ahead;
mod pieces;
mod run;

use std::collections::HashMap;
use std::io;

use thiserror::Error;
use vm_memory::{Bytes, GuestAddress};

pub use ahead::Ahead;
pub(super) use pieces::Piece;
pub use run::{ImageRun, Taken};
use run::{PIECE_PAGES, is_zero};

use super::page::to_usize;
use super::page_buffer::PageBuffer;
use super::page_set::PageSet;
use super::ram::{Backing, Ram};
use super::slab::{Draft, Slab, SlabError};
use super::{PAGE, PAGE_BYTES, PageNo, PageRange, SlabPage};

/// Pages of a slab of an image.
pub const SLAB_PAGES: u64 = 2048;
/// The shortest run of pages in another's slab that is referenced and not copied: each costs two
/// mappings.
const LEAST_REFERENCED: u64 = 16;
/// Pages of which the page table is read at a time, with merging, parking and giving back held off.
const LOOK_PAGES: u64 = 1 << 16;
/// The longest gap that is bridged at first, and at last; it doubles as the number of runs grows.
const GAP_PAGES: (u64, u64) = (16, SLAB_PAGES);
const RUNS_PER_GAP: usize = 512;
/// The most runs: each may be two mappings, of which a process has vm.max_map_count (65,530).
pub const MAX_RUNS: usize = 1 << 14;

/// The most pages of slabs that a capture of `ram_pages` may fill: each page once, and the room
/// that is left over in the last slab.
pub const fn most_pages(ram_pages: u64) -> u64 {
    ram_pages + SLAB_PAGES
}

/// Where slabs of an image come from and go to.
pub trait Slabs {
    /// An empty one of `pages` pages, 1 to [`SLAB_PAGES`], charged to the cgroup of its maker.
    fn draft(&mut self, pages: u64) -> io::Result<Draft>;

    /// It is filled and sealed. Its number in the image.
    fn filled(&mut self, slab: &Slab) -> io::Result<u32>;

    /// The number in the image of the slab that has this file, and its pages; None if it cannot be
    /// had, or is not worth it for the `used` pages that the memory has of it: they are to be
    /// copied.
    fn known(&mut self, inode: u64, used: u64) -> io::Result<Option<(u32, u64)>>;
}

/// Why memory cannot be taken or mapped.
#[derive(Debug, Error)]
pub enum ImageError {
    /// Only private anonymous memory is.
    #[error("memory of a {0:?} backing cannot be captured: expected anonymous memory")]
    Backing(Backing),
    /// It has not been read yet.
    #[error("memory that lies in a file cannot be captured: expected memory of its own")]
    File,
    /// A page cannot be read, or a slab not made.
    #[error("cannot {what}")]
    Io {
        /// What was done.
        what: &'static str,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// A slab is not what it should be.
    #[error(transparent)]
    Slab(#[from] SlabError),
    /// Too many pieces.
    #[error("the memory is in more than {MAX_RUNS} pieces")]
    Runs,
    /// A run that is none, or not of this memory, or of no slab.
    #[error(
        "run {number} of the image, {run:?}, is not possible: RAM has {ram_pages} pages, and there are {slabs} slabs"
    )]
    Run {
        /// Which.
        number: usize,
        /// What it says.
        run: ImageRun,
        /// How many pages there are.
        ram_pages: u64,
        /// How many slabs.
        slabs: usize,
    },
}

impl ImageError {
    fn io<E: Into<io::Error>>(what: &'static str) -> impl FnOnce(E) -> Self {
        move |source| Self::Io { what, source: source.into() }
    }
}

impl Ram {
    /// Takes what is in it, as far as it is not what was copied `ahead` into the same `slabs`: all
    /// is read, and compared. No vCPU runs and no device works meanwhile; merging, parking and
    /// giving back wait.
    pub fn capture(&self, slabs: &mut dyn Slabs, ahead: &Ahead) -> Result<Taken, ImageError> {
        self.check_backing()?;
        let mut placement = self.placement();
        let all: Vec<_> = self.stretches().collect();
        for stretch in &all {
            placement.settle(*stretch).map_err(ImageError::io("bring parked pages back"))?;
        }
        let pieces = self.pieces_of(&all).map_err(ImageError::io("read the page table"))?;
        Ok(self.take(slabs, ahead, pieces, None)?.0)
    }

    /// The same, of memory in which nothing but `written` has changed since it was copied `ahead`:
    /// nothing else is looked at, not even in the page table. Nothing was given back in between.
    ///
    /// # Errors
    /// As those of [`Self::capture`]; [`ImageError::Runs`] also where that would do with fewer.
    pub fn capture_written(
        &self,
        slabs: &mut dyn Slabs,
        ahead: &Ahead,
        written: &PageSet,
    ) -> Result<Taken, ImageError> {
        self.check_backing()?;
        let mut placement = self.placement();
        let written = self.whole_pieces(written);
        let parts: Vec<_> = written.runs_of(self.pages(), u64::MAX).flat_map(|run| self.parts(run)).collect();
        for part in &parts {
            placement.settle(*part).map_err(ImageError::io("bring parked pages back"))?;
        }
        let pieces = self.pieces_of(&parts).map_err(ImageError::io("read the page table"))?;
        let (mut taken, _) = self.take(slabs, &Ahead::default(), pieces, Some(&written))?;
        ahead.add_unwritten(&mut taken, &written);
        if taken.runs.len() > MAX_RUNS { Err(ImageError::Runs) } else { Ok(taken) }
    }

    /// Copies what is in it, while the guest may run and write. Nothing waits for long: what
    /// merging, parking and giving back change meanwhile is copied as it was, or as it is.
    pub fn copy_ahead(&self, slabs: &mut dyn Slabs) -> Result<Ahead, ImageError> {
        self.check_backing()?;
        let mut pieces = Vec::new();
        for stretch in self.stretches() {
            let mut rest = stretch.pages();
            while !rest.is_empty() {
                let (part, after) = rest.split(LOOK_PAGES);
                rest = after;
                let mut placement = self.placement();
                for part in self.parts(part) {
                    placement.settle(part).map_err(ImageError::io("bring parked pages back"))?;
                    pieces.extend(self.pieces_of(&[part]).map_err(ImageError::io("read the page table"))?);
                }
            }
        }
        let (taken, copies) = self.take(slabs, &Ahead::default(), pieces, None)?;
        Ok(Ahead::new(taken.runs, copies))
    }

    fn check_backing(&self) -> Result<(), ImageError> {
        match self.backing() {
            Backing::Anonymous if self.maps_file() => Err(ImageError::File),
            Backing::Anonymous => Ok(()),
            other => Err(ImageError::Backing(other)),
        }
    }

    /// Those pages, and those around them that are copied with them.
    fn whole_pieces(&self, written: &PageSet) -> PageSet {
        let (all, mut pieces) = (self.pages(), PageSet::none(self.pages().pages()));
        for run in written.runs_of(all, u64::MAX) {
            let first = PageNo(run.first().0 / PIECE_PAGES * PIECE_PAGES);
            let end = PageNo(run.end().0.next_multiple_of(PIECE_PAGES)).min(all.end());
            pieces.insert_range(PageRange::between(first, end));
        }
        pieces
    }

    /// What was taken, and the slabs that were made for it. Pages in none of the `pieces` are
    /// zeros, or, where only those `looked_at` are in some, unknown.
    fn take(
        &self,
        slabs: &mut dyn Slabs,
        ahead: &Ahead,
        pieces: Vec<Piece>,
        looked_at: Option<&PageSet>,
    ) -> Result<(Taken, Vec<(u32, Slab)>), ImageError> {
        let own = |piece: &Piece| if let Piece::Own(range) = piece { range.pages() } else { 0 };
        let left = pieces.iter().map(own).sum();
        let mut used = HashMap::new();
        for piece in &pieces {
            if let Piece::Slab(range, inode, _) = piece {
                *used.entry(*inode).or_default() += range.pages();
            }
        }
        let (taken, known) = (Taken::default(), HashMap::new());
        let (draft, copies) = (None, Vec::new());
        let mut writer =
            Writer { ram: self, slabs, ahead, looked_at, taken, draft, copies, left, used, known };
        for piece in pieces {
            match piece {
                Piece::Own(range) => writer.copy(range)?,
                Piece::Slab(range, inode, first) => writer.reference(range, inode, first)?,
            }
        }
        writer.finish()
    }

    /// Has it hold what `runs` say, of `slabs`. Nothing has been written to it yet, nothing runs on
    /// it, and nothing has its pages pinned.
    ///
    /// # Errors
    /// A run is not possible, or the kernel refused. Then some runs may be mapped: the memory is of
    /// no use.
    pub fn map_image(&self, runs: &[ImageRun], slabs: &[Slab]) -> Result<(), ImageError> {
        if self.backing() != Backing::Anonymous {
            return Err(ImageError::Backing(self.backing()));
        }
        if runs.len() > MAX_RUNS {
            return Err(ImageError::Runs);
        }
        let mut placement = self.placement();
        (placement.slabs, placement.slab_pages) = (true, PageSet::none(self.pages().pages()));
        let mut end = PageNo(0);
        for (number, run) in runs.iter().enumerate() {
            let slab = slabs.get(run.slab as usize);
            let range = run.range().filter(|range| range.first() >= end).and_then(|range| self.range(range));
            let (Some(slab), Some(range)) = (slab, range) else {
                let (ram_pages, slabs) = (self.pages().pages(), slabs.len());
                return Err(ImageError::Run { number, run: *run, ram_pages, slabs });
            };
            slab.map_over(range, run.slab_page).map_err(ImageError::io("map a slab"))?;
            self.advice_anew().for_each(|advice| _ = range.advise(advice));
            placement.slab_pages.insert_range(range.pages());
            end = range.pages().end();
        }
        Ok(())
    }

    /// Which of its pages lie in mappings of slabs; empty if none does.
    pub fn slab_pages(&self) -> PageSet {
        let placement = self.placement();
        if placement.slabs { placement.slab_pages.clone() } else { PageSet::none(self.pages().pages()) }
    }
}

/// Copies pages into slabs, in order.
struct Writer<'a> {
    ram: &'a Ram,
    slabs: &'a mut dyn Slabs,
    ahead: &'a Ahead,
    /// The pages of which it is known whether they are zeros; None: all.
    looked_at: Option<&'a PageSet>,
    taken: Taken,
    draft: Option<Filling>,
    /// The slabs that are full, by their numbers.
    copies: Vec<(u32, Slab)>,
    /// Pages that may yet have to be copied.
    left: u64,
    /// Pages that the memory has of the slabs of others, by the number of their file.
    used: HashMap<u64, u64>,
    /// What was said of those.
    known: HashMap<u64, Option<(u32, u64)>>,
}

/// The slab that is being filled.
struct Filling {
    draft: Draft,
    pages: u64,
    used: u64,
    /// The first of the runs that lie in it.
    first_run: usize,
    /// The page of RAM after the last that was copied, as long as nothing but zeros is between.
    next: Option<PageNo>,
}

impl Writer<'_> {
    fn copy(&mut self, range: PageRange) -> Result<(), ImageError> {
        let mut buffer = PageBuffer::new(to_usize(PIECE_PAGES));
        let mut rest = range;
        // No run goes on from one stretch of RAM into the next.
        if let Some(filling) = &mut self.draft
            && let Some(next) = filling.next
            && self.ram.range(PageRange::between(PageNo(next.0 - 1), range.end())).is_none()
        {
            filling.next = None;
        }
        while !rest.is_empty() {
            let (piece, after) = rest.split(PIECE_PAGES);
            rest = after;
            let bytes = &mut buffer[..to_usize(piece.bytes())];
            let gpa = self.ram.gpa(piece.first()).map_or(0, |gpa| gpa.0);
            let read = self.ram.memory().read_slice(bytes, GuestAddress(gpa));
            read.map_err(|error| ImageError::Io {
                what: "read guest memory",
                source: io::Error::other(error),
            })?;
            self.left = self.left.saturating_sub(piece.pages());
            if self.reuse(piece, bytes) {
                continue;
            }
            let pages: Vec<&[u8; PAGE]> = bytes.as_chunks().0.iter().collect();
            // Adjacent pages that are not zeros together.
            let mut at = piece.first();
            for same in pages.chunk_by(|a, b| is_zero(a) == is_zero(b)) {
                if !is_zero(same[0]) {
                    let from = to_usize((at - piece.first()) * PAGE_BYTES);
                    self.write(at, &bytes[from..from + same.len() * PAGE])?;
                }
                at = at + same.len() as u64;
            }
        }
        Ok(())
    }

    /// Whether these pages are in a copy that was made ahead, which then is theirs.
    fn reuse(&mut self, piece: PageRange, bytes: &[u8]) -> bool {
        let runs = &mut self.taken.runs;
        // A guest that has written here and there has many pieces; it is copied anew before they
        // are too many.
        let place = if runs.len() < MAX_RUNS / 2 { self.ahead.place(piece, bytes) } else { None };
        let Some((slab, slab_page)) = place else { return false };
        // What comes behind it does not go on where the last copy ended.
        if let Some(filling) = &mut self.draft {
            filling.next = None;
        }
        let goes_on = |run: &&mut ImageRun| {
            let whole = PageRange::between(run.page, piece.end());
            let end = run.page + run.pages;
            run.slab == slab
                && u64::from(slab_page.0).checked_sub(run.slab_page.0.into()) == Some(piece.first() - run.page)
                && self.ram.range(whole).is_some()
                // Between them RAM has zeros, or there were a run.
                && self.ahead.has_zeros(slab, run.slab_page + run.pages, piece.first() - end)
        };
        match runs.last_mut().filter(goes_on) {
            Some(run) => run.pages = piece.end() - run.page,
            None => runs.push(ImageRun { page: piece.first(), pages: piece.pages(), slab, slab_page }),
        }
        self.taken.ahead += piece.pages();
        true
    }

    /// Puts whole pages into slabs, the first of which is `page`.
    fn write(&mut self, page: PageNo, bytes: &[u8]) -> Result<(), ImageError> {
        self.bridge(page)?;
        let (mut page, mut bytes) = (page, bytes);
        while !bytes.is_empty() {
            if self.draft.as_ref().is_some_and(|draft| draft.used == draft.pages) {
                self.seal()?;
            }
            let filling = match &mut self.draft {
                Some(filling) => filling,
                None => {
                    // With some for gaps; what is left over is given back.
                    let wanted = self.left.max((bytes.len() / PAGE) as u64);
                    let pages = (wanted + wanted / 4 + GAP_PAGES.0).min(SLAB_PAGES);
                    let draft = self.slabs.draft(pages).map_err(ImageError::io("make a slab"))?;
                    let first_run = self.taken.runs.len();
                    self.draft.insert(Filling { draft, pages, used: 0, first_run, next: None })
                }
            };
            let fits = to_usize((filling.pages - filling.used) * PAGE_BYTES).min(bytes.len());
            let (now, later) = bytes.split_at(fits);
            let slab_page = SlabPage(0) + filling.used;
            filling.draft.write(slab_page, now)?;
            let pages = (fits / PAGE) as u64;
            match (self.taken.runs.last_mut(), filling.next) {
                (Some(run), Some(next)) if next == page => run.pages += pages,
                // Its number is known once it is sealed.
                _ => self.taken.runs.push(ImageRun { page, pages, slab: u32::MAX, slab_page }),
            }
            filling.used += pages;
            page = page + pages;
            filling.next = Some(page);
            self.taken.copied += pages;
            bytes = later;
        }
        if self.taken.runs.len() > MAX_RUNS { Err(ImageError::Runs) } else { Ok(()) }
    }

    /// Writes the zeros between the last page that was copied and `page`, if these are few and were
    /// looked at.
    fn bridge(&mut self, page: PageNo) -> Result<(), ImageError> {
        let most = GAP_PAGES.1.min(GAP_PAGES.0 << (self.taken.runs.len() / RUNS_PER_GAP).min(10));
        let Some(filling) = &mut self.draft else { return Ok(()) };
        let Some(next) = filling.next.filter(|next| *next < page) else { return Ok(()) };
        let gap = page - next;
        // Not from one stretch of RAM into the next.
        let in_one = self.ram.range(PageRange::between(next, page + 1)).is_some();
        let between = PageRange::between(next, page);
        let are_zeros = self.looked_at.is_none_or(|known| known.runs(between).all(|(_, is_known)| is_known));
        if gap > most || gap >= filling.pages - filling.used || !in_one || !are_zeros {
            return Ok(());
        }
        let zeros = vec![0; to_usize(gap * PAGE_BYTES)];
        filling.draft.write(SlabPage(0) + filling.used, &zeros)?;
        filling.used += gap;
        filling.next = Some(page);
        if let Some(run) = self.taken.runs.last_mut() {
            run.pages += gap;
        }
        self.taken.copied += gap;
        Ok(())
    }

    fn seal(&mut self) -> Result<(), ImageError> {
        let Some(filling) = self.draft.take() else { return Ok(()) };
        let slab = filling.draft.shrink(filling.used)?.seal()?;
        let number = self.slabs.filled(&slab).map_err(ImageError::io("hand a slab over"))?;
        for run in self.taken.runs[filling.first_run..].iter_mut().filter(|run| run.slab == u32::MAX) {
            run.slab = number;
        }
        self.copies.push((number, slab));
        Ok(())
    }

    fn reference(&mut self, range: PageRange, inode: u64, first: SlabPage) -> Result<(), ImageError> {
        let known = match range.pages() >= LEAST_REFERENCED {
            true => self.known(inode)?,
            false => None,
        };
        let Some((slab, _)) = known.filter(|(_, pages)| u64::from(first.0) + range.pages() <= *pages) else {
            self.left += range.pages();
            return self.copy(range);
        };
        // What comes behind it does not go on where the last copy ended.
        if let Some(filling) = &mut self.draft {
            filling.next = None;
        }
        self.taken.runs.push(ImageRun { page: range.first(), pages: range.pages(), slab, slab_page: first });
        self.taken.referenced += range.pages();
        if self.taken.runs.len() > MAX_RUNS { Err(ImageError::Runs) } else { Ok(()) }
    }

    /// Asked for once a slab: there may be thousands of runs in it.
    fn known(&mut self, inode: u64) -> Result<Option<(u32, u64)>, ImageError> {
        let used = self.used.get(&inode).copied().unwrap_or(0);
        if let Some(known) = self.known.get(&inode) {
            return Ok(*known);
        }
        let known = self.slabs.known(inode, used).map_err(ImageError::io("find a slab"))?;
        self.known.insert(inode, known);
        Ok(known)
    }

    fn finish(mut self) -> Result<(Taken, Vec<(u32, Slab)>), ImageError> {
        self.seal()?;
        Ok((self.taken, self.copies))
    }
}

#[cfg(test)]
mod tests;
