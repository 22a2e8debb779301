//! Whether a fleet's guests may come in, by what the host has and the fleet file's rule.

use serde::Serialize;

use super::HostError;
use super::spec::{AdmissionName, FleetSpec, GuestSpec, Overcommit};
use crate::memory::PAGE_BYTES;
use crate::overcommit::admission::{Decision, Mode, Promise, Refusal, Sums, plan};
use crate::overcommit::ledger::Ledger;
use crate::overcommit::readings::{Capacity, Host, Readings};

/// What a fleet asks for, against what there is.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Admission {
    /// What the fleet may use.
    pub capacity: Capacity,
    /// The rule; None lets everybody in.
    pub mode: Option<Mode>,
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
    let capacity = readings.capacity(overcommit.capacity_bytes.map(|bytes| bytes / PAGE_BYTES))?;
    Ok((capacity, readings))
}

/// Judges the guests of `spec`, none of which runs yet.
pub fn judge(spec: &FleetSpec) -> Result<Admission, HostError> {
    let (capacity, readings) = capacity(&spec.overcommit)?;
    let sums = Sums {
        capacity_pages: capacity.pages,
        free_pages: readings.free_pages(capacity.pages, 0),
        swap_pages: readings.swap_free_pages,
        ..Sums::default()
    };
    let mode = mode(&spec.overcommit);
    let guests = match mode {
        Some(mode) => decide(&spec.guests, sums, mode)?,
        None => Vec::new(),
    };
    Ok(Admission { capacity, mode, guests })
}

/// Judges guests that come later, on top of what `ledger` says. Who may come in has no refusal.
pub fn judge_more(
    guests: &[GuestSpec],
    ledger: &Ledger,
    overcommit: &Overcommit,
) -> Result<Vec<Option<Box<Refusal>>>, HostError> {
    let Some(mode) = mode(overcommit) else { return Ok(vec![None; guests.len()]) };
    let sums = Sums {
        capacity_pages: ledger.capacity,
        free_pages: ledger.cover.free,
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
        |guest: &GuestSpec| Promise { name: guest.name.clone(), pages: guest.memory_bytes / PAGE_BYTES };
    let promises: Vec<Promise> = guests.iter().map(promise).collect();
    let decisions = plan(&promises, sums, mode)?;
    Ok(promises.into_iter().zip(decisions).map(|(promise, decision)| Judged { promise, decision }).collect())
}

impl Admission {
    /// An error if somebody is refused.
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
