//! A host in the model: its guests touch, page, merge and balloon; the policy observes and acts.

use super::dice::Dice;
use super::guest::{Guest, PAGES_PER_MIB};
use super::scenario::{Driver, Phase, Scenario};
use super::tally::{Sample, Tally};
use overcommit::action::Action;
use overcommit::policy::{Memory, step};
use overcommit::view::{GuestState, GuestView, HostView, Psi};

/// How much faster pages are merged at urgent priority.
const URGENT: f64 = 4.0;
/// The time that pressure stall information is averaged over.
const PSI_SECONDS: f64 = 10.0;
/// The most of a step that a guest can wait for swap.
const MOST_WAITED: f64 = 0.99;

/// One host, and its clock.
pub(super) struct Host<'a> {
    scenario: &'a Scenario,
    memory: Memory,
    guests: Vec<Guest>,
    views: Vec<GuestView>,
    dice: Dice,
    now_seconds: f64,
    /// The lead of its clock.
    jumped_seconds: f64,
    psi: Psi,
    urgent: bool,
    free_pages: f64,
}

impl<'a> Host<'a> {
    pub(super) fn new(scenario: &'a Scenario, number: u64) -> Self {
        let mut dice = Dice::new(scenario.seed, number);
        let mut guests = Vec::new();
        for (kind, spec) in scenario.guests.iter().enumerate() {
            let load = scenario.loads.get(&spec.load).copied().unwrap_or_default();
            guests.extend((0..spec.count).map(|n| Guest::new(kind, n, spec, load, &mut dice)));
        }
        let views = guests.iter().map(|g| g.view.clone()).collect();
        let mut host = Self {
            scenario,
            memory: Memory::default(),
            guests,
            views,
            dice,
            now_seconds: 0.0,
            jumped_seconds: 0.0,
            psi: Psi::default(),
            urgent: false,
            free_pages: 0.0,
        };
        host.free_pages = host.capacity_pages();
        host
    }

    fn capacity_pages(&self) -> f64 {
        self.scenario.host.capacity_mib as f64 * PAGES_PER_MIB
    }

    pub(super) fn guests(&self) -> impl Iterator<Item = &Guest> {
        self.guests.iter()
    }

    /// Suspends a guest as the policy does, without asking it.
    #[cfg(test)]
    pub(super) fn suspend(&mut self, index: usize) {
        self.guests[index].view.state = GuestState::Suspended;
    }

    pub(super) fn begin(&mut self, phase: &Phase) {
        self.jumped_seconds += phase.clock_jump_seconds;
        for guest in &mut self.guests {
            let kind = &self.scenario.guests[guest.kind].name;
            if let Some(load) = phase.loads.get(kind).and_then(|name| self.scenario.loads.get(name)) {
                guest.begin(*load, self.now_seconds);
            }
            if let Some(driver) = phase.balloons.get(kind) {
                guest.driver = *driver;
                guest.view.balloon =
                    (*driver != Driver::None).then(|| guest.view.balloon.unwrap_or_default());
            }
        }
    }

    /// One step of the model, and one of the policy.
    pub(super) fn step(&mut self, phase: &Phase, number: u64, tally: &mut Tally) -> Sample {
        let seconds = self.scenario.step_seconds;
        for guest in &mut self.guests {
            guest.live(self.now_seconds, self.now_seconds + seconds);
        }
        self.count_free(phase);
        self.make_room(0.0, tally);
        self.free_pages = self.free_pages.max(0.0);
        self.merge(phase, seconds);
        self.use_memory(seconds, tally);
        self.now_seconds += seconds;
        self.count_free(phase);
        self.free_pages = self.free_pages.max(0.0);
        self.decide(phase, seconds, number, tally)
    }

    fn merge(&mut self, phase: &Phase, seconds: f64) {
        let breaks = 1.0 - (1.0 - phase.breaks_percent_per_second / 100.0).powf(seconds);
        let sharers = self.guests.iter().filter(|g| g.lives()).count();
        let speed = self.scenario.host.merge_mib_per_second as f64 * PAGES_PER_MIB;
        let mut pages = speed * seconds * if self.urgent { URGENT } else { 1.0 };
        for guest in &mut self.guests {
            if breaks > 0.0 {
                // Written pages are no longer the same as another guest's. Without a frame for its
                // copy the writer waits.
                let broken =
                    if guest.runs() { (guest.saved_pages * breaks).min(self.free_pages) } else { 0.0 };
                guest.saved_pages -= broken;
                self.free_pages -= broken;
            } else if guest.lives() && pages > 0.0 {
                let merged = guest.merge(pages, sharers);
                pages -= merged;
                self.free_pages += merged;
            }
        }
    }

