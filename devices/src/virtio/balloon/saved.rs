//! A balloon as data, and the way back.

use super::hint::{HintStatus, Hinting};
use super::ram::Ram;
use super::state::Handle;
use super::{Counters, state::StatisticsQueue};
use crate::reclaim::PAGE_BYTES;
use crate::state::BalloonState;
use crate::virtio::place;

impl Handle {
    /// How far the device has got in the statistics queue.
    pub(super) fn statistics_place(&self) -> Option<(u16, u16)> {
        place(Some(&self.lock().driver.as_ref()?.statistics.as_ref()?.queue))
    }

    /// What it is. Statistics are not in it: they would be old.
    pub(super) fn save(&self) -> BalloonState {
        let state = self.lock();
        let pages = |start: u64, end: u64| (start / PAGE_BYTES, (end - start) / PAGE_BYTES);
        let queue = state.driver.as_ref().and_then(|driver| driver.statistics.as_ref());
        let counters = state.counters;
        BalloonState {
            target_pages: state.target_pages,
            actual_pages: state.actual_pages,
            poison: state.poison,
            host_cmd: state.hinting.status.host_cmd,
            guest_cmd: state.hinting.status.guest_cmd,
            last_run: state.hinting.last_run,
            acknowledge_on_stop: state.hinting.acknowledge_on_stop,
            held: state.held.ranges().iter().map(|range| pages(range.start.0, range.end.0)).collect(),
            counters: [
                counters.inflated_pages,
                counters.deflated_pages,
                counters.reclaimed_bytes,
                counters.swept_pages,
                counters.reported_bytes,
                counters.hinted_bytes,
                counters.failed_discards,
                counters.refused,
            ],
            kept: queue.and_then(|queue| queue.kept),
        }
    }

    /// Makes it what was saved, over `ram`: pages that are not there are in no balloon.
    pub(super) fn restore(&self, saved: &BalloonState, ram: &Ram) {
        let mut state = self.lock();
        state.target_pages = saved.target_pages;
        state.actual_pages = saved.actual_pages;
        state.poison = saved.poison;
        let status = HintStatus { host_cmd: saved.host_cmd, guest_cmd: saved.guest_cmd };
        let (last_run, acknowledge_on_stop) = (saved.last_run, saved.acknowledge_on_stop);
        state.hinting = Hinting { status, last_run, acknowledge_on_stop };
        state.held.clear();
        for (first, pages) in &saved.held {
            for part in ram.parts(*first..first.saturating_add(*pages)) {
                state.held.insert(&part);
            }
        }
        let [
            inflated_pages,
            deflated_pages,
            reclaimed_bytes,
            swept_pages,
            reported_bytes,
            hinted_bytes,
            failed_discards,
            refused,
        ] = saved.counters;
        state.counters = Counters {
            inflated_pages,
            deflated_pages,
            reclaimed_bytes,
            swept_pages,
            reported_bytes,
            hinted_bytes,
            failed_discards,
            refused,
        };
        if let Some(StatisticsQueue { kept, .. }) =
            state.driver.as_mut().and_then(|driver| driver.statistics.as_mut())
        {
            *kept = saved.kept;
        }
    }
}
