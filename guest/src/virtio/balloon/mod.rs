//! The balloon, the driver's side (Virtio 1.2, section 5.5).
//!
//! [`Driver`] gives pages that the workload does not use to the host, takes them back, and sends
//! the host statistics of the guest's memory. It never touches a page: it moves bits in a
//! [`PageMap`] and numbers in rings. Its caller calls [`Driver::poll`] when the device may have
//! changed something, [`Driver::step`] all the time, and respects [`Driver::room`] before it fills.
//!
//! Statistics, deflate on out-of-memory, free page hinting and free page reporting are used if they
//! are offered. It has no page poisoning, for it has no poison.

mod free;
mod hostile;
mod moving;
mod pages;
mod statistics;

use core::ops::Range;
use core::sync::atomic::AtomicU32;

pub use pages::{Frames, PageMap};

use super::ring::{self, Ring, Unusable};
use super::{INTERRUPT_CONFIG, StartError, Transport, drive, fail, negotiate, register, reset, status};
use crate::in_use::InUse;
use crate::protocol::{BalloonReport, Drive, Hostile};
use free::{Hints, Told};
use hostile::Attempt;
use moving::{PFN_WORDS, Round};

pub use hostile::HostileError;

pub const DEVICE_ID: u32 = 5;

/// VIRTIO_BALLOON_F_MUST_TELL_HOST: pages may be used once the host knows. This driver always waits
/// for that.
pub const F_MUST_TELL_HOST: u64 = 1 << 0;
/// VIRTIO_BALLOON_F_STATS_VQ.
pub const F_STATS_VQ: u64 = 1 << 1;
/// VIRTIO_BALLOON_F_DEFLATE_ON_OOM.
pub const F_DEFLATE_ON_OOM: u64 = 1 << 2;
/// VIRTIO_BALLOON_F_FREE_PAGE_HINT.
pub const F_FREE_PAGE_HINT: u64 = 1 << 3;
/// VIRTIO_BALLOON_F_REPORTING.
pub const F_REPORTING: u64 = 1 << 5;
const KNOWN: u64 = F_MUST_TELL_HOST | F_STATS_VQ | F_DEFLATE_ON_OOM | F_FREE_PAGE_HINT | F_REPORTING;

// Configuration space, in bytes from its begin.
const CONFIG_NUM_PAGES: u32 = 0;
const CONFIG_ACTUAL: u32 = 4;
const CONFIG_HINT_CMD: u32 = 8;

// Memory shared with the device, in words of 32 bits: a page for each ring, then the buffers.
const QUEUES_MAX: usize = 5;
const PFN_BUFFERS: usize = QUEUES_MAX * ring::WORDS;
const STATISTICS_WORDS: usize = PFN_BUFFERS + PFN_WORDS;
const HINT_WORD: usize = STATISTICS_WORDS + 64;
const HOSTILE_WORDS: usize = HINT_WORD + 64;

/// Words of 32 bits that a driver shares with its device: eight pages.
pub const SHARED_WORDS: usize = 8 * 1024;

const _: () = assert!(HOSTILE_WORDS + 256 <= SHARED_WORDS);

/// Polls of the rings before the guest sleeps while a request is out. Each poll takes some
/// ten nanoseconds; a request takes tens of microseconds.
const SPINS: usize = 2000;

/// How long an emptying balloon may make no progress before the device is reset all the same.
const LEAVE_MICROS: u64 = 1_000_000;

/// How many pages a fill may have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FillLimits {
    /// Without an explicit size: those outside the balloon.
    pub default: u64,
    /// With one: given VIRTIO_BALLOON_F_DEFLATE_ON_OOM, those in the balloon too.
    pub most: u64,
}

/// Whether the first pages may be filled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Room {
    Ready,
    /// When the device has answered.
    Soon,
    /// They are in the balloon, and the device is broken.
    Never,
}

/// What is out at the end of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rest {
    /// Nothing that the guest waits for.
    Idle,
    /// A request: look again soon.
    Waiting,
}

