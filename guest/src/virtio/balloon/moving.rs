//! Pages into the balloon and out of it: one round of requests at a time, up to [`ROUND_PAGES`]
//! pages.

use super::{CONFIG_ACTUAL, Driver, PFN_BUFFERS, Rings};
use crate::in_use::InUse;
use crate::virtio::Transport;
use crate::virtio::register::CONFIG;
use crate::virtio::ring::{Buffer, Unusable};

use core::sync::atomic::Ordering;

/// Page frame numbers in one descriptor, as Linux has it.
const BUFFER_PFNS: usize = 256;
/// Descriptors in one round.
const ROUND_BUFFERS: usize = 8;
/// Pages in one round.
const ROUND_PAGES: usize = BUFFER_PFNS * ROUND_BUFFERS;
/// What the buffers take, in words.
pub(super) const PFN_WORDS: usize = ROUND_PAGES;

/// Which way pages go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    Inflate,
    Deflate,
}

/// The round that is out.
#[derive(Clone, Copy, Debug)]
pub(super) struct Round {
    way: Way,
    pages: usize,
}

impl<T: Transport> Driver<'_, T> {
    /// Goes on with the round that is out, or begins the next one. True if one is out afterwards.
    pub(super) fn step_moving(&mut self, rings: &mut Rings<'_>, in_use: &InUse) -> Result<bool, Unusable> {
        if let Some(round) = self.round {
            let ring = match round.way {
                Way::Inflate => &mut rings.inflate,
                Way::Deflate => &mut rings.deflate,
            };
            if !ring.all_used()? {
                return Ok(true);
            }
            self.finish(round);
        }
        // A hostile request that is out must be told from ours.
        if rings.inflate.in_flight() > 0 {
            return Ok(false);
        }
        self.begin(rings, in_use);
        Ok(self.round.is_some())
    }

    /// Decides what comes next. Pages that a fill waits for are exchanged for others where there
    /// are others, so that the balloon keeps its size; only if there are none does it shrink.
    fn begin(&mut self, rings: &mut Rings<'_>, in_use: &InUse) {
        let strays: u64 = match self.fill_waits {
            true => in_use.ranges().iter().map(|range| self.pages.given_in(range.clone())).sum(),
            false => 0,
        };
        let above = self.pages.given() - strays;
        let room = self.pages.count().saturating_sub(in_use.pages());
        let aim = self.aim().min(room);
        if above < aim {
            self.send(rings, Way::Inflate, aim - above, in_use);
        } else if strays > 0 {
            self.send(rings, Way::Deflate, strays, in_use);
        } else if above > aim {
            self.send(rings, Way::Deflate, above - aim, in_use);
        }
    }

    /// Sends at most `most` pages, of at most one round. Into the balloon go the last free ones,
    /// out of it come the first ones: a fill takes the first pages there are.
    fn send(&mut self, rings: &mut Rings<'_>, way: Way, most: u64, in_use: &InUse) {
        let ring = match way {
            Way::Inflate => &mut rings.inflate,
            Way::Deflate => &mut rings.deflate,
        };
        let most = most.min((ring.entries() * BUFFER_PFNS).min(ROUND_PAGES) as u64) as usize;
        let mut pages = 0;
        let mut at = if way == Way::Inflate { self.pages.count() } else { 0 };
        while pages < most {
            let found = match way {
                Way::Inflate => self.pages.last_free(at, in_use),
                Way::Deflate => self.pages.next_given(at),
            };
            let Some(page) = found else { break };
            at = if way == Way::Inflate { page } else { page + 1 };
            if way == Way::Inflate {
                self.pages.set_given(page, true);
            }
            // The pages of the widest guest this kernel maps have frame numbers of 27 bits.
            let pfn = self.pages.frames().pfn(page) as u32;
            self.words[PFN_BUFFERS + pages].store(pfn, Ordering::Relaxed);
            pages += 1;
        }
        if pages == 0 {
            return;
        }
        for first in (0..pages).step_by(BUFFER_PFNS) {
            let pfns = (pages - first).min(BUFFER_PFNS);
            let gpa = self.gpa + 4 * (PFN_BUFFERS + first) as u64;
            // There is room: all of the ring is free between rounds.
            let _ = ring.add(&[Buffer { gpa, len_bytes: 4 * pfns as u32, writable: false }]);
        }
        ring.notify(&mut self.transport);
        self.round = Some(Round { way, pages });
    }

    /// The device has done its part: what went in is empty now, and what came out may be used.
    fn finish(&mut self, round: Round) {
        self.round = None;
        for at in 0..round.pages {
            let pfn = self.words[PFN_BUFFERS + at].load(Ordering::Relaxed);
            let Some(page) = self.pages.frames().page(pfn.into()) else { continue };
            match round.way {
                Way::Inflate => _ = self.pages.set_touched(page..page + 1, false),
                Way::Deflate => self.pages.set_given(page, false),
            }
        }
        self.actual = self.pages.given();
        self.transport.write(CONFIG + CONFIG_ACTUAL, self.actual as u32);
    }
}
