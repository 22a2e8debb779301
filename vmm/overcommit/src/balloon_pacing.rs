//! Brings a balloon to its best size: not for every little change, not all at once, and not where
//! the guest does not follow.

use serde::{Deserialize, Serialize};

use super::knobs::Knobs;
use super::memory_state::percent_of;
use super::view::{BalloonView, GuestView};

/// The state of one guest's balloon.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Pacing {
    /// Pages that were in it when the watch for refusal began; None while it is at its target.
    watched_from_pages: Option<u64>,
    /// How long it has been watched or has refused, or how long since it was asked again.
    watched_seconds: f64,
    refuses: bool,
    /// How often it was asked again since it last followed.
    retries: u32,
    /// Whether the watched balloon was to grow.
    growing: bool,
}

impl Pacing {
    /// Whether it refuses: it keeps what it has, and is not counted on.
    pub fn refuses(&self) -> bool {
        self.refuses
    }

    /// Watches whether the balloon follows.
    pub fn watch(&mut self, guest: &GuestView, passed_seconds: f64, knobs: &Knobs) {
        let Some(balloon) = guest.balloon else {
            *self = Self::default();
            return;
        };
        let missing = balloon.target_pages.abs_diff(balloon.actual_pages);
        if missing <= dead_band_pages(guest, knobs) {
            *self = Self::default();
            return;
        }
        let growing = balloon.target_pages > balloon.actual_pages;
        let from = match self.watched_from_pages {
            Some(from) if growing == self.growing => from,
            _ => {
                self.watch_anew(balloon, growing);
                balloon.actual_pages
            }
        };
        self.watched_seconds += passed_seconds;
        let (less, more) = if growing { (from, balloon.actual_pages) } else { (balloon.actual_pages, from) };
        let moved = more.saturating_sub(less);
        let enough = ((missing + moved) / 4)
            .min((knobs.refusal_pages_per_second as f64 * knobs.refusal_seconds) as u64)
            .max(1);
        if moved >= enough {
            self.refuses = false;
            self.watch_anew(balloon, growing);
        } else if !self.refuses && self.watched_seconds >= knobs.refusal_seconds {
            self.refuses = true;
            self.watched_seconds = 0.0;
        }
    }

    fn watch_anew(&mut self, balloon: BalloonView, growing: bool) {
        self.watched_from_pages = Some(balloon.actual_pages);
        self.watched_seconds = 0.0;
        self.growing = growing;
    }

    /// Whether it is time to ask a guest that refuses again. The interval doubles each time.
    pub fn asks_again(&mut self, knobs: &Knobs) -> bool {
        let wait =
            (knobs.retry_seconds * 2_f64.powi(self.retries.min(30) as i32)).min(knobs.retry_most_seconds);
        let again = self.refuses && self.watched_seconds >= wait;
        if again {
            self.retries += 1;
            self.watched_seconds = 0.0;
        }
        again
    }
}

/// Changes up to this size are not requested.
pub fn dead_band_pages(guest: &GuestView, knobs: &Knobs) -> u64 {
    percent_of(guest.promised_pages, knobs.dead_band_percent).max(knobs.dead_band_pages)
}

/// The next size on the way to `wanted_pages`; None if the balloon stays.
pub fn next_target(guest: &GuestView, wanted_pages: u64, passed_seconds: f64, knobs: &Knobs) -> Option<u64> {
    let balloon = guest.balloon?;
    // A minimum is restored at once, whatever the pace.
    let most = guest.promised_pages - guest.floor_pages();
    let (from, wanted) = (balloon.target_pages, wanted_pages.min(most));
    let at_pace = |rate: u64| (rate as f64 * passed_seconds) as u64;
    let paced = if wanted > from {
        wanted.min(from.saturating_add(at_pace(knobs.inflate_pages_per_second)))
    } else {
        wanted.max(from.saturating_sub(at_pace(knobs.deflate_pages_per_second)))
    };
    let emptied = wanted == 0 && from > 0;
    let worth = wanted.abs_diff(from) > dead_band_pages(guest, knobs) || emptied;
    let next = if worth { paced.min(most) } else { from.min(most) };
    (next != from).then_some(next)
}

