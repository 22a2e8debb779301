//! What the engine counts.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::counters::Counters;

/// What is known of merging by slabs.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Statistics {
    /// All guests together.
    pub host: Counters,
    /// Seconds since everything that was quiet had last been dealt with in all guests; None: not
    /// yet.
    pub seconds_since_convergence: Option<f64>,
    /// Processor time of the matchmaker.
    pub matchmaker_cpu_seconds: f64,
    /// Domain by domain.
    pub domains: BTreeMap<String, DomainStatistics>,
    /// Guest by guest.
    pub guests: BTreeMap<String, Counters>,
}

/// One trust domain.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct DomainStatistics {
    /// Its guests together.
    pub counters: Counters,
    /// Its slabs, now.
    pub slabs: u64,
    /// Their bytes, now.
    #[serde(default)]
    pub slab_bytes: u64,
    /// Bytes of them that some guest used when that was looked at.
    pub slab_live_bytes: u64,
    /// Bytes of them that no guest used then.
    pub slab_dead_bytes: u64,
    /// How long ago that was; absent: it was not yet.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub slab_use_age_seconds: Option<f64>,
    /// Pages that each of its guests may have watched a second while most merges are broken soon;
    /// 0: as many as there are.
    #[serde(default)]
    pub watch_pages_per_second: u64,
}
