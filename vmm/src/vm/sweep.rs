//! Drops pages again that are in the balloon and have got frames since.
//!
//! A guest that touches what it gave costs the host a frame. So does the host kernel itself: where a whole huge page has
//! gone into the balloon and one small page of it comes out again, the next touch brings the whole of it back, and
//! khugepaged fills what is missing around pages that are there.

use std::io;
use std::ops::Range;
use std::os::fd::OwnedFd;

use devices::reclaim::{Gpa, Reclaim};
use devices::virtio::balloon::Handle;
use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime,
};

use crate::memory::PAGE_BYTES;
use crate::memory::pagemap::{Pagemap, PagemapEntry, PagemapError};
use crate::memory::ram::{Backing, Ram};

/// Seconds from one sweep to the next: as often as khugepaged wakes up. A sweep reads 8 bytes for each page of the balloon.
const PERIOD_SECONDS: i64 = 10;

/// Sweeps a balloon now and then.
pub(super) struct Sweep {
    timer: OwnedFd,
    balloon: Handle,
    ram: Ram,
}

impl Sweep {
    /// Sweeps `balloon`, whose pages are in `ram`, from now on.
    pub(super) fn new(balloon: Handle, ram: Ram) -> io::Result<Self> {
        let timer =
            timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC)?;
        let every = Timespec { tv_sec: PERIOD_SECONDS, tv_nsec: 0 };
        let interval = Itimerspec { it_interval: every, it_value: every };
        timerfd_settime(&timer, TimerfdTimerFlags::empty(), &interval)?;
        Ok(Self { timer, balloon, ram })
    }

    fn sweep(&self) {
        // A part of a huge page of the pool cannot be given back alone, and looks the same ever after.
        if self.ram.backing() == Backing::Hugetlb {
            return;
        }
        self.balloon.sweep(|held| match resident(held, &self.ram) {
            Ok((ranges, pages)) => {
                let mut failed = 0;
                self.ram.discard_all(&ranges, &mut |range, _| {
                    failed += (range.end.0 - range.start.0) / PAGE_BYTES
                });
                pages - failed
            }
            // The balloon's status says so, to whoever asks.
            Err(_) => 0,
        });
    }
}

/// Where pages of `held` have frames, and how many have.
fn resident(held: &[Range<Gpa>], ram: &Ram) -> Result<(Vec<Range<Gpa>>, u64), PagemapError> {
    let (mut pagemap, mut entries) = (Pagemap::open_self()?, Vec::new());
    let mut ranges: Vec<Range<Gpa>> = Vec::new();
    let mut pages = 0;
    for range in held {
        let Some(place) = ram.place(range) else { continue };
        pagemap.read(place.hva as u64, place.bytes / PAGE_BYTES as usize, &mut entries)?;
        let resident = |entry: &PagemapEntry| entry.present() || entry.swapped();
        for (n, _) in entries.iter().enumerate().filter(|(_, entry)| resident(entry)) {
            let start = Gpa(range.start.0 + n as u64 * PAGE_BYTES);
            let end = Gpa(start.0 + PAGE_BYTES);
            pages += 1;
            match ranges.last_mut() {
                Some(last) if last.end == start => last.end = end,
                _ => ranges.push(start..end),
            }
        }
    }
    Ok((ranges, pages))
}

impl MutEventSubscriber for Sweep {
    fn init(&mut self, ops: &mut EventOps) {
        let _ = ops.add(Events::new(&self.timer, EventSet::IN));
    }

    fn process(&mut self, _: Events, _: &mut EventOps) {
        // However often the time came meanwhile, once is enough.
        let _ = rustix::io::read(&self.timer, &mut [0u8; 8]);
        self.sweep();
    }
}
