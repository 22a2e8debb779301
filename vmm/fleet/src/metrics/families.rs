//! Which metrics there are: of the host, of each guest, of what is done about it, of merging.

use std::collections::BTreeSet;

use super::sheet::{Of, Sample, Sheet};
use crate::action_log::KINDS;
use crate::management::Management;
use memory::PAGE_BYTES;
use merge::Progress;
use merge::slab::counters::Counters;
use merge::slab::engine::Statistics;
use overcommit::ledger::{Account, Classes, Debt, Ledger};
use overcommit::memory_state::MemoryState;
use overcommit::view::{GuestState, GuestView, HostView};

/// What the engine that merges says of itself.
#[derive(Clone, Debug, Default)]
pub struct EngineNow {
    /// Its name.
    pub name: String,
    /// How far it has come; None before it has begun, or where it cannot be determined.
    pub progress: Option<Progress>,
    /// What the slab engine counts; None with another one.
    pub statistics: Option<Statistics>,
}

/// A number with no labels of its own.
fn plain<'s>(value: Option<f64>) -> Option<Sample<'s>> {
    value.map(|value| (Vec::new(), value))
}

fn bytes(pages: u64) -> f64 {
    (pages * PAGE_BYTES) as f64
}

/// Frames may be parts of a page.
fn frame_bytes(frames: f64) -> f64 {
    frames * PAGE_BYTES as f64
}

