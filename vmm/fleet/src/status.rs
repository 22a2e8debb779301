//! What the daemon is asked and what it answers: the JSON of its socket and of `fleet ... --json`.

use serde::{Deserialize, Serialize};

use super::fleet::Fleet;
use super::governor::Management;
use super::ledger::Reading;
use super::metrics::Format;
use super::post::Said;
use super::shutdown::{CutOff, DEFAULT_LIMIT, Left};
use machine::balloon::{BalloonHost, BalloonStatus};
use machine::control::{Reply as VmReply, Request as VmRequest};
use machine::stats::Values;
use machine::{PANICKED, probe};
use measure::audit::Audit;
use measure::content::Content;
use measure::frames::Pages;
use memory::maps::Maps;
use merge::slab::engine::Statistics;
use os::print;
use overcommit::ledger::Ledger;

/// What a client asks the daemon.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "snake_case", deny_unknown_fields)]
pub enum Request {
    /// How the fleet is.
    Status {
        /// With KVM's own statistics of each guest.
        #[serde(default)]
        kvm: bool,
        /// With what could be shared: pauses the guests while every page is hashed and compared.
        #[serde(default)]
        content: bool,
        /// With an audit of the ledger: pauses the guests while every frame is counted by other means.
        #[serde(default)]
        audit: bool,
        /// Wait until merging brings nothing new, at most so many seconds.
        #[serde(default)]
        settle_seconds: Option<u64>,
    },
    /// Check every page, in the guests and from the host.
    Verify,
    /// How the fleet is kept within its means. Answered at once, whatever else goes on.
    Management,
    /// The same and more, for Prometheus. Answered at once too.
    Metrics {
        /// What they are written in.
        #[serde(default)]
        format: Format,
    },
    /// What the kernel of a guest uses its frames for.
    PageTypes {
        /// The guest's name.
        guest: String,
    },
    /// End all guests and the daemon. Asked again, it can only become shorter.
    Down {
        /// How long the guests may take to power off; 0: they are cut off at once.
        #[serde(default = "default_timeout", skip_serializing_if = "is_default_timeout")]
        timeout_seconds: u64,
    },
    /// How far the end has come. Answered at once.
    Ending,
}

fn default_timeout() -> u64 {
    DEFAULT_LIMIT.as_secs()
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde asks so")]
fn is_default_timeout(seconds: &u64) -> bool {
    *seconds == default_timeout()
}

/// What the daemon answers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reply {
    /// To [`Request::Status`].
    Status(Box<FleetStatus>),
    /// To [`Request::Verify`].
    Verified(Verified),
    /// To [`Request::Management`].
    Management(Box<Management>),
    /// To [`Request::Metrics`]: text in the format asked for.
    Metrics(String),
    /// To [`Request::PageTypes`]: runs of frames from guest frame 0 on, as the guest protocol writes them.
    PageTypes(String),
    /// To [`Request::Down`]: it is.
    Down {
        /// The guests that did not end in good order.
        cut_off: Vec<CutOff>,
        /// What of the host's settings was left otherwise than it was found.
        notes: Vec<String>,
    },
    /// To [`Request::Ending`].
    Ending(Left),
    /// It was not.
    Error(String),
}

/// The result of checking every page.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Verified {
    /// Pages that their guests checked.
    pub verified_pages: u64,
    /// Pages that were wrong, in the guests' or the host's eyes.
    pub mismatched_pages: u64,
    /// Guests that were not asked: they stand still, do not answer, or joined by themselves.
    #[serde(default)]
    pub skipped: Vec<String>,
}

/// A guest's state.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// Its vCPUs run.
    Running,
    /// Its vCPUs stand still.
    Paused,
    /// Its VM process does not answer; what it says of itself is from before.
    Silent,
    /// Its VM process is gone.
    Dead,
    /// Its kernel panicked. Its VM process is gone, or stands still for ever.
    Panicked,
}

/// One guest.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct GuestStatus {
    /// Its name.
    pub name: String,
    /// Does it run?
    pub state: State,
    /// How it ended, if it did.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub ended: Option<String>,
    /// For how long its VM process has not answered, in seconds, where that is long.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub silent_seconds: Option<f64>,
    /// Why its kernel panicked, if it has, as it said on its console, and its VM has not ended.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub panic: Option<String>,
    /// Its process.
    pub pid: Option<u32>,
    /// `builtin` or `linux`; None until it was ready.
    pub kind: Option<String>,
    /// vCPUs.
    pub cpus: u8,
    /// Its trust domain.
    pub domain: String,
    /// RAM in bytes.
    pub memory_bytes: u64,
    /// Its pages by class.
    pub pages: Pages,
    /// Its part of the frames: a frame shared by n counts 1/n.
    pub frames: f64,
    /// Its balloon.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub balloon: Option<BalloonStatus>,
    /// KVM's own statistics, where they were asked for.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub kvm: Option<Values>,
}

/// A fleet.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct FleetStatus {
    /// Its name.
    pub fleet: String,
    /// The daemon's process.
    pub pid: u32,
    /// The KVM the guests run on.
    pub backend: String,
    /// What merges.
    pub engine: String,
    /// Its guests.
    pub guests: Vec<GuestStatus>,
    /// Memory promised to all guests, in bytes.
    pub promised_bytes: u64,
    /// All guests' pages by class.
    pub pages: Pages,
    /// Frames they have together.
    pub frames: u64,
    /// What sharing saves: pages on shared frames less these frames. Zeros are apart: on the zero frame in `pages`, given back in `merge`.
    pub saved_pages: u64,
    /// Figures are estimates: this user may not see which frame a page is on.
    pub estimated: bool,
    /// The accounts: what is promised, owed, and what could pay.
    pub ledger: Ledger,
    /// How long the ledger took to read, in seconds.
    pub ledger_seconds: f64,
    /// The ledger, checked by other means, where that was asked for.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub audit: Option<Audit>,
    /// What could be shared, where it was asked for.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub content: Option<Content>,
    /// What the slab engine counts; absent with another one.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub merge: Option<Statistics>,
    /// Processor time of the engine so far, where it can be seen.
    pub merge_cpu_seconds: Option<f64>,
    /// Complete passes of the engine.
    pub full_passes: u64,
    /// What a reader of the numbers should know.
    pub notes: Vec<String>,
}