#[derive(Debug)]
struct Rings<'m> {
    inflate: Ring<'m>,
    deflate: Ring<'m>,
    statistics: Option<Ring<'m>>,
    hinting: Option<Ring<'m>>,
    reporting: Option<Ring<'m>>,
}

impl Rings<'_> {
    /// Whether the device has used something that was not taken yet.
    fn have_used(&self) -> bool {
        let optional = [&self.statistics, &self.hinting, &self.reporting];
        self.inflate.has_used()
            || self.deflate.has_used()
            || optional.into_iter().flatten().any(Ring::has_used)
    }
}

#[derive(Debug)]
pub struct Driver<'m, T> {
    transport: T,
    /// Shared with the device.
    words: &'m [AtomicU32],
    gpa: u64,
    pages: PageMap<'m>,
    mem_pages: u64,
    drive: Drive,
    features: u64,
    /// There are some unless it is off.
    rings: Option<Rings<'m>>,
    target: u64,
    actual: u64,
    round: Option<Round>,
    /// A fill waits for its pages.
    fill_waits: bool,
    report: Told,
    /// Pages from here on may have become reportable; None if there are none.
    report_from: Option<u64>,
    reported_pages: u64,
    hints: Hints,
    statistics_sent: u64,
    /// Pages written for the first time since the host emptied them.
    first_writes: u64,
    attempt: Option<Attempt>,
    /// When the emptying balloon last got smaller, and how large it was.
    left: (u64, u64),
}

impl<'m, T: Transport> Driver<'m, T> {
    /// A driver of the balloon behind `transport`, which it does not touch until [`Driver::on`].
    /// `words` are memory for the device at guest-physical address `gpa` (page-aligned), at least
    /// [`SHARED_WORDS`]. The guest has `mem_pages` in all.
    pub fn new(transport: T, words: &'m [AtomicU32], gpa: u64, pages: PageMap<'m>, mem_pages: u64) -> Self {
        Self {
            transport,
            words,
            gpa,
            pages,
            mem_pages,
            drive: Drive::Off,
            features: 0,
            rings: None,
            target: 0,
            actual: 0,
            round: None,
            fill_waits: false,
            report: Told::default(),
            report_from: None,
            reported_pages: 0,
            hints: Hints::default(),
            statistics_sent: 0,
            first_writes: 0,
            attempt: None,
            left: (0, 0),
        }
    }

    /// Starts the device. Returns the features negotiated. Does nothing to one that is driven.
    ///
    /// # Errors
    /// [`StartError`]; the driver is broken then.
    pub fn on(&mut self) -> Result<u64, StartError> {
        if matches!(self.drive, Drive::On | Drive::Leaving) {
            self.drive = Drive::On;
            return Ok(self.features);
        }
        self.forget();
        let started = self.start();
        self.drive = if started.is_ok() { Drive::On } else { Drive::Broken };
        if started.is_err() {
            fail(&mut self.transport);
        } else {
            self.refresh();
        }
        started
    }

    fn start(&mut self) -> Result<u64, StartError> {
        let features = negotiate(&mut self.transport, KNOWN)?;
        // Queues are numbered without gaps, in this order; a queue of a missing feature has no
        // number.
        let mut queue = 0;
        let mut start = |transport: &mut T, feature: u64| {
            if feature != 0 && features & feature == 0 {
                return Ok(None);
            }
            let at = queue as usize * ring::WORDS;
            let words = self.words.get(at..).unwrap_or_default();
            let started = Ring::start(transport, queue, words, self.gpa + 4 * at as u64);
            queue += 1;
            started.map(Some)
        };
        let missing = StartError::Queue(0);
        let rings = Rings {
            inflate: start(&mut self.transport, 0)?.ok_or(missing)?,
            deflate: start(&mut self.transport, 0)?.ok_or(missing)?,
            statistics: start(&mut self.transport, F_STATS_VQ)?,
            hinting: start(&mut self.transport, F_FREE_PAGE_HINT)?,
            reporting: start(&mut self.transport, F_REPORTING)?,
        };
        drive(&mut self.transport);
        self.rings = Some(rings);
        self.features = features;
        self.report_from = (features & F_REPORTING != 0).then_some(0);
        Ok(features)
    }

