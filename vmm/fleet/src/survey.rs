//! The status of a fleet, gathered from its guests.

use kernel_view::numa;

use super::HostError;
use super::fleet::Fleet;
use super::guest::Guest;
use super::ledger::Reading;
use super::status::{FleetStatus, GuestStatus, State};
use super::vm_handle::Said;
use machine::balloon::BalloonHost;
use machine::control::{Reply as VmReply, Request as VmRequest};
use machine::stats::Values;
use machine::{PANICKED, probe};
use measure::frames::Frames;
use memory::maps::Maps;
use merge::slab::engine::Statistics;
use os::print;

impl FleetStatus {
    /// The state of every guest of `fleet`, and `reading`, which was read of it just now.
    pub fn of(fleet: &mut Fleet, reading: Reading, kvm: bool) -> Self {
        let Reading { ledger, frames, said, seconds, audit } = reading;
        let (mut guests, mut unread) = (Vec::new(), Vec::new());
        let several_nodes = numa::nodes().is_ok_and(|nodes| nodes.len() > 1);
        for guest in &mut fleet.guests {
            let said = said.iter().find(|said| said.status.name == guest.spec.name);
            let mut status = guest_status(guest, said, &frames, several_nodes);
            if kvm && status.ended.is_none() && status.silent_seconds.is_none() {
                status.kvm = kvm_stats(guest, &mut unread);
            }
            guests.push(status);
        }
        let unwritten = said.iter().filter_map(|said| {
            let why = said.status.log_trouble.as_ref()?;
            let guest = &said.status.name;
            Some(format!("guest {guest}: its log cannot be written, and some of it is lost: {why}"))
        });
        unread.extend(said.iter().flat_map(|said| {
            said.trouble.iter().map(|trouble| format!("guest {}: {trouble}", said.status.name))
        }));
        let own = print::lost().map(|lost| {
            format!("the daemon's log cannot be written, and {} messages are lost: {}", lost.times, lost.why)
        });
        let touched = touched(&guests);
        let merge = fleet.merge_statistics().map(|merge| count_mappings(merge, &guests));
        let progress = fleet.progress().unwrap_or_default();
        let of_guests = own.into_iter().chain(unwritten).chain(unread).chain(touched);
        let notes = frames.notes.iter().cloned().chain(of_guests).chain(fleet.notes()).collect();
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
            pool: fleet.pool_status(),
            notes,
        }
    }
}

/// What is known of `guest`, whose VM has `said` so of itself; not what KVM counts.
fn guest_status(guest: &mut Guest, said: Option<&Said>, frames: &Frames, several_nodes: bool) -> GuestStatus {
    let ended = guest.ended().map(str::to_owned);
    let silent = said.and_then(|said| said.silent).filter(|_| ended.is_none());
    let panic = said.and_then(|said| said.status.panic.clone());
    let seen = frames.guests.iter().find(|f| f.name == guest.spec.name);
    let placed = guest.spec.vm.numa.is_some() || several_nodes;
    let nodes = said.filter(|_| placed && ended.is_none()).and_then(|said| {
        let memory: Vec<_> =
            said.status.extents.iter().map(|extent| extent.hvas().start.0..extent.hvas().end.0).collect();
        numa::pages_of(said.status.pid, &memory).ok()
    });
    GuestStatus {
        name: guest.spec.name.clone(),
        state: match (&ended, said) {
            (Some(how), _) if how.contains(PANICKED) => State::Panicked,
            (Some(_), _) => State::Dead,
            (None, _) if panic.is_some() => State::Panicked,
            (None, Some(_)) if silent.is_some() => State::Silent,
            (None, Some(said)) if said.status.paused => State::Paused,
            _ => State::Running,
        },
        balloon: said.filter(|_| ended.is_none()).and_then(Said::balloon_now),
        silent_seconds: silent.map(|silent| silent.as_secs_f64()),
        ended,
        panic,
        pid: guest.pid(),
        kind: guest.ready().map(|_| if guest.is_built_in() { "builtin" } else { "linux" }.into()),
        cpus: said.map_or(guest.spec.vm.cpus, |said| said.status.vcpus),
        domain: guest.spec.domain.clone(),
        clone_of: guest.spec.clone_of.clone(),
        generation: guest.generation(),
        memory_bytes: guest.spec.vm.memory_bytes,
        pages: seen.map(|f| f.pages).unwrap_or_default(),
        frames: seen.map(|f| f.frames).unwrap_or_default(),
        nodes: nodes.unwrap_or_default(),
        kvm: None,
    }
}

/// What KVM counts of `guest`; where it cannot be had, `unread` says why.
fn kvm_stats(guest: &Guest, unread: &mut Vec<String>) -> Option<Values> {
    match guest.control(&VmRequest::KvmStats) {
        Ok(VmReply::KvmStats(values)) => return Some(values),
        Ok(other) => unread.push(HostError::unexpected_of_vm(&guest.spec.name, &other).to_string()),
        Err(HostError::Control { refusal, .. }) => {
            unread.push(format!("guest {}: {refusal}", guest.spec.name));
        }
        // It answers no more: its state says so, now or the next time.
        Err(_) => {}
    }
    None
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
