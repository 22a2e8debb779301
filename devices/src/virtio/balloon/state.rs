//! What the balloon and the host's side of it share.

use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard};

use crate::lock::lock;

use virtio_queue::Queue;

use super::super::read_at;
use super::Config;
use super::config::{FREE_PAGE_HINT, MUST_TELL_HOST, PAGE_POISON};
use super::held::Held;
use super::hint::{HintStatus, Hinting};
use super::ram::Ram;
use super::stats::{ENTRY_BYTES, MAX_ENTRIES, Statistics, entries};
use crate::GuestMemory;
use crate::reclaim::Gpa;
use crate::virtio::drain::{Completion, complete, drain};
use crate::virtio::{Interrupt, Progress, RingError};
use crate::warn::Limited;

/// The host's way to a balloon. Clones share it.
///
/// Every method returns at once, but may first wait for the discards of one request. None may be
/// called from a [`Reclaim`](crate::reclaim::Reclaim).
#[derive(Clone, Debug)]
pub struct Handle(Arc<Mutex<State>>);

/// What both sides see, behind one lock.
#[derive(Debug)]
pub(super) struct State {
    config: Config,
    pub(super) target_pages: u32,
    pub(super) actual_pages: u32,
    pub(super) poison: u32,
    pub(super) hinting: Hinting,
    statistics: Statistics,
    pub(super) held: Held,
    pub(super) counters: Counters,
    pub(super) driver: Option<Attached>,
}

/// A driver that runs the device.
#[derive(Debug)]
pub(super) struct Attached {
    memory: Arc<GuestMemory>,
    interrupt: Interrupt,
    features: u64,
    pub(super) statistics: Option<StatisticsQueue>,
}

/// The queue that works the other way round: the device keeps the driver's buffer until it wants
/// the next.
#[derive(Debug)]
pub(super) struct StatisticsQueue {
    pub(super) queue: Queue,
    /// Head of the chain that is kept.
    pub(super) kept: Option<u16>,
}

/// What has happened since the VM began. Never goes back, not even with a driver's reset.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Pages the driver gave by the inflate queue, repeated ones too.
    pub inflated_pages: u64,
    /// Pages it took back by the deflate queue.
    pub deflated_pages: u64,
    /// Bytes given back to the host because of the inflate queue.
    pub reclaimed_bytes: u64,
    /// Pages of the balloon that had got frames again and were dropped again, by [`Handle::sweep`].
    pub swept_pages: u64,
    /// Bytes given back by free page reporting.
    pub reported_bytes: u64,
    /// Bytes given back by free page hinting.
    pub hinted_bytes: u64,
    /// Times the host would not take a range back.
    pub failed_discards: u64,
    /// Pages named outside RAM, and requests that made no sense.
    pub refused: u64,
}

/// Why hinting could not be started or stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HintError {
    /// It was not offered, or the driver does not want it.
    #[error(
        "free page hinting is not available: expected a balloon with free_page_hinting and a guest driver that has it"
    )]
    Unavailable,
}

impl Handle {
    /// What the balloon was made with.
    pub fn config(&self) -> Config {
        self.lock().config
    }

    /// Whether a driver runs the device.
    pub fn has_driver(&self) -> bool {
        self.lock().running().is_some()
    }

    /// The size the host wants, in pages.
    pub fn target_pages(&self) -> u32 {
        self.lock().target_pages
    }

    /// Asks the driver for another size. The caller checks it against RAM.
    ///
    /// Without a driver it is kept for the next one.
    pub fn set_target(&self, pages: u32) {
        let mut state = self.lock();
        if state.target_pages != pages {
            state.target_pages = pages;
            state.config_changed();
        }
    }

    /// The size the driver says it has reached (`actual` in configuration space). 0 without a
    /// driver.
    pub fn actual_pages(&self) -> u32 {
        self.lock().actual_pages
    }

    /// The pages the driver has given and not taken back, as ranges in ascending order, each inside
    /// one region of RAM.
    pub fn held(&self) -> Vec<Range<Gpa>> {
        self.lock().held.ranges()
    }

    /// How many pages [`Handle::held`] has. Unlike [`Handle::actual_pages`] this is counted, not
    /// said.
    pub fn held_pages(&self) -> u64 {
        self.lock().held.pages()
    }

