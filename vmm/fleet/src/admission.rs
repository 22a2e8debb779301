//! Whether a fleet's guests may come in, by what the host has and the fleet file's rule.

use serde::Serialize;

use super::HostError;
use super::pledge::{self, OtherFleet};
use super::spec::{AdmissionName, FleetSpec, GuestSpec, Overcommit};
use kernel_view::host::{Host, Readings};
use memory::PAGE_BYTES;
use overcommit::admission::{Decision, Mode, Promise, Refusal, Room, Sums, plan};
use overcommit::capacity::Capacity;
use overcommit::ledger::Ledger;

/// What a fleet asks for, against what there is.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Admission {
    /// What the fleet may use.
    pub capacity: Capacity,
    /// The rule; None admits all.
    pub mode: Option<Mode>,
    /// Whether anything is done as memory gets short, or the fleet is only watched.
    pub policy: bool,
    /// What can be had, by its terms.
    pub room: Room,
    /// This user's other fleets, whose promises are among them.
    pub others: Vec<OtherFleet>,
    /// Each guest, in the order of the fleet file; empty without a rule.
    pub guests: Vec<Judged>,
}

/// One guest.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Judged {
    /// What it asks for.
    #[serde(flatten)]
    pub promise: Promise,
    /// Whether it may come in.
    #[serde(flatten)]
    pub decision: Decision,
}

/// The rule that a fleet file asks for.
pub fn mode(overcommit: &Overcommit) -> Option<Mode> {
    match overcommit.admission {
        AdmissionName::Strict => Some(Mode::Strict),
        AdmissionName::Ratio => Some(Mode::Ratio(overcommit.ratio_percent)),
        AdmissionName::Covered => Some(Mode::Covered(overcommit.floor)),
        AdmissionName::Off => None,
    }
}

/// What the host has for a fleet.
pub fn capacity(overcommit: &Overcommit) -> Result<(Capacity, Readings), HostError> {
    let readings = Host::default().read()?;
    let asked_pages = overcommit.capacity_bytes.map(|bytes| bytes / PAGE_BYTES);
    let capacity = Capacity::of(readings.host_pages(), readings.group.limit_pages, asked_pages)?;
    Ok((capacity, readings))
}

/// Pages that a VM process takes for itself: measured with the built-in guest and Debian's, 2 to 4
/// MiB.
const VM_PAGES: u64 = 4 << 8;
/// One page in this many of a guest's memory is page tables, this process's and the second level's.
const TABLES_PART: u64 = 256;

/// What a VM needs besides the memory of its guest.
fn overhead_pages(guest: &GuestSpec) -> u64 {
    VM_PAGES + guest.vm.memory_bytes / PAGE_BYTES / TABLES_PART
}

/// What can be had for a fleet that holds `own_pages`, while there are these `others`.
fn room(readings: &Readings, own_pages: u64, others: &[OtherFleet], overhead_pages: u64) -> Room {
    // All that is not available is held: by our own guests, by others', and the rest by the system.
    let held = |others: &mut dyn Iterator<Item = &OtherFleet>| others.map(|o| o.held_pages).sum::<u64>();
    let committed =
        |others: &mut dyn Iterator<Item = &OtherFleet>| others.map(OtherFleet::committed_pages).sum();
    let held_by_fleets = own_pages.saturating_add(held(&mut others.iter()));
    let host = Room {
        total_pages: readings.total_pages,
        of_group: false,
        pool_pages: readings.pool_pages,
        system_pages: readings
            .host_pages()
            .saturating_sub(readings.available_pages)
            .saturating_sub(held_by_fleets),
        others_pages: committed(&mut others.iter()),
        overhead_pages,
    };
    let (Some(limit), Some(free)) = (readings.group.limit_pages, readings.group.free_pages) else {
        return host;
    };
    let with_us = || others.iter().filter(|other| other.in_our_group);
    let held_by_fleets = own_pages.saturating_add(held(&mut with_us()));
    let group = Room {
        total_pages: limit,
        of_group: true,
        pool_pages: 0,
        system_pages: limit.saturating_sub(free).saturating_sub(held_by_fleets),
        others_pages: committed(&mut with_us()),
        overhead_pages,
    };
    if group.left_pages() < host.left_pages() { group } else { host }
}

/// Judges the guests of `spec`, as if none of them ran yet.
pub fn judge(spec: &FleetSpec) -> Result<Admission, HostError> {
    let (capacity, readings) = capacity(&spec.overcommit)?;
    let (others, own_pages) = (pledge::others(&spec.name), pledge::held_pages(&spec.name));
    let room = room(&readings, own_pages, &others, spec.guests.iter().map(overhead_pages).sum());
    let outstanding: u64 = others.iter().map(OtherFleet::outstanding_pages).sum();
    let sums = Sums {
        capacity_pages: capacity.pages,
        room: Some(room),
        // What others were promised they may take at any time.
        free_pages: readings.free_pages().min(capacity.pages).saturating_sub(outstanding),
        swap_pages: readings.swap_free_pages,
        ..Sums::default()
    };
    let mode = mode(&spec.overcommit);
    let guests = match mode {
        Some(mode) => decide(&spec.guests, sums, mode)?,
        None => Vec::new(),
    };
    Ok(Admission { capacity, mode, policy: spec.overcommit.policy, room, others, guests })
}

