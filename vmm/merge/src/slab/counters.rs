//! What an agent counts, guest by guest; the host adds them up.

use rustix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};

/// What a clock shows, in nanoseconds.
pub fn now_ns(clock: ClockId) -> u64 {
    let now = clock_gettime(clock);
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

/// Declares the counters once: as a structure, and as the words in which they travel.
macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident,)*) => {
        /// What an agent has done since it began, and how things are now. Pages are of 4096 bytes.
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
        #[serde(default)]
        pub struct Counters { $($(#[$doc])* pub $name: u64,)* }

        impl Counters {
            /// How many there are.
            pub const COUNT: usize = [$(stringify!($name)),*].len();

            /// All of them, in the order of their declaration.
            pub fn words(&self) -> [u64; Self::COUNT] {
                [$(self.$name),*]
            }

            /// The inverse of [`Self::words`].
            pub fn from_words([$($name),*]: [u64; Self::COUNT]) -> Self {
                Self { $($name),* }
            }
        }
    };
}

counters! {
    /// Looks since every page has had its turn to be watched.
    passes,
    /// Pages that were quiet.
    candidate_pages,
    /// Pages that were written again before they were hashed.
    changed_pages,
    /// Pages hashed.
    hashed_pages,
    /// Pages that the matchmaker had a slab's page for.
    matched_pages,
    /// Pages copied into slabs.
    published_pages,
    /// Pages replaced by pages of slabs.
    merged_pages,
    /// Of these, replaced by others before, when slabs were compacted.
    moved_pages,
    /// Pages of zeros given back.
    zero_pages,
    /// Merged pages that the guest has written to since, which gave it a copy of its own.
    broken_pages,
    /// Pages that the guest has written to within 5 to 10 s after they were merged, or given back
    /// as zeros: they wait.
    broken_soon_pages,
    /// Pages of runs refused because they held something else by then.
    differed_pages,
    /// Pages held back because the process has reached its limit of mappings.
    over_budget_pages,
    /// Pages held back because they would break up a huge page for too little.
    huge_pages,
    /// Pages of runs refused because a device may be writing to them.
    pinned_pages,
    /// Pages of runs refused for any other reason.
    refused_pages,
    /// Runs merged.
    runs,
    /// Pages of slabs that guest RAM is made of now.
    shared_now,
    /// Mappings of slabs that guest RAM is made of now.
    mappings_now,
    /// Processor time spent finding out what was written, in nanoseconds.
    scan_ns,
    /// ... reading, hashing and giving back zeros.
    hash_ns,
    /// ... talking to the matchmaker.
    match_ns,
    /// ... copying pages into slabs.
    publish_ns,
    /// ... replacing pages.
    merge_ns,
    /// ... finding out which pages of slabs are still in use.
    live_ns,
    /// How often guests and others were let run between two pieces of work.
    pieces,
    /// When all that was quiet had last been dealt with, by the monotonic clock; 0: not yet.
    converged_at_ns,
}

impl Counters {
    /// Processor time of the agent.
    pub fn cpu_seconds(&self) -> f64 {
        let stages =
            [self.scan_ns, self.hash_ns, self.match_ns, self.publish_ns, self.merge_ns, self.live_ns];
        stages.iter().map(|ns| *ns as f64).sum::<f64>() / 1e9
    }

    /// Adds another guest's. Of two times of convergence the earlier one counts.
    pub fn add(&mut self, other: &Self) {
        let converged_at_ns = self.converged_at_ns.min(other.converged_at_ns);
        let mut words = self.words();
        words.iter_mut().zip(other.words()).for_each(|(sum, word)| *sum = sum.saturating_add(word));
        *self = Self { converged_at_ns, ..Self::from_words(words) };
    }
}
