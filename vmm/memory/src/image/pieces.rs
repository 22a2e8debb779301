//! Which pages of guest RAM may hold something, and whether they are its own or a slab's, by the
//! page table and the mappings.

use std::io;

use super::super::maps::Maps;
use super::super::page_scan::{PageScan, Pages};
use super::super::ram::{GuestRange, Ram};
use super::super::{PAGE_BYTES, PageRange, SlabPage};

/// What some pages are, before their contents were read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in super::super) enum Piece {
    /// The guest's own: they may hold anything.
    Own(PageRange),
    /// Those of a slab: its file, and its first page.
    Slab(PageRange, u64, SlabPage),
}

impl Piece {
    /// Which pages.
    pub(in super::super) fn range(&self) -> PageRange {
        match self {
            Self::Own(range) | Self::Slab(range, ..) => *range,
        }
    }
}

impl Ram {
    /// All pages that may be other than zero, ascending.
    pub(in super::super) fn pieces(&self) -> io::Result<Vec<Piece>> {
        self.pieces_of(&self.stretches().collect::<Vec<_>>())
    }

    /// Those of `parts`, which are ascending.
    pub(super) fn pieces_of(&self, parts: &[GuestRange<'_>]) -> io::Result<Vec<Piece>> {
        let (maps, mut scan) = (Maps::own()?, PageScan::open_self()?);
        let mut pieces = Vec::new();
        for part in parts {
            let page = |hva| part.pages().first() + (hva - part.hva()) / PAGE_BYTES;
            let all = part.hvas();
            let mut at = all.start;
            let from = maps.slabs.partition_point(|slab| slab.hvas.end <= all.start);
            for slab in maps.slabs[from..].iter().take_while(|slab| slab.hvas.start < all.end) {
                let within = slab.hvas.start.max(all.start)..slab.hvas.end.min(all.end);
                let own = |run: Pages| PageRange::between(page(run.hva), page(run.end()));
                if at < within.start {
                    scan.anonymous_memory(at..within.start, |run| pieces.push(Piece::Own(own(run))))?;
                }
                // What is not the guest's own copy is the slab's, also without an entry in the page
                // table.
                let mut rest = within.start;
                let of_slab = |pieces: &mut Vec<Piece>, from, to| {
                    if from < to {
                        let range = PageRange::between(page(from), page(to));
                        pieces.push(Piece::Slab(range, slab.inode, slab.slab_page(from)));
                    }
                };
                scan.walk(within.clone(), |run| {
                    if !run.categories.file() {
                        of_slab(&mut pieces, rest, run.hva);
                        pieces.push(Piece::Own(own(run)));
                        rest = run.end();
                    }
                })?;
                of_slab(&mut pieces, rest, within.end);
                at = within.end;
            }
            if at < all.end {
                let own = |run: Pages| PageRange::between(page(run.hva), page(run.end()));
                scan.anonymous_memory(at..all.end, |run| pieces.push(Piece::Own(own(run))))?;
            }
        }
        Ok(pieces)
    }
}
