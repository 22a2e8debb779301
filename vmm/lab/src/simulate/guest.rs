//! A guest in the model: what it has in memory and on swap, what it wants, and its progress.

use super::dice::Dice;
use super::scenario::{Driver, GuestSpec, Load};
use overcommit::view::{BalloonView, GuestState, GuestView};

/// Pages of a MiB.
pub(super) const PAGES_PER_MIB: f64 = 256.0;
/// How much more slowly a slow balloon moves.
const SLOW: f64 = 64.0;
/// Progress falls to a half when this part of what a guest uses does not fit what it is left.
const HALVED_BY: f64 = 0.05;
/// A balloon that is sent back within this time swings.
const SWINGS_SECONDS: f64 = 60.0;

/// One guest of one host. Pages are fractions here: a model has no need to round.
#[derive(Clone, Debug)]
pub(super) struct Guest {
    /// Which kind it is.
    pub(super) kind: usize,
    pub(super) view: GuestView,
    pub(super) driver: Driver,
    pub(super) load: Load,
    arrives_seconds: f64,
    departs_seconds: f64,
    /// Offset in its turns of work and rest; 0 to 1.
    offset: f64,
    wander_pages: f64,
    /// What it used when its load changed, and when that was.
    before_pages: f64,
    changed_seconds: f64,
    /// What it would use if it had it.
    pub(super) wants_pages: f64,
    pub(super) resident_pages: f64,
    pub(super) swapped_pages: f64,
    pub(super) ballooned_pages: f64,
    /// Frames that it does not need because others have the same pages.
    pub(super) saved_pages: f64,
    share: f64,
    /// The direction in which its balloon was last sent, and when.
    sent: Option<(bool, f64)>,
}

impl Guest {
    pub(super) fn new(kind: usize, number: u64, spec: &GuestSpec, load: Load, dice: &mut Dice) -> Self {
        let pages = |mib: u64| mib * PAGES_PER_MIB as u64;
        let arrives_seconds = spec.arrives_seconds + number as f64 * spec.every_seconds;
        let view = GuestView {
            name: format!("{}-{number}", spec.name),
            promised_pages: pages(spec.memory_mib),
            balloon: (spec.balloon != Driver::None).then(BalloonView::default),
            shares: spec.shares,
            min_pages: pages(spec.min_mib),
            max_pages: pages(spec.max_mib.unwrap_or(spec.memory_mib)),
            priority: spec.priority,
            state: GuestState::Dead,
            ..GuestView::default()
        };
        Self {
            kind,
            view,
            driver: spec.balloon,
            load,
            arrives_seconds,
            departs_seconds: spec.stays_seconds.map_or(f64::INFINITY, |s| arrives_seconds + s),
            offset: dice.part(),
            wander_pages: 0.0,
            before_pages: 0.0,
            changed_seconds: arrives_seconds,
            wants_pages: 0.0,
            resident_pages: 0.0,
            swapped_pages: 0.0,
            ballooned_pages: 0.0,
            saved_pages: 0.0,
            share: spec.share_percent / 100.0,
            sent: None,
        }
    }

    pub(super) fn lives(&self) -> bool {
        self.view.state != GuestState::Dead
    }

    pub(super) fn runs(&self) -> bool {
        self.view.state == GuestState::Running
    }

    /// Starts and ends when it is its time. A guest that was stopped does not come back.
    pub(super) fn live(&mut self, from_seconds: f64, to_seconds: f64) {
        if (from_seconds..to_seconds).contains(&self.arrives_seconds) {
            self.view.state = GuestState::Running;
        }
        if self.lives() && to_seconds > self.departs_seconds {
            self.end();
        }
    }

    /// Ends it; it has nothing then.
    pub(super) fn end(&mut self) {
        self.view.state = GuestState::Dead;
        self.view.throttle_pages_per_second = None;
        (self.resident_pages, self.swapped_pages, self.ballooned_pages) = (0.0, 0.0, 0.0);
        (self.saved_pages, self.wants_pages) = (0.0, 0.0);
    }

    /// Changes its load.
    pub(super) fn begin(&mut self, load: Load, seconds: f64) {
        self.before_pages = self.wants_pages;
        self.changed_seconds = seconds.max(self.arrives_seconds);
        self.load = load;
    }

    pub(super) fn promised_pages(&self) -> f64 {
        self.view.promised_pages as f64
    }

    /// Pages that its balloon leaves it.
    pub(super) fn usable_pages(&self) -> f64 {
        self.promised_pages() - self.ballooned_pages
    }

    /// What it uses of the memory that it has.
    pub(super) fn active_pages(&self) -> f64 {
        self.wants_pages.min(self.usable_pages()).min(self.resident_pages + self.swapped_pages)
    }

    /// Frames that it takes.
    pub(super) fn frames(&self) -> f64 {
        self.resident_pages - self.saved_pages
    }