    /// Guests move their balloons, read back from swap what they use, and touch new memory.
    fn use_memory(&mut self, seconds: f64, tally: &mut Tally) {
        let spec = self.scenario.host;
        let speed = spec.balloon_mib_per_second as f64 * PAGES_PER_MIB;
        let mut readable = spec.page_in_mib_per_second as f64 * PAGES_PER_MIB * seconds;
        let (mut worst, mut waited_all, mut busy) = (0.0_f64, 0.0, 0_usize);
        for index in 0..self.guests.len() {
            let guest = &mut self.guests[index];
            if !guest.runs() {
                if guest.lives() {
                    tally.stood(guest.kind, seconds);
                }
                guest.show(0.0);
                continue;
            }
            guest.want(self.now_seconds, seconds, &mut self.dice);
            let before = guest.frames();
            tally.balloon_moved_pages += guest.move_balloon(speed, seconds);
            self.free_pages += before - guest.frames();
            // Pages that are used and on swap are read back: cold ones went there first.
            let missing = (guest.active_pages() - guest.resident_pages).max(0.0);
            let limit = guest.view.throttle_pages_per_second.map_or(f64::INFINITY, |l| l as f64);
            let has = guest.resident_pages + guest.swapped_pages;
            let wanted = (guest.wants_pages.min(guest.usable_pages()) - has).max(0.0);
            let at_speed = wanted.min(guest.load.touch_mib_per_second * PAGES_PER_MIB * seconds);
            let touched = at_speed.min(limit * seconds);
            self.make_room(missing.min(readable), tally);
            let guest = &mut self.guests[index];
            let read = missing.min(readable).min(self.free_pages);
            guest.resident_pages += read;
            guest.swapped_pages -= read;
            readable -= read;
            self.free_pages -= read;
            // Only now: what was read back has left room on swap.
            self.make_room(touched, tally);
            let guest = &mut self.guests[index];
            let got = touched.min(self.free_pages);
            guest.resident_pages += got;
            self.free_pages -= got;
            let on_swap = (missing * spec.page_in_microseconds * 1e-6 / seconds).min(MOST_WAITED);
            let without_frame = if touched > 0.0 { (touched - got) / touched } else { 0.0 };
            guest.view.held = touched < at_speed;
            let held_back = if at_speed > 0.0 { 1.0 - touched / at_speed } else { 0.0 };
            // A throttle holds back a guest that grows; the kernel does not report that as a stall.
            let waited = on_swap.max(without_frame);
            let kind = &mut tally.kinds[guest.kind];
            kind.count(guest.progress(waited.max(held_back)), guest, seconds);
            tally.swapped_in_pages += read;
            tally.denied_pages += touched - got;
            guest.show(got / seconds);
            if guest.wants_pages > 0.0 {
                worst = worst.max(waited);
                waited_all += waited;
                busy += 1;
            }
        }
        let weight = (seconds / PSI_SECONDS).min(1.0);
        let full = 100.0 * waited_all / busy.max(1) as f64;
        self.psi.some_avg10_percent += weight * (100.0 * worst - self.psi.some_avg10_percent);
        self.psi.full_avg10_percent += weight * (full - self.psi.full_avg10_percent);
    }

    /// Without a free frame the kernel itself pages out: of the guest with most that it does not
    /// use, else of the largest.
    fn make_room(&mut self, pages: f64, tally: &mut Tally) {
        // The kernel tries two guests at most for one that wants memory: the rest then waits.
        for _ in 0..2 {
            let short = pages - self.free_pages;
            let swap = self.swap_free_pages();
            if short <= 0.0 || swap <= 0.0 {
                return;
            }
            let cold = |g: &Guest| g.resident_pages - g.active_pages();
            let order = |g: &&mut Guest| (cold(g).max(0.0), g.resident_pages);
            let victim = self.guests.iter_mut().filter(|g| g.lives()).max_by(|a, b| {
                let (a, b) = (order(a), order(b));
                a.0.total_cmp(&b.0).then(a.1.total_cmp(&b.1))
            });
            let Some(victim) = victim else { return };
            let most = if cold(victim) > 0.0 { cold(victim) } else { victim.resident_pages };
            let out = short.min(swap).min(most);
            let before = victim.frames();
            victim.drop_resident(out);
            victim.swapped_pages += out;
            self.free_pages += before - victim.frames();
            tally.kernel_swapped_out_pages += out;
        }
    }