/// Whether a guest needs more than it is left: it says so, or it uses nearly all.
pub fn wants_more(guest: &GuestView, active_pages: u64, knobs: &Knobs) -> bool {
    let left = guest.promised_pages - guest.ballooned_pages();
    let says = guest.spare_pages.is_some_and(|spare| spare < percent_of(left, knobs.wanting_spare_percent));
    let shows = active_pages >= percent_of(left, knobs.wanting_active_percent);
    says || shows
}

#[cfg(test)]
mod tests {
    use super::*;

    fn guest(target_pages: u64, actual_pages: u64) -> GuestView {
        GuestView {
            promised_pages: 100_000,
            max_pages: 100_000,
            min_pages: 20_000,
            balloon: Some(BalloonView { target_pages, actual_pages }),
            ..GuestView::default()
        }
    }

    #[test]
    fn it_is_left_alone_for_little() {
        let knobs = Knobs::default();
        assert_eq!(next_target(&guest(5000, 5000), 6000, 1.0, &knobs), None, "one percent");
        assert_eq!(next_target(&guest(5000, 5000), 6001, 1.0, &knobs), Some(6001));
        assert_eq!(next_target(&guest(500, 500), 0, 1.0, &knobs), Some(0), "but it may be emptied");
    }

    #[test]
    fn it_moves_at_its_pace() {
        let knobs =
            Knobs { inflate_pages_per_second: 1000, deflate_pages_per_second: 3000, ..Knobs::default() };
        assert_eq!(next_target(&guest(0, 0), 50_000, 2.0, &knobs), Some(2000));
        assert_eq!(next_target(&guest(50_000, 50_000), 0, 2.0, &knobs), Some(44_000));
        assert_eq!(next_target(&guest(50_000, 50_000), 0, 0.0, &knobs), None, "no time has passed");
    }

    #[test]
    fn the_minimum_is_kept_whatever_the_pace() {
        let knobs = Knobs { deflate_pages_per_second: 1, ..Knobs::default() };
        assert_eq!(next_target(&guest(90_000, 90_000), 99_000, 0.0, &knobs), Some(80_000));
        assert_eq!(next_target(&GuestView::default(), 5, 1.0, &knobs), None, "there is no driver");
    }

    /// A balloon of size `target` that reports `actual` after each second.
    fn watched(pacing: &mut Pacing, target: u64, seconds: u64, actual: impl Fn(u64) -> u64) {
        for second in 0..seconds {
            pacing.watch(&guest(target, actual(second)), 1.0, &Knobs::default());
        }
    }

    #[test]
    fn a_balloon_that_does_not_move_refuses() {
        let mut pacing = Pacing::default();
        watched(&mut pacing, 50_000, 14, |_| 10_000);
        assert!(!pacing.refuses());
        watched(&mut pacing, 50_000, 1, |_| 10_000);
        assert!(pacing.refuses());
        watched(&mut pacing, 50_000, 1, |_| 50_000);
        assert!(!pacing.refuses(), "and then it did");
        watched(&mut pacing, 5000, 15, |_| 50_000);
        assert!(pacing.refuses(), "to become smaller too");
    }

    #[test]
    fn a_page_now_and_then_is_no_progress() {
        let mut pacing = Pacing::default();
        watched(&mut pacing, 50_000, 16, |second| 10_000 + second);
        assert!(pacing.refuses());
        let mut pacing = Pacing::default();
        watched(&mut pacing, 50_000, 30, |second| 10_000 + second * 1000);
        assert!(!pacing.refuses(), "slow is not refusing");
    }

    #[test]
    fn it_is_asked_again_more_and_more_seldom() {
        let mut pacing = Pacing::default();
        let mut asked = Vec::new();
        for second in 0..2000_u64 {
            watched(&mut pacing, 50_000, 1, |_| 10_000);
            if pacing.asks_again(&Knobs::default()) {
                asked.push(second);
            }
        }
        assert_eq!(asked, [74, 194, 434, 914, 1874]);
    }

    #[test]
    fn wanting_is_said_or_shown() {
        let knobs = Knobs::default();
        let left_half = GuestView { spare_pages: Some(2499), ..guest(50_000, 50_000) };
        assert!(wants_more(&left_half, 0, &knobs));
        let at_ease = GuestView { spare_pages: Some(2500), ..left_half };
        assert!(!wants_more(&at_ease, 39_999, &knobs));
        assert!(wants_more(&at_ease, 40_000, &knobs));
    }
}