    /// Decides how much it wants now.
    pub(super) fn want(&mut self, now_seconds: f64, step_seconds: f64, dice: &mut Dice) {
        let (load, promised) = (self.load, self.promised_pages());
        let turn = if load.period_seconds > 0.0 {
            (now_seconds / load.period_seconds + self.offset).fract() * 100.0 < load.duty_percent
        } else {
            true
        };
        let percent = if turn { load.active_percent } else { load.rest_percent };
        if load.walk_percent > 0.0 {
            let most = promised * 0.2;
            let wandered =
                self.wander_pages + dice.swing() * promised * load.walk_percent / 100.0 * step_seconds.sqrt();
            self.wander_pages = wandered.clamp(-most, most);
        } else {
            self.wander_pages = 0.0;
        }
        let there = promised * percent / 100.0 + self.wander_pages;
        let part = if load.ramp_seconds > 0.0 {
            ((now_seconds - self.changed_seconds) / load.ramp_seconds).clamp(0.0, 1.0)
        } else {
            1.0
        };
        self.wants_pages = (self.before_pages + (there - self.before_pages) * part).clamp(0.0, promised);
    }

    /// Moves its balloon. Returns the pages moved. It drops what no longer fits: first what is on
    /// swap.
    pub(super) fn move_balloon(&mut self, pages_per_second: f64, step_seconds: f64) -> f64 {
        let Some(balloon) = self.view.balloon else { return 0.0 };
        let speed = match self.driver {
            Driver::Follows | Driver::Lies => pages_per_second,
            Driver::Slow => pages_per_second / SLOW,
            Driver::None | Driver::Refuses => return 0.0,
        };
        let most = speed * step_seconds;
        let moved = (balloon.target_pages as f64 - self.ballooned_pages).clamp(-most, most);
        self.ballooned_pages = (self.ballooned_pages + moved).clamp(0.0, self.promised_pages());
        let over = (self.resident_pages + self.swapped_pages - self.usable_pages()).max(0.0);
        let from_swap = over.min(self.swapped_pages);
        self.swapped_pages -= from_swap;
        self.drop_resident(over - from_swap);
        moved.abs()
    }

    /// Its balloon is sent to another size. Returns whether it was sent the other way a short while
    /// ago.
    pub(super) fn send(&mut self, target_pages: u64, now_seconds: f64) -> bool {
        let Some(balloon) = &mut self.view.balloon else { return false };
        let grows = target_pages > balloon.target_pages;
        balloon.target_pages = target_pages;
        let before = self.sent.replace((grows, now_seconds));
        before.is_some_and(|(grew, at)| grew != grows && now_seconds - at < SWINGS_SECONDS)
    }

    /// Gives up pages in memory, shared and unshared alike.
    pub(super) fn drop_resident(&mut self, pages: f64) {
        if self.resident_pages > 0.0 && pages > 0.0 {
            let kept = ((self.resident_pages - pages) / self.resident_pages).max(0.0);
            self.resident_pages *= kept;
            self.saved_pages *= kept;
        }
    }

    /// Merges at most `pages` of its pages, of which `sharers` have the same. Returns the pages
    /// merged.
    pub(super) fn merge(&mut self, pages: f64, sharers: usize) -> f64 {
        if sharers < 2 {
            return 0.0;
        }
        let could = self.resident_pages * self.share * (1.0 - 1.0 / sharers as f64);
        let merged = (could - self.saved_pages).clamp(0.0, pages);
        self.saved_pages += merged;
        merged
    }

    /// Its progress, as a part of what is possible: less when what it uses does not fit, or when it
    /// waits.
    pub(super) fn progress(&self, waited: f64) -> f64 {
        if !self.runs() {
            return 0.0;
        }
        let missing = (self.wants_pages - self.usable_pages()).max(0.0) / self.wants_pages.max(1.0);
        (1.0 - waited.clamp(0.0, 1.0)) / (1.0 + missing / HALVED_BY)
    }

    /// Brings what the policy sees up to date.
    pub(super) fn show(&mut self, touched_pages_per_second: f64) {
        let active = self.active_pages();
        let lies = self.driver == Driver::Lies;
        let usable = self.usable_pages();
        let view = &mut self.view;
        view.resident_pages = self.resident_pages.round() as u64;
        view.frames = self.resident_pages - self.saved_pages;
        view.touched_pages_per_second = touched_pages_per_second;
        let spare = if lies { 0.0 } else { (usable - self.wants_pages).max(0.0) };
        view.working_set_pages = Some(if lies { view.promised_pages * 2 } else { active as u64 });
        view.spare_pages = Some(spare as u64);
        if let Some(balloon) = &mut view.balloon {
            balloon.actual_pages = self.ballooned_pages.round() as u64;
        }
    }
}