    fn swap_free_pages(&self) -> f64 {
        let used: f64 = self.guests.iter().map(|g| g.swapped_pages).sum();
        (self.scenario.host.swap_mib as f64 * PAGES_PER_MIB - used).max(0.0)
    }

    /// Free memory is negative when others take more than there is.
    fn count_free(&mut self, phase: &Phase) {
        let overhead = self.scenario.host.overhead_mib_per_guest as f64 * PAGES_PER_MIB;
        let taken: f64 = self.guests.iter().filter(|g| g.lives()).map(|g| g.frames() + overhead).sum();
        let elsewhere = phase.elsewhere_mib as f64 * PAGES_PER_MIB;
        self.free_pages = self.capacity_pages() - elsewhere - taken;
    }

    fn decide(&mut self, phase: &Phase, seconds: f64, number: u64, tally: &mut Tally) -> Sample {
        let capacity = self.capacity_pages();
        let view = HostView {
            now_seconds: self.now_seconds + self.jumped_seconds,
            capacity_pages: capacity as u64,
            used_pages: (capacity - self.free_pages) as u64,
            free_pages: self.free_pages as u64,
            swap_free_pages: self.swap_free_pages() as u64,
            psi: self.scenario.host.psi.then_some(self.psi),
            merging: self.scenario.host.merge_mib_per_second > 0,
            unnamed_image_pages: 0,
        };
        for (shown, guest) in self.views.iter_mut().zip(&mut self.guests) {
            let name = std::mem::take(&mut shown.name);
            let kept = std::mem::take(&mut guest.view.name);
            *shown = guest.view.clone();
            (shown.name, guest.view.name) = (name, kept);
        }
        let before = self.memory.memory_state();
        let actions = step(&mut self.memory, &view, &self.views, &phase.policy);
        for action in &actions {
            self.carry_out(action, tally);
        }
        let sum = |of: fn(&Guest) -> f64| self.guests.iter().map(of).sum::<f64>();
        let count = |is: fn(&Guest) -> bool| self.guests.iter().filter(|g| is(g)).count() as u64;
        let sample = Sample {
            seconds: self.now_seconds,
            host: number,
            memory_state: self.memory.memory_state(),
            free_pages: self.free_pages,
            ballooned_pages: sum(|g| g.ballooned_pages),
            swapped_pages: sum(|g| g.swapped_pages),
            saved_pages: sum(|g| g.saved_pages),
            running: count(Guest::runs),
            suspended: count(|g| g.view.state == GuestState::Suspended),
            throttled: count(|g| g.runs() && g.view.held),
            actions: actions.len() as u64,
        };
        if sample.memory_state != before {
            tally.state_changed();
        }
        tally.count(&sample, capacity, seconds);
        sample
    }

    fn carry_out(&mut self, action: &Action, tally: &mut Tally) {
        let now = self.now_seconds;
        let swap = self.swap_free_pages();
        if let Action::SetPriority { urgent } = *action {
            self.urgent = urgent;
        }
        let Some(guest) = action.guest().and_then(|i| self.guests.get_mut(i)) else { return };
        tally.note(action, guest, now);
        match *action {
            Action::Balloon { target_pages, .. } => {
                tally.swings += u64::from(guest.send(target_pages, now));
            }
            Action::Throttle { pages_per_second, .. } => {
                guest.view.throttle_pages_per_second = pages_per_second
            }
            Action::PageOut { pages, .. } => {
                let out = (pages as f64).min(guest.resident_pages).min(swap);
                let before = guest.frames();
                guest.drop_resident(out);
                guest.swapped_pages += out;
                self.free_pages += before - guest.frames();
                tally.swapped_out_pages += out;
            }
            Action::Suspend { .. } => guest.view.state = GuestState::Suspended,
            Action::Resume { .. } => guest.view.state = GuestState::Running,
            Action::Stop { .. } => guest.end(),
            Action::SetPriority { .. } | Action::DropImages { .. } => {}
        }
    }
}