    /// Lets `drop_again` look through the pages in the balloon and drop those that have got frames
    /// again; it says how many pages those were. No page leaves the balloon meanwhile.
    ///
    /// Does nothing with a driver that may use pages before it tells (without
    /// VIRTIO_BALLOON_F_MUST_TELL_HOST).
    pub fn sweep(&self, drop_again: impl FnOnce(&[Range<Gpa>]) -> u64) {
        let mut state = self.lock();
        let tells = state.running().is_some_and(|driver| driver.features & MUST_TELL_HOST != 0);
        if tells && state.held.pages() > 0 {
            state.counters.swept_pages += drop_again(&state.held.ranges());
        }
    }

    /// Asks the driver for fresh statistics. False if it has left no buffer to ask with (yet).
    pub fn request_statistics(&self) -> bool {
        self.lock().running_mut().is_some_and(Attached::return_statistics)
    }

    /// The latest statistics, once there are some. Those of a driver go with it.
    pub fn statistics(&self) -> Option<Statistics> {
        Some(self.lock().statistics).filter(|statistics| statistics.updates > 0)
    }

    /// What has happened so far.
    pub fn counters(&self) -> Counters {
        self.lock().counters
    }

    /// Starts a run of free page hinting. With `acknowledge_on_stop` the device acknowledges the
    /// run as soon as the guest has reported everything, and the guest may use the pages again.
    ///
    /// A page is discarded as soon as its hint is seen. A run that goes on is replaced.
    ///
    /// Linux's driver keeps hinted pages to itself until the run is done, but under memory pressure
    /// it frees some earlier, without asking whether the device has seen the hint. Such a page may
    /// be in use again when it is discarded, and what is in it is lost. So a run is for guests that
    /// have memory to spare; reporting has no such gap.
    pub fn start_hinting(&self, acknowledge_on_stop: bool) -> Result<(), HintError> {
        self.change_hinting(|hinting| hinting.start(acknowledge_on_stop))
    }

    /// Ends the run: the guest may use all hinted pages again.
    ///
    /// Once this has returned nothing more is discarded that was hinted. Without a run it does no
    /// harm.
    pub fn stop_hinting(&self) -> Result<(), HintError> {
        self.change_hinting(Hinting::stop)
    }

    /// Where hinting stands.
    pub fn hinting(&self) -> Result<HintStatus, HintError> {
        let state = self.lock();
        state.check_hinting()?;
        Ok(state.hinting.status())
    }

    fn change_hinting(&self, change: impl FnOnce(&mut Hinting)) -> Result<(), HintError> {
        let mut state = self.lock();
        state.check_hinting()?;
        change(&mut state.hinting);
        state.config_changed();
        Ok(())
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        lock(&self.0)
    }
}

/// The device's side.
impl Handle {
    pub(super) fn new(config: Config, ram: &Ram) -> Self {
        Self(Arc::new(Mutex::new(State {
            config,
            target_pages: config.target_pages,
            actual_pages: 0,
            poison: 0,
            hinting: Hinting::default(),
            statistics: Statistics::default(),
            held: Held::new(ram),
            counters: Counters::default(),
            driver: None,
        })))
    }

    /// A driver runs the device from now on.
    pub(super) fn attach(
        &self,
        memory: Arc<GuestMemory>,
        interrupt: Interrupt,
        features: u64,
        statistics: Option<Queue>,
    ) {
        let statistics = statistics.map(|queue| StatisticsQueue { queue, kept: None });
        self.lock().driver = Some(Attached { memory, interrupt, features, statistics });
    }

    /// The driver is gone. A good one has deflated the balloon before; one that rebooted uses all
    /// of its RAM again. So nothing is held, and what the driver said does not count any more. The
    /// target stays.
    pub(super) fn detach(&self) {
        let mut state = self.lock();
        state.driver = None;
        state.actual_pages = 0;
        state.poison = 0;
        state.hinting.reset();
        state.statistics = Statistics::default();
        state.held.clear();
    }

    /// Counts what made no sense.
    pub(super) fn refuse(&self, count: u64) {
        self.lock().counters.refused += count;
    }

