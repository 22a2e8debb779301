//! Requests that no driver should send, through real rings, so that a host can be shown to survive
//! them.

use super::statistics::store_bytes;
use super::{Driver, HOSTILE_WORDS, Rings};
use crate::in_use::InUse;
use crate::protocol::{Drive, Hostile};
use crate::virtio::ring::{Buffer, Full, Ring, Unusable};
use crate::virtio::{Transport, register, status};

use core::sync::atomic::Ordering;

/// How long the device may take to complete a request.
const LIMIT_MICROS: u64 = 1_000_000;

/// A page frame number that is RAM in no guest of 4 GiB or less, and those of the hole.
const OUTSIDE_PFNS: [u32; 4] = [u32::MAX, 0xc_0000, 0xf_ffff, 0x4000_0000];
/// An address of which the same holds.
const OUTSIDE_GPA: u64 = 0xc000_0000;

/// Why a hostile request was not sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HostileError {
    /// The device is not driven.
    NotOn,
    /// The device has no queue for it.
    NoQueue,
}

impl core::fmt::Display for HostileError {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str(match self {
            Self::NotOn => "the balloon is not driven: say balloon on, or balloon off first if it is broken",
            Self::NoQueue => "the device does not offer that queue",
        })
    }
}

impl core::error::Error for HostileError {}

/// One that is to be sent, is out, or is over.
#[derive(Clone, Copy, Debug)]
pub(super) struct Attempt {
    kind: Hostile,
    asked_micros: u64,
    is_out: bool,
    completed: Option<bool>,
}

impl<T: Transport> Driver<'_, T> {
    /// Sends a hostile request as soon as its queue is free. [`Driver::attempted`] says what became
    /// of it.
    ///
    /// # Errors
    /// [`HostileError`].
    pub fn attempt(&mut self, kind: Hostile, now_micros: u64) -> Result<(), HostileError> {
        if self.drive != Drive::On {
            return Err(HostileError::NotOn);
        }
        if !self.has_queue_for(kind) {
            return Err(HostileError::NoQueue);
        }
        self.attempt = Some(Attempt { kind, asked_micros: now_micros, is_out: false, completed: None });
        Ok(())
    }

    /// What became of the last attempt, once: its kind, whether the device completed it, and the
    /// device's status. None while that is open. A device that did not complete it, or needs a
    /// reset now, counts as broken.
    pub fn attempted(&mut self) -> Option<(Hostile, bool, u32)> {
        let Attempt { kind, completed, .. } = self.attempt?;
        let completed = completed?;
        self.attempt = None;
        let now = self.transport.read(register::STATUS);
        // Statistics that are kept are no fault: the device may answer when the host next asks.
        if now & status::NEEDS_RESET != 0 || !completed && kind != Hostile::Statistics {
            self.drive = Drive::Broken;
        }
        Some((kind, completed, now))
    }

    /// True if one is out.
    pub(super) fn step_attempt(
        &mut self,
        rings: &mut Rings<'_>,
        in_use: &InUse,
        now_micros: u64,
    ) -> Result<bool, Unusable> {
        let Some(mut attempt) = self.attempt.filter(|attempt| attempt.completed.is_none()) else {
            return Ok(false);
        };
        // One statistics buffer is always with the device.
        let (ring, usual) = match attempt.kind {
            Hostile::Statistics => (rings.statistics.as_mut(), 1),
            Hostile::Reporting => (rings.reporting.as_mut(), 0),
            Hostile::Hinting => (rings.hinting.as_mut(), 0),
            _ => (Some(&mut rings.inflate), 0),
        };
        let Some(ring) = ring else { return Ok(false) };
        if attempt.is_out {
            if attempt.kind != Hostile::Statistics {
                ring.all_used()?;
            } else if ring.has_used() {
                ring.take_used()?;
            }
            attempt.completed = (ring.in_flight() <= usual).then_some(true);
        } else if ring.in_flight() <= usual {
            // A ring without room sends nothing, and the time runs out.
            attempt.is_out = self.send_hostile(attempt.kind, ring, in_use).is_ok();
            attempt.asked_micros = now_micros;
        }
        self.attempt = Some(attempt);
        Ok(attempt.completed.is_none())
    }

    /// Gives up on an attempt that has timed out.
    pub(super) fn judge_attempt(&mut self, now_micros: u64) {
        if let Some(attempt) = &mut self.attempt {
            let over = now_micros.saturating_sub(attempt.asked_micros) >= LIMIT_MICROS;
            if attempt.completed.is_none() && (over || self.drive != Drive::On) {
                attempt.completed = Some(false);
            }
        }
    }

    fn send_hostile(&mut self, kind: Hostile, ring: &mut Ring<'_>, in_use: &InUse) -> Result<(), Full> {
        let words = &self.words[HOSTILE_WORDS..];
        let gpa = self.gpa + 4 * HOSTILE_WORDS as u64;
        // An unused page: the host may empty it. Without one, a page of the hole.
        let free = self.pages.next_free(0, 1, in_use).map(|pages| pages.start);
        let pfn = free.map_or(OUTSIDE_PFNS[1], |page| self.pages.frames().pfn(page) as u32);
        if let Some(page) = free {
            self.pages.set_touched(page..page + 1, true);
        }
        for (at, word) in words.iter().take(256).enumerate() {
            let value = match kind {
                Hostile::Outside => OUTSIDE_PFNS[at % OUTSIDE_PFNS.len()],
                _ => pfn,
            };
            word.store(value, Ordering::Relaxed);
        }
        let readable = |len_bytes| Buffer { gpa, len_bytes, writable: false };
        let outside = Buffer { gpa: OUTSIDE_GPA, len_bytes: 4 << 20, writable: true };
        match kind {
            Hostile::Outside | Hostile::Repeated => ring.add(&[readable(1024)])?,
            Hostile::Length => ring.add(&[readable(7)])?,
            Hostile::Direction => ring.add(&[Buffer { writable: true, ..readable(1024) }])?,
            Hostile::Loop => ring.add_loop(&[readable(4), readable(4)])?,
            Hostile::Statistics => {
                let mut bytes = [0xff; 10 * 20 - 3];
                // An unknown tag, then a known one again and again, each with the largest value
                // there is.
                for stat in bytes.chunks_mut(10).skip(1) {
                    stat[..2].copy_from_slice(&4_u16.to_le_bytes());
                }
                store_bytes(words, &bytes);
                ring.add(&[readable(bytes.len() as u32)])?;
            }
            Hostile::Reporting | Hostile::Hinting => ring.add(&[outside])?,
        }
        ring.notify(&mut self.transport);
        Ok(())
    }
}