/// Judges guests that come later to the fleet of `spec`, on top of what `ledger` says. A guest that
/// is admitted has no refusal.
pub fn judge_more(
    guests: &[GuestSpec],
    ledger: &Ledger,
    spec: &FleetSpec,
) -> Result<Vec<Option<Box<Refusal>>>, HostError> {
    let Some(mode) = mode(&spec.overcommit) else { return Ok(vec![None; guests.len()]) };
    let (_, readings) = capacity(&spec.overcommit)?;
    let others = pledge::others(&spec.name);
    let overhead = guests.iter().chain(&spec.guests).map(overhead_pages).sum::<u64>();
    // What the fleet has of it already is among what it holds.
    let overhead = overhead.saturating_sub(ledger.overhead.total());
    let outstanding: u64 = others.iter().map(OtherFleet::outstanding_pages).sum();
    let sums = Sums {
        capacity_pages: ledger.capacity,
        room: Some(room(&readings, ledger.used.saturating_sub(ledger.overhead.total()), &others, overhead)),
        free_pages: ledger.cover.free.saturating_sub(outstanding),
        swap_pages: ledger.cover.swap,
        promised_pages: ledger.promised,
        ballooned_pages: ledger.classes.ballooned,
        reclaimable_pages: ledger.cover.balloon,
        sharing_debt_pages: ledger.debt.sharing,
        demand_debt_pages: ledger.debt.demand,
    };
    let judged = decide(guests, sums, mode)?;
    Ok(judged
        .into_iter()
        .map(|judged| match judged.decision {
            Decision::Refused(refusal) => Some(Box::new(refusal)),
            Decision::Admitted { .. } => None,
        })
        .collect())
}

fn decide(guests: &[GuestSpec], sums: Sums, mode: Mode) -> Result<Vec<Judged>, HostError> {
    let promise =
        |guest: &GuestSpec| Promise { name: guest.name.clone(), pages: guest.vm.memory_bytes / PAGE_BYTES };
    let promises: Vec<Promise> = guests.iter().map(promise).collect();
    let decisions = plan(&promises, sums, mode)?;
    Ok(promises.into_iter().zip(decisions).map(|(promise, decision)| Judged { promise, decision }).collect())
}

impl Admission {
    /// An error if a guest is refused.
    pub fn check(&self) -> Result<(), HostError> {
        refused(&self.guests)
    }
}

/// The first that is refused is the error.
fn refused(decisions: &[Judged]) -> Result<(), HostError> {
    match decisions.iter().find_map(|judged| match &judged.decision {
        Decision::Refused(refusal) => Some((&judged.promise, refusal)),
        Decision::Admitted { .. } => None,
    }) {
        Some((promise, refusal)) => {
            Err(HostError::NotAdmitted { guest: promise.name.clone(), refusal: Box::new(refusal.clone()) })
        }
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kernel_view::host::GroupMemory;

    const GIB: u64 = 1 << 18;

    fn readings() -> Readings {
        Readings {
            total_pages: 24 * GIB,
            pool_pages: 0,
            available_pages: 22 * GIB,
            swap_free_pages: 0,
            second_level_pages: 0,
            psi: None,
            group: GroupMemory::default(),
        }
    }

    fn other(promised: u64, held: u64, in_our_group: bool) -> OtherFleet {
        OtherFleet { promised_pages: promised, held_pages: held, in_our_group, ..OtherFleet::default() }
    }

    #[test]
    fn what_the_system_holds_can_not_be_had() {
        let room = room(&readings(), 0, &[], 7);
        assert_eq!((room.system_pages, room.left_pages()), (2 * GIB, 22 * GIB - 7));
        // What our own guests hold is ours.
        let running = Readings { available_pages: 12 * GIB, ..readings() };
        assert_eq!(super::room(&running, 10 * GIB, &[], 0), Room { overhead_pages: 0, ..room });
    }

    #[test]
    fn the_pool_can_not_be_had_and_is_not_the_systems() {
        let pool = Readings { pool_pages: 8 * GIB, available_pages: 14 * GIB, ..readings() };
        let room = room(&pool, 0, &[], 0);
        assert_eq!((room.pool_pages, room.system_pages, room.left_pages()), (8 * GIB, 2 * GIB, 14 * GIB));
    }

    #[test]
    fn what_others_were_promised_can_not_be_had_whether_they_hold_it_or_not() {
        for held in [0, 5, 20] {
            let now = Readings { available_pages: (22 - held) * GIB, ..readings() };
            let room = room(&now, 0, &[other(20 * GIB, held * GIB, false)], 0);
            assert_eq!(
                (room.system_pages, room.others_pages, room.left_pages()),
                (2 * GIB, 20 * GIB, 2 * GIB)
            );
        }
    }

    #[test]
    fn the_tighter_of_host_and_control_group_counts() {
        let group = |limit, free| GroupMemory {
            limit_pages: Some(limit),
            free_pages: Some(free),
            swap_free_pages: None,
        };
        let tight = Readings { group: group(8 * GIB, 6 * GIB), ..readings() };
        let others = [other(3 * GIB, GIB, true), other(4 * GIB, 0, false)];
        let room = room(&tight, 0, &others, 0);
        // Of the two that are used another fleet in the group holds one, and may take two more.
        assert!(room.of_group && room.system_pages == GIB && room.others_pages == 3 * GIB, "{room:?}");
        assert_eq!(room.left_pages(), 4 * GIB);
        let wide = Readings { group: group(23 * GIB, 23 * GIB), ..readings() };
        assert!(!super::room(&wide, 0, &others, 0).of_group);
    }
}