/// A sample for each of these parts, under a label called `label`.
fn parts<'s, const N: usize>(label: &'s str, parts: [(&'s str, u64); N]) -> [Sample<'s>; N] {
    parts.map(|(name, pages)| (vec![(label, name)], bytes(pages)))
}

fn classes(classes: &Classes) -> [(&'static str, u64); 7] {
    [
        ("private", classes.private),
        ("shared", classes.shared),
        ("zero", classes.zero),
        ("ballooned", classes.ballooned),
        ("swapped", classes.swapped),
        ("absent", classes.absent),
        ("image", classes.image),
    ]
}

fn debts(debt: &Debt) -> [(&'static str, u64); 2] {
    [("sharing", debt.sharing), ("demand", debt.demand)]
}

/// What all guests have together, what the host has, what is owed.
pub(super) fn host(management: &Management, sheet: &mut Sheet) {
    let ledger = management.ledger.as_ref();
    let host = management.host.as_ref();
    let of_ledger = |number: fn(&Ledger) -> u64| plain(ledger.map(|ledger| bytes(number(ledger))));
    let of_host = |number: fn(&HostView) -> u64| plain(host.map(|host| bytes(number(host))));
    sheet.gauge("capacity", Of::Bytes, "What the fleet may use.", of_host(|h| h.capacity_pages));
    let help = "What the fleet uses at the last look: frames of guests, and overhead.";
    sheet.gauge("used", Of::Bytes, help, of_host(|h| h.used_pages));
    let help = "What the fleet may still take at the last look: of its capacity, and of what the host has.";
    sheet.gauge("free", Of::Bytes, help, of_host(|h| h.free_pages));
    sheet.gauge("promised", Of::Bytes, "Memory promised to all guests.", of_ledger(|l| l.promised));
    let help = "Guest memory that is present, each guest's by itself: what it would take without sharing.";
    sheet.gauge("resident", Of::Bytes, help, of_ledger(|l| l.resident));
    sheet.gauge("frames", Of::Bytes, "Different frames under guest memory.", of_ledger(|l| l.frames));
    let help =
        "What sharing saves: guest memory on frames less the frames. Zeros are apart, in guest_memory.";
    sheet.gauge("saved", Of::Bytes, help, of_ledger(|l| l.saved));
    let help = "What is owed: sharing, if every shared page were written; demand, if every absent or swapped page were touched.";
    let debt = ledger.map(|l| parts("kind", debts(&l.debt)));
    sheet.gauge("debt", Of::Bytes, help, debt.into_iter().flatten());
    let help = "What could pay: free memory, free swap, what balloons can still take.";
    let cover = ledger.map(|l| {
        parts("kind", [("free", l.cover.free), ("swap", l.cover.swap), ("balloon", l.cover.balloon)])
    });
    sheet.gauge("cover", Of::Bytes, help, cover.into_iter().flatten());
    let help = "Cover for each byte of debt; absent where nothing is owed.";
    sheet.gauge("cover", Of::Ratio, help, plain(ledger.and_then(|l| l.cover_ratio)));
    let overhead = ledger.map(|l| {
        let o = &l.overhead;
        let kinds = [
            ("vmm", o.vmm),
            ("page_tables", o.page_tables),
            ("daemon", o.daemon),
            ("dead_slabs", o.dead_slabs),
            ("held_by_images", o.held_by_images),
            ("pool", o.pool),
            ("ksm_metadata", o.ksm_metadata),
        ];
        parts("kind", kinds)
    });
    let help = "What the fleet costs besides guest memory.";
    sheet.gauge("overhead", Of::Bytes, help, overhead.into_iter().flatten());
    let help =
        "Page tables of the second level of all VMs of the host, of others too; not part of the overhead.";
    let second_level = of_ledger(|l| l.overhead.second_level_of_host);
    sheet.gauge("host_second_level", Of::Bytes, help, second_level);
    let help =
        "1 where this user may not see frame numbers: the split of shared and zero pages is an estimate.";
    let estimated = plain(ledger.map(|l| f64::from(u8::from(l.estimated))));
    sheet.gauge("ledger_estimated", Of::Nothing, help, estimated);
    let help = "Part of the last ten seconds in which at least one task (some) or all of them (full) waited for memory.";
    let stalls = host.and_then(|h| h.psi).map(|psi| {
        let kinds = [("some", psi.some_avg10_percent), ("full", psi.full_avg10_percent)];
        kinds.map(|(kind, percent)| (vec![("kind", kind)], percent / 100.0))
    });
    sheet.gauge("stall", Of::Ratio, help, stalls.into_iter().flatten())
}

/// What each guest has, owes and does.
pub(super) fn guests(management: &Management, sheet: &mut Sheet) {
    let accounts: &[Account] = management.ledger.as_ref().map_or(&[], |ledger| &ledger.guests);
    let views: &[GuestView] = &management.guests;
    let each = |number: fn(&Account) -> f64| {
        accounts.iter().map(move |account| (vec![("guest", account.name.as_str())], number(account)))
    };
    let kinds = |kinds: fn(&Account) -> Vec<(&'static str, u64)>, label: &'static str| {
        accounts.iter().flat_map(move |account| {
            let sample =
                move |(kind, pages)| (vec![("guest", account.name.as_str()), (label, kind)], bytes(pages));
            kinds(account).into_iter().map(sample)
        })
    };
    let seen = |number: fn(&GuestView) -> Option<f64>| {
        views.iter().filter_map(move |view| Some((vec![("guest", view.name.as_str())], number(view)?)))
    };
    let help = "Each guest's memory by class; the classes of a guest make what it was promised.";
    sheet.gauge("guest_memory", Of::Bytes, help, kinds(|a| classes(&a.classes).into(), "class"));
    sheet.gauge("guest_promised", Of::Bytes, "Memory promised.", each(|a| bytes(a.promised)));
    let help = "Its part of the frames: a frame shared by n guests' pages counts one nth.";
    sheet.gauge("guest_frames", Of::Bytes, help, each(|a| frame_bytes(a.frames)));
    sheet.gauge("guest_saved", Of::Bytes, "What sharing saves of it.", each(|a| frame_bytes(a.saved)));
    let help =
        "What it is owed: sharing, if its shared pages were written; demand, if it touched what it has not.";
    sheet.gauge("guest_debt", Of::Bytes, help, kinds(|a| debts(&a.debt).into(), "kind"));
    let help = "What it costs besides its memory.";
    let overhead = kinds(|a| vec![("vmm", a.overhead.vmm), ("page_tables", a.overhead.page_tables)], "kind");
    sheet.gauge("guest_overhead", Of::Bytes, help, overhead);
    let help = "How old the walk of its page table is by which its memory was counted.";
    sheet.gauge("guest_walk_age", Of::Seconds, help, each(|a| a.walk_age_seconds.unwrap_or(0.0)));
    let help = "1 where counters have moved since that walk: what has frames is by these, and how it is split by that walk.";
    sheet.gauge("guest_by_counters", Of::Nothing, help, each(|a| f64::from(u8::from(a.by_counters))));
    let help = "The size its balloon was asked for; absent without a driver.";
    let target = seen(|v| v.balloon.map(|b| bytes(b.target_pages)));
    sheet.gauge("guest_balloon_target", Of::Bytes, help, target);
    let help = "The size its balloon has by its driver's word; absent without a driver.";
    let actual = seen(|v| v.balloon.map(|b| bytes(b.actual_pages)));
    sheet.gauge("guest_balloon_actual", Of::Bytes, help, actual);
    let help = "Memory it used lately, estimated from outside; absent where it is not sampled.";
    sheet.gauge("guest_working_set", Of::Bytes, help, seen(|v| v.working_set_pages.map(bytes)));
    let help = "How far the working set may be off, in 95 of 100 cases.";
    let error = seen(|v| v.working_set_error_pages.map(bytes));
    sheet.gauge("guest_working_set_error", Of::Bytes, help, error);
    let help = "Memory it touches for the first time.";
    let touched = seen(|v| Some(frame_bytes(v.touched_pages_per_second)));
    sheet.gauge("guest_first_touch", Of::BytesPerSecond, help, touched);
    let help = "First touches it is held to; absent without a limit.";
    let throttle = seen(|v| v.throttle_pages_per_second.map(bytes));
    sheet.gauge("guest_throttle", Of::BytesPerSecond, help, throttle);
    let help = "1 where that limit has held it back lately, 0 where it has not.";
    let held = seen(|v| v.throttle_pages_per_second.map(|_| f64::from(u8::from(v.held))));
    sheet.gauge("guest_held", Of::Nothing, help, held);
    let help = "How long its VM has not answered; absent while it does.";
    sheet.gauge("guest_silent", Of::Seconds, help, seen(|v| v.silent_seconds));
    let help = "How old the guest's own word on its memory is; absent if it never gave any.";
    sheet.gauge("guest_word_age", Of::Seconds, help, seen(|v| v.age_seconds));
    let help = "1 for what the guest is doing, 0 for everything else.";
    let states = views.iter().flat_map(|view| {
        STATES.map(|state| {
            let is = f64::from(u8::from(view.state == state));
            (vec![("guest", view.name.as_str()), ("state", state.name())], is)
        })
    });
    sheet.gauge("guest_state", Of::Nothing, help, states)
}

/// All states of a guest.
const STATES: [GuestState; 5] =
    [GuestState::Running, GuestState::Suspended, GuestState::Paused, GuestState::Silent, GuestState::Dead];

/// How short of memory the fleet is, what is done about it, and what that costs.
pub(super) fn policy(management: &Management, sheet: &mut Sheet) {
    let state = |memory_state: MemoryState| {
        (vec![("state", memory_state.name())], f64::from(u8::from(memory_state == management.memory_state)))
    };
    let help = "1 for the memory state of the fleet, 0 for the others: high is enough free memory, then soft, hard and low.";
    sheet.gauge("memory_state", Of::Nothing, help, MemoryState::ALL.map(state));
    let help = "1 where something is done about it, 0 where the fleet is only watched.";
    sheet.gauge("policy_acting", Of::Nothing, help, plain(Some(f64::from(u8::from(management.acting)))));
    let action_log = &management.action_log;
    let help = "Actions that were tried to manage the fleet's memory.";
    let kinds: BTreeSet<&str> =
        KINDS.into_iter().chain(action_log.counts.keys().map(String::as_str)).collect();
    let count = |kind| action_log.counts.get(kind).map_or(0.0, |n| *n as f64);
    let counts = kinds.into_iter().map(|kind| (vec![("action", kind)], count(kind)));
    sheet.counter("policy_actions", Of::Nothing, help, counts);
    let failed = plain(Some(action_log.failed as f64));
    sheet.counter("policy_actions_failed", Of::Nothing, "Actions that could not be done.", failed);
    let (took, interval) = management.ledger_seconds;
    sheet.gauge("ledger_read", Of::Seconds, "How long reading the ledger took.", plain(Some(took)));
    sheet.gauge("ledger_interval", Of::Seconds, "How often the ledger is read.", plain(Some(interval)));
    let help = "How old the numbers of the ledger are.";
    sheet.gauge("ledger_age", Of::Seconds, help, plain(management.ledger_age_seconds()));
    let looks = plain(Some(management.looks as f64));
    sheet.counter("governor_looks", Of::Nothing, "Looks at the fleet.", looks);
    let help = "Processor time of looking and deciding.";
    sheet.counter("governor_cpu", Of::Seconds, help, plain(Some(management.cpu_seconds)))
}

/// A counter of the slab engine: its name, its help, and the number.
type Count = (&'static str, &'static str, fn(&Counters) -> u64);

/// What agents count, guest by guest.
const COUNTS: [Count; 8] = [
    ("hashed_pages", "Pages that were quiet and were hashed.", |c| c.hashed_pages),
    ("published_pages", "Pages copied into slabs.", |c| c.published_pages),
    ("merged_pages", "Pages replaced by pages of slabs.", |c| c.merged_pages),
    ("moved_pages", "Merged pages that were replaced again, when slabs were compacted.", |c| c.moved_pages),
    ("zero_pages", "Pages of zeros given back.", |c| c.zero_pages),
    ("broken_pages", "Merged pages that the guest has written to since.", |c| c.broken_pages),
    ("refused_pages", "Pages that were not merged when it came to it.", |c| {
        c.refused_pages + c.differed_pages + c.pinned_pages + c.over_budget_pages + c.huge_pages
    }),
    ("merged_runs", "Runs of pages merged at once.", |c| c.runs),
];

/// What merging has done and costs.
pub(super) fn engine(engine: &EngineNow, sheet: &mut Sheet) {
    let progress = engine.progress.as_ref();
    let help = "Guest memory on shared or zero frames now, by the engine's own count.";
    sheet.gauge("merged", Of::Bytes, help, plain(progress.map(|p| bytes(p.merged_pages))));
    let help = "Complete passes over all memory; with the engine slab, of the guest that has had the fewest.";
    sheet.gauge("merge_passes", Of::Nothing, help, plain(progress.map(|p| p.full_passes as f64)));
    let statistics = engine.statistics.as_ref();
    let agents = || statistics.into_iter().flat_map(|s| &s.guests);
    for (name, help, number) in COUNTS {
        let samples =
            agents().map(|(guest, counters)| (vec![("guest", guest.as_str())], number(counters) as f64));
        sheet.counter(name, Of::Nothing, help, samples);
    }
    let help = "Mappings of slabs that guest memory is made of.";
    let mappings = agents().map(|(guest, c)| (vec![("guest", guest.as_str())], c.mappings_now as f64));
    sheet.gauge("slab_mappings", Of::Nothing, help, mappings);
    let help = "Memory of slabs, by domain: live is used by some guest, dead by none.";
    let slabs = statistics.into_iter().flat_map(|s| &s.domains).flat_map(|(name, domain)| {
        let uses = [("live", domain.slab_live_bytes), ("dead", domain.slab_dead_bytes)];
        uses.map(|(use_, bytes)| (vec![("domain", name.as_str()), ("use", use_)], bytes as f64))
    });
    sheet.gauge("slab", Of::Bytes, help, slabs);
    let help = "Processor time of merging: of the agent in each guest's VM, of the matchmaker, or of the kernel's ksmd.";
    let mut cpu: Vec<Sample> = agents()
        .map(|(guest, c)| (vec![("worker", "agent"), ("guest", guest.as_str())], c.cpu_seconds()))
        .collect();
    match statistics {
        Some(s) => cpu.push((vec![("worker", "matchmaker")], s.matchmaker_cpu_seconds)),
        None => {
            let seconds = progress.and_then(|p| p.cpu_seconds);
            cpu.extend(seconds.map(|seconds| (vec![("worker", "ksmd")], seconds)));
        }
    }
    sheet.counter("merge_cpu", Of::Seconds, help, cpu)
}