    /// What a reset ends.
    fn forget(&mut self) {
        self.rings = None;
        self.features = 0;
        (self.target, self.actual) = (0, 0);
        self.round = None;
        self.report = Told::default();
        self.report_from = None;
        self.hints = Hints::default();
        self.pages.forget_given();
    }

    /// Begins to take everything back, and then releases the device: [`Driver::drive`] is `off`
    /// when that is done. A broken device is reset at once.
    pub fn off(&mut self, now_micros: u64) {
        match self.drive {
            Drive::Off => {}
            Drive::On | Drive::Leaving => {
                self.drive = Drive::Leaving;
                self.left = (now_micros, self.pages.given());
            }
            Drive::Broken => self.let_go(),
        }
    }

    fn let_go(&mut self) {
        // One that does not finish its reset is not driven either.
        let _ = reset(&mut self.transport);
        self.forget();
        self.drive = Drive::Off;
    }

    /// Whether the device is driven.
    pub fn drive(&self) -> Drive {
        self.drive
    }

    /// Polls the device. Costs an exit to the VMM, so not for every step.
    pub fn poll(&mut self) {
        if self.rings.is_none() || self.drive == Drive::Broken {
            return;
        }
        let interrupts = self.transport.read(register::INTERRUPT_STATUS);
        if interrupts == 0 {
            return;
        }
        self.transport.write(register::INTERRUPT_ACK, interrupts);
        if interrupts & INTERRUPT_CONFIG != 0 {
            self.refresh();
        }
    }

    /// Reads what the host has changed.
    fn refresh(&mut self) {
        if self.transport.read(register::STATUS) & status::NEEDS_RESET != 0 {
            self.drive = Drive::Broken;
            return;
        }
        self.target = self.transport.read(register::CONFIG + CONFIG_NUM_PAGES).into();
        if self.features & F_FREE_PAGE_HINT != 0 {
            self.hints.host_cmd = self.transport.read(register::CONFIG + CONFIG_HINT_CMD);
        }
    }

    /// Goes on with everything. `in_use` are the workload's pages. If the caller has nothing else
    /// to do (`patient`), it waits a little for what is out. Reads and writes memory only, unless
    /// something is to be sent.
    pub fn step(&mut self, in_use: &InUse, now_micros: u64, patient: bool) -> Rest {
        if matches!(self.drive, Drive::Off | Drive::Broken) {
            self.judge_attempt(now_micros);
            return Rest::Idle;
        }
        let Some(mut rings) = self.rings.take() else { return Rest::Idle };
        let mut out = self.advance(&mut rings, in_use, now_micros);
        if patient && out == Ok(true) {
            let some = (0..SPINS).any(|_| {
                core::hint::spin_loop();
                rings.have_used()
            });
            if some {
                out = self.advance(&mut rings, in_use, now_micros);
            }
        }
        self.rings = Some(rings);
        self.judge_attempt(now_micros);
        match out {
            // The device used what it was not given: nothing it does can be relied on.
            Err(Unusable) => self.drive = Drive::Broken,
            Ok(true) => return Rest::Waiting,
            Ok(false) => {}
        }
        if self.drive == Drive::Leaving {
            return self.leave(now_micros, out == Ok(false));
        }
        Rest::Idle
    }

    /// True if requests are out.
    fn advance(&mut self, rings: &mut Rings<'_>, in_use: &InUse, now_micros: u64) -> Result<bool, Unusable> {
        let moving = self.step_moving(rings, in_use)?;
        let (mut reporting, mut hinting) = (false, false);
        if self.drive == Drive::On {
            reporting = self.step_reporting(rings, in_use)?;
            hinting = self.step_hinting(rings, in_use)?;
        }
        self.step_statistics(rings, in_use)?;
        let attempting = self.step_attempt(rings, in_use, now_micros)?;
        if self.drive == Drive::Leaving && self.pages.given() != self.left.1 {
            self.left = (now_micros, self.pages.given());
        }
        let stuck = self.drive == Drive::Leaving && now_micros.saturating_sub(self.left.0) >= LEAVE_MICROS;
        Ok((moving || reporting || hinting || attempting) && !stuck)
    }

