//! The balloon behind the transport's registers, with a driver that is good or bad and a host that
//! takes notes.

mod bad_driver;
mod config_space;
mod fuzz;
mod hinting;
mod lists;
mod reporting;
mod saved;
mod statistics;

use std::io::{self, ErrorKind};
use std::ops::Range;
use std::sync::{Arc, Mutex};

use vm_memory::bitmap::AtomicBitmap;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion, GuestRegionMmap};

use super::*;
use crate::reclaim::Gpa;
use crate::virtio::TRANSPORT_FEATURES;
use crate::virtio::testing::*;

const MUST_TELL_HOST: u64 = 1 << 0;
const STATS_VQ: u64 = 1 << 1;
const DEFLATE_ON_OOM: u64 = 1 << 2;
const FREE_PAGE_HINT: u64 = 1 << 3;
const PAGE_POISON: u64 = 1 << 4;
const REPORTING: u64 = 1 << 5;
const ALL_FEATURES: u64 = 0x3f;

const INFLATE: usize = 0;
const DEFLATE: usize = 1;

/// Everything is offered.
const ALL: Config =
    Config { target_pages: 0, deflate_on_oom: true, statistics: true, hinting: true, reporting: true };

/// Where requests are put: behind the rings of five queues.
const DATA: u64 = 0x8_0000;
/// EVENT_IDX is left out, so that every completion interrupts.
const TRANSPORT: u64 = TRANSPORT_FEATURES & !(1 << 29);

/// What the host was asked to take.
#[derive(Default)]
struct Notes {
    /// The guest's RAM, in bytes.
    ram: Vec<Range<u64>>,
    /// Page numbers.
    discarded: Vec<(u64, u64)>,
    /// What it frees at once, in pages; 0 is one.
    granule_pages: u64,
    /// The host refuses.
    fails: bool,
    /// What else happens while a page is discarded.
    meanwhile: Option<Box<dyn FnMut() + Send>>,
}

#[derive(Clone, Default)]
struct Host(Arc<Mutex<Notes>>);

impl Reclaim for Host {
    fn granule_bytes(&self) -> u64 {
        self.0.lock().unwrap().granule_pages.max(1) * 4096
    }

    fn discard(&self, range: Range<Gpa>) -> io::Result<()> {
        let Range { start: Gpa(start), end: Gpa(end) } = range;
        assert!(start < end && start.is_multiple_of(4096) && end.is_multiple_of(4096), "{range:?}");
        let notes = &mut *self.0.lock().unwrap();
        assert!(notes.ram.iter().any(|region| region.start <= start && end <= region.end), "{range:?}");
        if notes.fails {
            return Err(ErrorKind::OutOfMemory.into());
        }
        notes.discarded.push((start / 4096, end / 4096));
        if let Some(meanwhile) = &mut notes.meanwhile {
            meanwhile();
        }
        Ok(())
    }
}

/// A guest with a balloon.
struct Guest {
    driver: Driver,
    handle: Handle,
    host: Host,
    /// By queue index.
    rings: Vec<Ring>,
}

impl Guest {
    /// No driver yet.
    fn new(config: Config) -> Self {
        Self::over(config, ram())
    }

    fn over(config: Config, memory: Arc<GuestMemory>) -> Self {
        Self::with_granule(config, memory, 1)
    }

    /// On a host whose granule is `granule_pages` pages.
    fn with_granule(config: Config, memory: Arc<GuestMemory>, granule_pages: u64) -> Self {
        let bytes = |region: &GuestRegionMmap<AtomicBitmap>| {
            region.start_addr().0..region.start_addr().0 + region.len()
        };
        let ram = memory.iter().map(bytes).collect();
        let notes = Notes { ram, granule_pages, ..Default::default() };
        let host = Host(Arc::new(Mutex::new(notes)));
        let (balloon, handle) = Balloon::new(config, &memory, Box::new(host.clone()));
        Self { driver: Driver::over(memory, balloon), handle, host, rings: Vec::new() }
    }

    /// A driver that wants `features` runs.
    fn running(config: Config, features: u64) -> Self {
        let mut guest = Self::new(config);
        guest.start(features);
        guest
    }

    fn start(&mut self, features: u64) {
        self.driver.negotiate(TRANSPORT | features);
        let optional = (features & (STATS_VQ | FREE_PAGE_HINT | REPORTING)).count_ones() as usize;
        self.rings = (0..2 + optional).map(|index| self.driver.add_queue(index, 256)).collect();
        self.driver.add_status(DRIVER_OK);
        assert_eq!(self.driver.status(), ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
    }

    /// Offers one chain of (address, length, flags) and says so. Returns how many chains were
    /// completed.
    fn send_chain(&mut self, queue: usize, buffers: &[(u64, u32, u16)]) -> u16 {
        let before = self.rings[queue].used_idx();
        self.offer_chain(queue, buffers);
        self.driver.kick(queue as u32);
        self.rings[queue].used_idx().wrapping_sub(before)
    }

    fn offer_chain(&mut self, queue: usize, buffers: &[(u64, u32, u16)]) {
        let ring = &mut self.rings[queue];
        for (index, &(address, len, flags)) in (0u16..).zip(buffers) {
            let more = if usize::from(index) + 1 < buffers.len() { NEXT } else { 0 };
            ring.descriptor(index, (address, len, flags | more, index + 1));
        }
        ring.offer(0);
    }

    /// Sends bytes in one device-readable buffer.
    fn send(&mut self, queue: usize, bytes: &[u8]) -> u16 {
        self.driver.memory.write_slice(bytes, GuestAddress(DATA)).unwrap();
        self.send_chain(queue, &[(DATA, bytes.len() as u32, 0)])
    }

    /// Sends a list of PFNs, which must be completed.
    fn list(&mut self, queue: usize, pfns: &[u32]) {
        assert_eq!(self.send(queue, &bytes(pfns)), 1);
    }

    /// Gives free pages (first, end), which must be completed.
    fn free(&mut self, queue: usize, pages: &[(u64, u64)]) {
        let buffer = |&(first, end): &(u64, u64)| (first * 4096, ((end - first) * 4096) as u32, WRITE);
        assert_eq!(self.send_chain(queue, &pages.iter().map(buffer).collect::<Vec<_>>()), 1);
    }

    /// What the host has been asked to take since the last question.
    fn discarded(&self) -> Vec<(u64, u64)> {
        std::mem::take(&mut self.host.0.lock().unwrap().discarded)
    }

    /// The pages held, as (first, end).
    fn held(&self) -> Vec<(u64, u64)> {
        let held: Vec<_> =
            self.handle.held().iter().map(|range| (range.start.0 / 4096, range.end.0 / 4096)).collect();
        assert_eq!(held.iter().map(|(first, end)| end - first).sum::<u64>(), self.handle.held_pages());
        held
    }

    fn refused(&self) -> u64 {
        self.handle.counters().refused
    }

    /// A word of configuration space.
    fn config(&mut self, index: u32) -> u32 {
        self.driver.read(0x100 + 4 * index)
    }
}

fn bytes(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}
