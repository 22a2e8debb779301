//! The inputs of a step: the views, and what was remembered of them.

use super::allocation::{Claim, divide};
use super::knobs::Knobs;
use super::memory_state::{MemoryState, percent_of};
use super::view::{GuestState, GuestView, HostView};

/// The inputs of every part of a step.
pub(super) struct Scene<'a> {
    pub(super) host: &'a HostView,
    pub(super) guests: &'a [GuestView],
    pub(super) knobs: &'a Knobs,
    pub(super) memory_state: MemoryState,
    pub(super) passed_seconds: f64,
    /// How fast free memory falls; 0 if it does not.
    pub(super) falling_pages_per_second: f64,
    /// Pages that each guest uses, remembered for a while.
    pub(super) active_pages: Vec<u64>,
    /// Whether each guest's balloon can be counted on.
    pub(super) follows: Vec<bool>,
    /// Whether each guest was suspended long enough ago to wait for memory only.
    pub(super) waits: Vec<bool>,
}

impl Scene<'_> {
    /// This percentage of capacity.
    pub(super) fn percent(&self, percent: f64) -> u64 {
        percent_of(self.host.capacity_pages, percent)
    }

    /// The guests in one state, by index.
    pub(super) fn in_state(&self, state: GuestState) -> impl Iterator<Item = usize> {
        self.guests.iter().enumerate().filter(move |(_, g)| g.state == state).map(|(i, _)| i)
    }

    /// Frames that balloons leave to the guests: a margin above the high threshold stays free.
    fn frames_to_divide(&self) -> f64 {
        let frames: f64 =
            self.guests.iter().filter(|g| g.state != GuestState::Dead).map(GuestView::held_frames).sum();
        frames + self.host.free_pages as f64
            - self.percent(self.knobs.high_percent + 2.0 * self.knobs.margin_percent) as f64
    }

    /// What a suspended guest lacks to run: what it uses of its part, less what it has.
    pub(super) fn lacks_to_run_pages(&self, index: usize, fair: &[u64]) -> u64 {
        let guest = &self.guests[index];
        self.runs_with_pages(index, fair).saturating_sub(guest.held_pages())
    }

    /// What a suspended guest uses of its part when it runs again.
    pub(super) fn runs_with_pages(&self, index: usize, fair: &[u64]) -> u64 {
        let guest = &self.guests[index];
        let usable = guest.promised_pages - guest.ballooned_pages();
        self.active_pages[index].min(fair[index]).max(guest.floor_pages()).min(usable)
    }

    /// What each guest would be left if all followed; 0 for the dead.
    pub(super) fn fair_pages(&self) -> Vec<u64> {
        self.divided(|i| self.guests[i].state != GuestState::Dead)
    }

    /// What each guest that `takes_part` is left; the others keep what they have.
    pub(super) fn divided(&self, takes_part: impl Fn(usize) -> bool) -> Vec<u64> {
        let mut frames = self.frames_to_divide();
        let mut claims = Vec::with_capacity(self.guests.len());
        for (i, guest) in self.guests.iter().enumerate() {
            if takes_part(i) {
                claims.push(Claim::of(guest, self.active_pages[i]));
            } else if guest.state != GuestState::Dead {
                frames -= guest.held_frames();
            }
        }
        let mut divided = divide(&claims, frames, self.knobs.idle_tax).pages.into_iter();
        let held = |guest: &GuestView| if guest.state == GuestState::Dead { 0 } else { guest.held_pages() };
        let mut left = Vec::with_capacity(self.guests.len());
        for (i, guest) in self.guests.iter().enumerate() {
            let pages = if takes_part(i) { divided.next().unwrap_or_default() } else { held(guest) };
            // Numbers too large to be pages are rounded.
            left.push(pages.min(guest.promised_pages));
        }
        left
    }
}