    fn leave(&mut self, now_micros: u64, settled: bool) -> Rest {
        let stuck = now_micros.saturating_sub(self.left.0) >= LEAVE_MICROS;
        if settled && (self.pages.given() == 0 || stuck) {
            self.let_go();
            return Rest::Idle;
        }
        Rest::Waiting
    }

    /// The size the balloon should have.
    fn aim(&self) -> u64 {
        if self.drive == Drive::On { self.target } else { 0 }
    }

    /// How many pages a fill may have.
    pub fn fill_limits(&self) -> FillLimits {
        let count = self.pages.count();
        // What is in excess of the target is on its way out.
        let kept = if self.drive == Drive::Broken { u64::MAX } else { self.aim() };
        let default = count - self.pages.given().min(kept);
        let gives_way = self.drive == Drive::On && self.features & F_DEFLATE_ON_OOM != 0;
        FillLimits { default, most: if gives_way { count } else { default } }
    }

    /// Whether the first `pages` may be filled. [`Driver::step`] makes sure that they will be; its
    /// caller must already count them as in use.
    pub fn room(&mut self, pages: u64) -> Room {
        let given = self.pages.given_in(0..pages.min(self.pages.count()));
        self.fill_waits = given > 0;
        if given > 0 && self.drive == Drive::Broken {
            self.fill_waits = false;
            return Room::Never;
        }
        let is_told = matches!(self.drive, Drive::On | Drive::Leaving)
            && (self.report.reaches_below(pages) || self.hints.reaches_below(pages));
        if given > 0 || is_told { Room::Soon } else { Room::Ready }
    }

    /// No fill waits any more.
    pub fn fill_cancelled(&mut self) {
        self.fill_waits = false;
        self.freed();
    }

    /// The first `pages` are going to be written.
    pub fn filling(&mut self, pages: u64) {
        let pages = pages.min(self.pages.count());
        self.first_writes += self.pages.set_touched(0..pages, true);
        self.hints.take_back();
        // Those that the last fill had beyond these are free now.
        self.freed();
    }

    /// Pages have become free.
    pub fn freed(&mut self) {
        if self.features & F_REPORTING != 0 {
            self.report_from = Some(0);
        }
    }

    /// The first pages from `from` on that are free and that the host should have emptied.
    pub fn next_emptied(&self, from: u64, max: u64, in_use: &InUse) -> Option<Range<u64>> {
        self.pages.next_free_touched(from, max, in_use, false)
    }

    /// The first page from `from` on that is in the balloon.
    pub fn next_given(&self, from: u64) -> Option<u64> {
        self.pages.next_given(from)
    }

    /// A page is going to be written although it is in the balloon.
    pub fn misuse(&mut self, page: u64) {
        if page < self.pages.count() {
            self.pages.set_touched(page..page + 1, true);
        }
    }

    fn free_pages(&self, in_use: &InUse) -> u64 {
        self.pages.count().saturating_sub(in_use.pages()).saturating_sub(self.pages.given())
    }

    pub fn report(&self, in_use: &InUse) -> BalloonReport {
        BalloonReport {
            drive: self.drive,
            features: self.features,
            target: self.target,
            actual: self.actual,
            given: self.pages.given(),
            free: self.free_pages(in_use),
            reported: self.reported_pages,
            hinted: self.hints.pages,
            hinting: self.hints.stands(),
            hint_cmd: self.hints.host_cmd,
            statistics: self.statistics_sent,
        }
    }

    /// Whether the device offers what `kind` needs.
    fn has_queue_for(&self, kind: Hostile) -> bool {
        match kind {
            Hostile::Statistics => self.features & F_STATS_VQ != 0,
            Hostile::Reporting => self.features & F_REPORTING != 0,
            Hostile::Hinting => self.features & F_FREE_PAGE_HINT != 0,
            _ => true,
        }
    }
}
