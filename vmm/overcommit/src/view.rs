//! The inputs of a decision: one host and its guests, in numbers.

use serde::{Deserialize, Serialize};

/// One host at one moment.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct HostView {
    /// Monotonic time. A jump, forwards or backwards, is taken for a short step.
    pub now_seconds: f64,
    /// All that guests and their overhead may take together. With 0 nothing can be decided, and
    /// nothing is done.
    pub capacity_pages: u64,
    /// What they take: guests' frames, and the overhead of VMMs, page tables and merging.
    pub used_pages: u64,
    /// What they may still take: the smaller of capacity less use, and what the host has available.
    pub free_pages: u64,
    /// Free swap; 0 where there is none, and then nothing is paged out.
    pub swap_free_pages: u64,
    /// Pressure stall information, where the kernel gives it.
    pub psi: Option<Psi>,
    /// Whether an engine merges pages, so that it can be set to urgent priority.
    pub merging: bool,
    /// Pages of slabs that nothing but images without a name keep, and of processes that stand by for clones.
    #[serde(default)]
    pub unnamed_image_pages: u64,
}

/// Pressure stall information of memory: percent of the last ten seconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Psi {
    /// In which at least one task waited for memory.
    pub some_avg10_percent: f64,
    /// In which all tasks that had work waited for memory.
    pub full_avg10_percent: f64,
}

/// The state of a guest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum GuestState {
    #[default]
    Running,
    /// This policy stopped its vCPUs, and may resume them.
    Suspended,
    /// Its owner stopped its vCPUs: it holds what it has, and is left alone.
    Paused,
    /// Its VM process does not answer: it holds what it has, and cannot be asked for anything.
    Silent,
    /// It has ended and holds nothing.
    Dead,
}

impl GuestState {
    pub fn name(self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::Suspended => "suspended",
            Self::Paused => "paused",
            Self::Silent => "silent",
            Self::Dead => "dead",
        }
    }
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BalloonView {
    /// Pages it was asked for.
    pub target_pages: u64,
    /// Pages that are in it.
    pub actual_pages: u64,
}

/// One guest at one moment. Its own report may be a lie: it is cut to what the guest was promised
/// before it is used.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct GuestView {
    /// Its name, which identifies it from one step to the next, in any order of guests.
    pub name: String,
    /// RAM it was promised.
    pub promised_pages: u64,
    /// Its balloon; None if it has no driver for one.
    pub balloon: Option<BalloonView>,
    /// Pages of it that are in memory.
    pub resident_pages: u64,
    /// Its part of the host's frames; sharing makes it less than `resident_pages`.
    pub frames: f64,
    /// Pages it touched lately, estimated from outside; None without an estimate.
    pub working_set_pages: Option<u64>,
    /// How far that may be off, in 95 of 100 cases.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub working_set_error_pages: Option<u64>,
    /// Memory that it could spare, by its own report.
    pub spare_pages: Option<u64>,
    /// Pages it touches for the first time, each second.
    pub touched_pages_per_second: f64,
    /// Its weight against the others when memory is divided. 0 counts as 1.
    pub shares: u32,
    /// The least it is left.
    pub min_pages: u64,
    /// The most it is left; what it was promised if that is less.
    pub max_pages: u64,
    /// Higher suffers later.
    pub priority: u32,
    pub state: GuestState,
    /// Limit on its first touches each second; None is no limit.
    pub throttle_pages_per_second: Option<u64>,
    /// Whether that limit has held it back lately. Most limits are never reached.
    #[serde(default)]
    pub held: bool,
    /// How long its VM has not answered, in seconds, where that is long; its report is older.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub silent_seconds: Option<f64>,
    /// The age of the guest's own report on its memory, in seconds; None if it never gave any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub age_seconds: Option<f64>,
}

impl GuestView {
    /// The least it is left: never more than it was promised.
    pub fn floor_pages(&self) -> u64 {
        self.min_pages.min(self.promised_pages)
    }

    /// The most it is left: never less than the least.
    pub fn ceiling_pages(&self) -> u64 {
        self.max_pages.min(self.promised_pages).max(self.floor_pages())
    }

    /// Pages in memory: never more than it was promised.
    pub fn held_pages(&self) -> u64 {
        self.resident_pages.min(self.promised_pages)
    }

    /// Host frames it takes: between nothing and its pages in memory.
    pub fn held_frames(&self) -> f64 {
        let held = self.held_pages() as f64;
        if self.frames.is_finite() { self.frames.clamp(0.0, held) } else { held }
    }

    /// Pages in its balloon: never more than it was promised.
    pub fn ballooned_pages(&self) -> u64 {
        self.balloon.map_or(0, |b| b.actual_pages.min(self.promised_pages))
    }

    /// The most that it can be using: what it reports as spare it does not use. A guest that lies
    /// about that loses it. What it never had is spare first: only the rest of that is in memory.
    pub fn not_spare_pages(&self) -> u64 {
        let left = self.promised_pages - self.ballooned_pages();
        self.held_pages().min(left.saturating_sub(self.spare_pages.unwrap_or(0)))
    }

    /// The part that it uses. Without an estimate that is all it has and cannot spare; it is never
    /// more.
    pub fn active_pages(&self) -> u64 {
        let most = self.not_spare_pages();
        self.working_set_pages.map_or(most, |w| w.min(most))
    }

    /// Its weight; at least 1.
    pub fn weight(&self) -> f64 {
        f64::from(self.shares.max(1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_guest_never_had_is_the_first_that_it_can_spare() {
        let uses = |resident_pages, actual_pages, spare| {
            let balloon = Some(BalloonView { target_pages: actual_pages, actual_pages });
            let view = GuestView {
                promised_pages: 1000,
                resident_pages,
                balloon,
                spare_pages: spare,
                ..GuestView::default()
            };
            view.active_pages()
        };
        assert_eq!(uses(500, 0, None), 500);
        assert_eq!(
            [uses(500, 0, Some(500)), uses(500, 0, Some(700)), uses(500, 0, Some(2000))],
            [500, 300, 0]
        );
        assert_eq!(uses(500, 300, Some(300)), 400, "what is in its balloon it has not got to spare");
        assert_eq!(uses(500, 5000, Some(0)), 0);
    }
}
