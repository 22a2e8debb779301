//! What the hub's thread and the engine share: the members, the settings, and what is known of
//! agents and domains.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Mutex, MutexGuard};

use os::Process;

use super::counters::Counters;
use super::domain::DomainNow;
use super::pins::Pins;
use super::refusal::Refusal;
use super::wire::Settings;

/// A guest whose pages may be merged.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    /// Its name.
    pub name: String,
    /// Its trust domain.
    pub domain: String,
    /// Pages of its RAM.
    pub pages: u64,
}

/// A VM that says hello and is no member.
#[derive(Debug)]
pub struct Applicant {
    /// The number of its connection.
    pub serial: u64,
    /// Its user.
    pub uid: u32,
    /// Its process.
    pub process: Process,
    /// Pages of its RAM, as it says.
    pub pages: u64,
}

/// What the hub and the engine share.
#[derive(Default)]
pub struct SharedState {
    /// The members, by process; None: every process that connects is one, all in one domain.
    pub members: Option<HashMap<u32, Member>>,
    /// VMs that apply, and wait to be admitted or refused. None: applications are not looked at,
    /// and wait.
    pub applicants: Option<Vec<Applicant>>,
    /// Connections that are to end, and why.
    pub refused: Vec<(u64, Refusal)>,
    /// How to merge; None: not yet.
    pub settings: Option<Settings>,
    /// What is known of the agents that are there.
    pub sessions: BTreeMap<u64, Session>,
    /// What is known of each domain.
    pub domains: Vec<DomainNow>,
    /// Pages of all slabs, in use or not, but for those of images.
    pub slab_pages: u64,
    /// The slabs of images.
    pub pins: Pins,
    /// Processor time of the hub.
    pub cpu_seconds: f64,
}

/// One agent that is there.
#[derive(Clone, Debug, Default)]
pub struct Session {
    /// The guest's name; empty where there is no list of members.
    pub name: String,
    /// Its domain.
    pub domain: String,
    /// What it said last.
    pub counters: Counters,
}

/// Locks what is shared.
pub fn lock_state(shared: &Mutex<SharedState>) -> MutexGuard<'_, SharedState> {
    os::lock(shared)
}