impl FleetStatus {
    /// The state of every guest of `fleet`, and `reading`, which was read of it just now.
    pub fn of(fleet: &mut Fleet, reading: Reading, kvm: bool) -> Self {
        let Reading { ledger, frames, said, seconds, audit } = reading;
        let mut guests = Vec::new();
        for guest in &mut fleet.guests {
            let ended = guest.ended().map(str::to_owned);
            let said = said.iter().find(|said| said.status.name == guest.spec.name);
            let silent = said.and_then(|said| said.silent).filter(|_| ended.is_none());
            let panic = said.and_then(|said| said.status.panic.clone());
            let state = match (&ended, said) {
                (Some(how), _) if how.contains(PANICKED) => State::Panicked,
                (Some(_), _) => State::Dead,
                (None, _) if panic.is_some() => State::Panicked,
                (None, Some(_)) if silent.is_some() => State::Silent,
                (None, Some(said)) if said.status.paused => State::Paused,
                _ => State::Running,
            };
            let values = match (kvm && silent.is_none(), &ended) {
                (true, None) => match guest.control(&VmRequest::KvmStats) {
                    Ok(VmReply::KvmStats(values)) => Some(values),
                    // It answers no more: its state says so, now or the next time.
                    _ => None,
                },
                _ => None,
            };
            let seen = frames.guests.iter().find(|f| f.name == guest.spec.name);
            guests.push(GuestStatus {
                name: guest.spec.name.clone(),
                state,
                balloon: said.filter(|_| ended.is_none()).and_then(Said::balloon_now),
                silent_seconds: silent.map(|silent| silent.as_secs_f64()),
                ended,
                panic,
                pid: guest.pid(),
                kind: guest.ready().map(|_| if guest.is_built_in() { "builtin" } else { "linux" }.into()),
                cpus: said.map_or(guest.spec.vm.cpus, |said| said.status.vcpus),
                domain: guest.spec.domain.clone(),
                memory_bytes: guest.spec.vm.memory_bytes,
                pages: seen.map(|f| f.pages).unwrap_or_default(),
                frames: seen.map(|f| f.frames).unwrap_or_default(),
                kvm: values,
            });
        }
        let unwritten: Vec<String> = said
            .iter()
            .filter_map(|said| {
                let why = said.status.log_trouble.as_ref()?;
                Some(format!(
                    "guest {}: its log cannot be written, and some of it is lost: {why}",
                    said.status.name
                ))
            })
            .collect();
        let own = print::lost().map(|lost| {
            format!("the daemon's log cannot be written, and {} messages are lost: {}", lost.times, lost.why)
        });
        let touched = touched(&guests);
        let merge = fleet.merge_statistics().map(|merge| count_mappings(merge, &guests));
        let progress = fleet.progress().unwrap_or_default();
        Self {
            fleet: fleet.spec.name.clone(),
            pid: std::process::id(),
            backend: probe::backend_name().into(),
            engine: fleet.spec.engine.name().into(),
            guests,
            promised_bytes: fleet.promised_bytes(),
            pages: frames.pages,
            frames: frames.frames,
            saved_pages: frames.saved_pages,
            estimated: frames.estimated,
            ledger,
            ledger_seconds: seconds,
            audit,
            content: None,
            merge,
            merge_cpu_seconds: progress.cpu_seconds,
            full_passes: progress.full_passes,
            notes: frames
                .notes
                .iter()
                .cloned()
                .chain(own)
                .chain(unwritten)
                .chain(touched)
                .chain(fleet.notes())
                .collect(),
        }
    }
}

/// Agents count mappings of slabs from time to time; here they are as they are now.
fn count_mappings(mut merge: Statistics, guests: &[GuestStatus]) -> Statistics {
    merge.domains.values_mut().for_each(|domain| domain.counters.mappings_now = 0);
    for guest in guests {
        let Some(maps) = guest.pid.and_then(|pid| Maps::of(pid).ok()) else { continue };
        let mappings = maps.slabs.len() as u64;
        if let Some(counters) = merge.guests.get_mut(&guest.name) {
            counters.mappings_now = mappings;
        }
        if let Some(domain) = merge.domains.get_mut(&guest.domain) {
            domain.counters.mappings_now += mappings;
        }
    }
    merge.host.mappings_now = merge.domains.values().map(|domain| domain.counters.mappings_now).sum();
    merge
}

/// A note for each guest whose balloon has frames.
fn touched(guests: &[GuestStatus]) -> Vec<String> {
    let note = |g: &GuestStatus| {
        let BalloonHost { touched_pages, swept_pages, .. } = g.balloon.as_ref()?.host;
        let again = touched_pages + swept_pages;
        (again > 0).then(|| {
            format!(
                "guest {}: {again} pages of its balloon got frames again, because it touched them or a huge page of the \
                 host covers them; {swept_pages} of them were dropped again",
                g.name
            )
        })
    };
    guests.iter().filter_map(note).collect()
}