    /// Takes statistics from their queue and keeps the last buffer.
    pub(super) fn receive_statistics(&self, broken: &Limited) -> Result<Progress, RingError> {
        let mut state = self.lock();
        let State { driver, statistics, counters, .. } = &mut *state;
        let Some(Attached { memory, interrupt, statistics: Some(queue), .. }) = driver else {
            return Ok(Progress::Idle);
        };
        let StatisticsQueue { queue, kept } = queue;
        let mut returned = Vec::new();
        let progress = drain(queue, memory, interrupt, broken, |chain| {
            let mut buffer = [0; MAX_ENTRIES * ENTRY_BYTES];
            let bytes = chain.read(&mut buffer);
            let refused = entries(&buffer[..bytes]).filter(Option::is_none).count() as u64;
            let misused = bytes == 0 || chain.readable_bytes() as usize > bytes || chain.writable_bytes() > 0;
            counters.refused += refused + u64::from(misused);
            if bytes > 0 {
                statistics.merge(entries(&buffer[..bytes]).flatten());
            }
            // There should be only one. The driver gets the older one back, as if it had been asked
            // for more.
            returned.extend(kept.replace(chain.head()));
            Completion::Held
        })?;
        for head in returned {
            complete(queue, memory, interrupt, head, 0)?;
        }
        Ok(progress)
    }
}

/// Configuration space (5.5.4): four little-endian words.
impl Handle {
    /// Reads any part of it.
    pub(super) fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_at(&self.lock().config_space(), offset, data);
    }

    /// Writes any part of it. What is not the driver's to write stays as it is.
    pub(super) fn write_config(&self, offset: u64, data: &[u8]) {
        let mut state = self.lock();
        let mut config = state.config_space();
        let place =
            usize::try_from(offset).ok().and_then(|offset| config.get_mut(offset..)).unwrap_or_default();
        for (byte, value) in place.iter_mut().zip(data) {
            *byte = *value;
        }
        let word = |index: usize| config.as_chunks().0.get(index).copied().map_or(0, u32::from_le_bytes);
        // Before DRIVER_OK there can be no page in the balloon.
        if state.driver.is_some() {
            state.actual_pages = word(1);
        }
        // Drivers write this one before DRIVER_OK.
        state.poison = word(3);
        let end = offset.saturating_add(data.len() as u64);
        let writable = [4..8, 12..16].iter().any(|field| field.start <= offset && end <= field.end);
        state.counters.refused += u64::from(!writable);
    }
}

impl State {
    fn config_space(&self) -> [u8; 16] {
        let mut config = [0; 16];
        let words = [self.target_pages, self.actual_pages, self.hinting.status().host_cmd, self.poison];
        for (place, word) in config.as_chunks_mut().0.iter_mut().zip(words) {
            *place = word.to_le_bytes();
        }
        config
    }

    /// The driver, if it has not brought the device to a stop.
    fn running(&self) -> Option<&Attached> {
        self.driver.as_ref().filter(|driver| !driver.interrupt.needs_reset())
    }

    fn running_mut(&mut self) -> Option<&mut Attached> {
        self.driver.as_mut().filter(|driver| !driver.interrupt.needs_reset())
    }

    fn config_changed(&self) {
        if let Some(driver) = self.running() {
            driver.interrupt.config_changed();
        }
    }

    fn check_hinting(&self) -> Result<(), HintError> {
        let negotiated = self.running().is_some_and(|driver| driver.features & FREE_PAGE_HINT != 0);
        if negotiated { Ok(()) } else { Err(HintError::Unavailable) }
    }

    /// The driver sent a command ID.
    pub(super) fn answer_hinting(&mut self, cmd: u32) {
        if self.hinting.answer(cmd) {
            self.config_changed();
        }
    }

    /// Whether a hint that comes now may be acted on.
    pub(super) fn is_hinting(&self) -> bool {
        self.hinting.is_running()
    }

    /// Whether pages that are only free, not in the balloon, must keep what is in them: the driver
    /// fills them with something that is not zero and looks for it later.
    pub(super) fn keeps_free_pages(&self) -> bool {
        let fills = self.driver.as_ref().is_some_and(|driver| driver.features & PAGE_POISON != 0);
        fills && self.poison != 0
    }
}

impl Attached {
    /// Gives the kept statistics buffer back, which makes the driver send a fresh one. False if
    /// there is none.
    fn return_statistics(&mut self) -> bool {
        let Some(StatisticsQueue { queue, kept }) = &mut self.statistics else { return false };
        let Some(head) = kept.take() else { return false };
        let returned = complete(queue, &self.memory, &self.interrupt, head, 0);
        if returned.is_err() {
            self.interrupt.device_needs_reset();
        }
        returned.is_ok()
    }
}
