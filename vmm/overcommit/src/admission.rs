//! Admission: whether a host may promise memory to one more guest.

use std::fmt;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::mib::Mib;

/// The largest ratio, in percent: a hundred times the capacity.
const MAX_RATIO_PERCENT: f64 = 10_000.0;

/// The quantities that are compared before a guest is admitted.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// Promised memory less what is in balloons fits the capacity, and what is available. Nothing
    /// is overcommitted.
    Strict,
    /// The same fits Linux's `CommitLimit`: this percentage of memory, and swap.
    Ratio(f64),
    /// The cover is at least this multiple of the debt.
    Covered(f64),
}

impl Mode {
    /// The mode without its number.
    pub fn name(self) -> &'static str {
        match self {
            Self::Strict => "strict",
            Self::Ratio(_) => "ratio",
            Self::Covered(_) => "covered",
        }
    }
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Strict => f.write_str("strict"),
            Self::Ratio(percent) => write!(f, "ratio {percent} %"),
            Self::Covered(floor) => write!(f, "covered {floor}"),
        }
    }
}

/// What is available: the host's memory, or its control group's limit, less everything that is
/// spoken for. In pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Room {
    /// The host's memory, or the control group's limit.
    pub total_pages: u64,
    /// Whether it is the control group's.
    pub of_group: bool,
    /// The pool of huge pages.
    pub pool_pages: u64,
    /// What the kernel and the processes of no fleet hold, and would not give up at once.
    pub system_pages: u64,
    /// Memory promised by other fleets, less what is in their balloons.
    pub others_pages: u64,
    /// The VMs' overhead: their processes' own memory, and page tables.
    pub overhead_pages: u64,
}

impl Room {
    /// Memory left for guests.
    pub fn left_pages(&self) -> u64 {
        self.shared_pages().saturating_sub(self.others_pages).saturating_sub(self.overhead_pages)
    }

    /// Memory that all fleets share.
    fn shared_pages(&self) -> u64 {
        self.total_pages.saturating_sub(self.pool_pages).saturating_sub(self.system_pages)
    }
}

impl fmt::Display for Room {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let whose = if self.of_group { "our control group's" } else { "this host's" };
        write!(f, "{whose} {}, less {} held by the system", Mib(self.total_pages), Mib(self.system_pages))?;
        if !self.of_group {
            write!(f, ", {} in the pool of huge pages", Mib(self.pool_pages))?;
        }
        let (others, overhead) = (Mib(self.others_pages), Mib(self.overhead_pages));
        write!(f, ", {others} promised by other fleets, {overhead} for the VMs themselves")
    }
}

/// What a host has and owes, in pages. All are sums over guests or the host's own.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sums {
    /// Memory that guests and their overhead may take.
    pub capacity_pages: u64,
    /// What is available, whatever the capacity; None where the host was not read.
    pub room: Option<Room>,
    /// The part of it that is free.
    pub free_pages: u64,
    /// Free swap.
    pub swap_pages: u64,
    pub promised_pages: u64,
    /// Pages in their balloons.
    pub ballooned_pages: u64,
    /// What balloons can still take and would free: above the minimums of guests that have a
    /// driver.
    pub reclaimable_pages: u64,
    /// Frames needed if all shared pages are written.
    pub sharing_debt_pages: u64,
    /// Frames needed if all that was promised, and is neither present nor in a balloon, is touched.
    pub demand_debt_pages: u64,
}

impl Sums {
    /// Pages promised and not in balloons.
    pub fn committed_pages(&self) -> u64 {
        self.promised_pages.saturating_sub(self.ballooned_pages)
    }

    pub fn debt_pages(&self) -> u64 {
        self.sharing_debt_pages.saturating_add(self.demand_debt_pages)
    }

    /// What could pay it.
    pub fn cover_pages(&self) -> u64 {
        self.free_pages.saturating_add(self.swap_pages).saturating_add(self.reclaimable_pages)
    }

    /// With one guest more, none of whose pages has been touched.
    #[must_use]
    pub fn with(mut self, promised_pages: u64) -> Self {
        self.promised_pages = self.promised_pages.saturating_add(promised_pages);
        self.demand_debt_pages = self.demand_debt_pages.saturating_add(promised_pages);
        self
    }
}

/// A host or a rule that makes no sense.
#[derive(Clone, Debug, Error, PartialEq)]
pub enum AdmissionError {
    /// Nothing can be promised on nothing.
    #[error("the capacity is 0 pages: expected what guests may take together")]
    NoCapacity,
    #[error("a ratio of {0} % is not possible: expected more than 0, and at most {MAX_RATIO_PERCENT} %")]
    Ratio(f64),
    #[error("a floor of {0} is not possible: expected 0 (no cover at all) or more; 1 is all of the debt")]
    Floor(f64),
    /// A guest of nothing.
    #[error("guest {0} asks for 0 pages: expected its memory")]
    NoMemory(String),
}

/// The decision about one guest.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "snake_case", tag = "decision")]
pub enum Decision {
    /// It is admitted.
    Admitted {
        /// The sums with it.
        sums: Sums,
    },
    Refused(Refusal),
}

/// Why a guest is refused, and what would make it fit.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Refusal {
    pub mode: Mode,
    pub asked_pages: u64,
    /// The sum that exceeds the limit: the committed memory or the debt, with this guest.
    pub would_be_pages: u64,
    /// The limit.
    pub limit_pages: u64,
    /// The largest guest that would fit.
    pub fits_pages: u64,
    /// What balloons would have to take from the others first; None if they cannot take as much, or
    /// it would not help.
    pub balloon_pages: Option<u64>,
    /// The other rules under which it would fit: `strict`, `ratio` with 150 %, `covered` with a
    /// floor of a half.
    pub other_modes: Vec<Mode>,
    /// The sums without it.
    pub sums: Sums,
}

impl Refusal {
    /// By how much the limit is exceeded.
    pub fn excess_pages(&self) -> u64 {
        self.would_be_pages.saturating_sub(self.limit_pages)
    }

    /// What is available, if that and not the capacity is the limit.
    fn room(&self) -> Option<Room> {
        let without = sides(Sums { room: None, ..self.sums }, self.mode).1;
        self.sums.room.filter(|_| self.limit_pages < without)
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (sum, of) = match self.mode {
            Mode::Strict if self.room().is_some() => ("promised and not in balloons", "what is available"),
            Mode::Strict => ("promised and not in balloons", "the capacity"),
            Mode::Ratio(_) => ("promised and not in balloons", "the commit limit"),
            Mode::Covered(_) => ("owed", "what the cover allows"),
        };
        write!(
            f,
            "{} would be {sum}, {} more than {of} of {}",
            Mib(self.would_be_pages),
            Mib(self.excess_pages()),
            Mib(self.limit_pages),
        )?;
        if let Some(room) = self.room() {
            write!(f, " ({room})")?;
        }
        if let Mode::Covered(_) = self.mode {
            let Sums { free_pages, swap_pages, reclaimable_pages, .. } = self.sums;
            let (free, swap) = (Mib(free_pages), Mib(swap_pages));
            write!(f, " ({free} free, {swap} of swap, {} in reach of balloons)", Mib(reclaimable_pages))?;
        }
        write!(f, " (mode {})", self.mode)?;
        match self.fits_pages {
            0 => f.write_str("; no guest fits, however small")?,
            pages => write!(f, "; a guest of {} fits", Mib(pages))?,
        }
        if let Some(pages) = self.balloon_pages {
            write!(f, "; or take {} from the others by their balloons", Mib(pages))?;
        }
        for mode in &self.other_modes {
            write!(f, "; or use mode {mode}")?;
        }
        Ok(())
    }
}

/// A guest that asks for admission.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Promise {
    /// Its name, for messages.
    pub name: String,
    /// Pages that it asks for.
    pub pages: u64,
}

/// Whether a guest of `promise` is admitted.
///
/// # Errors
///
/// A capacity of 0, a guest of 0 pages, a ratio or a floor that is no number or out of range.
pub fn admit(promise: &Promise, sums: Sums, mode: Mode) -> Result<Decision, AdmissionError> {
    check(sums, mode)?;
    if promise.pages == 0 {
        return Err(AdmissionError::NoMemory(promise.name.clone()));
    }
    let after = sums.with(promise.pages);
    let (would_be_pages, limit_pages) = sides(after, mode);
    if would_be_pages <= limit_pages {
        return Ok(Decision::Admitted { sums: after });
    }
    let (now, _) = sides(sums, mode);
    let excess = would_be_pages - limit_pages;
    // What a balloon takes is no longer committed. It counts as cover already, so it changes
    // nothing there.
    let by_balloon = !matches!(mode, Mode::Covered(_)) && sums.reclaimable_pages >= excess;
    let others = [Mode::Strict, Mode::Ratio(150.0), Mode::Covered(0.5)];
    Ok(Decision::Refused(Refusal {
        mode,
        asked_pages: promise.pages,
        would_be_pages,
        limit_pages,
        fits_pages: limit_pages.saturating_sub(now),
        balloon_pages: by_balloon.then_some(excess),
        other_modes: others.into_iter().filter(|m| m.name() != mode.name() && fits(after, *m)).collect(),
        sums,
    }))
}

/// Admits a whole fleet, one guest after another. A guest that is refused takes nothing from those
/// after it.
///
/// # Errors
/// As [`admit`].
pub fn plan(promises: &[Promise], mut sums: Sums, mode: Mode) -> Result<Vec<Decision>, AdmissionError> {
    check(sums, mode)?;
    let mut decisions = Vec::with_capacity(promises.len());
    for promise in promises {
        let decision = admit(promise, sums, mode)?;
        if let Decision::Admitted { sums: after } = decision {
            sums = after;
        }
        decisions.push(decision);
    }
    Ok(decisions)
}

fn check(sums: Sums, mode: Mode) -> Result<(), AdmissionError> {
    match mode {
        _ if sums.capacity_pages == 0 => Err(AdmissionError::NoCapacity),
        Mode::Ratio(percent) if !(percent > 0.0 && percent <= MAX_RATIO_PERCENT) => {
            Err(AdmissionError::Ratio(percent))
        }
        Mode::Covered(floor) if !(floor >= 0.0 && floor.is_finite()) => Err(AdmissionError::Floor(floor)),
        _ => Ok(()),
    }
}

fn fits(sums: Sums, mode: Mode) -> bool {
    let (is, limit) = sides(sums, mode);
    is <= limit
}

/// The sum that a mode compares, and its limit.
fn sides(sums: Sums, mode: Mode) -> (u64, u64) {
    match mode {
        Mode::Strict => {
            let room = sums.room.map_or(u64::MAX, |room| room.left_pages());
            (sums.committed_pages(), sums.capacity_pages.min(room))
        }
        Mode::Ratio(percent) => {
            let part = |pages: u64| ((pages as f64 * percent / 100.0) as u64).saturating_add(sums.swap_pages);
            // Memory promised by others is committed as ours is, out of the same.
            let spoken_for = |room: Room| room.others_pages.saturating_add(room.overhead_pages);
            let room = |room: Room| part(room.shared_pages()).saturating_sub(spoken_for(room));
            (sums.committed_pages(), part(sums.capacity_pages).min(sums.room.map_or(u64::MAX, room)))
        }
        // cover / debt >= floor. A floor of 0 asks for no cover; the division is then infinite, and
        // cut to the largest number.
        Mode::Covered(floor) => {
            let limit = if floor == 0.0 { u64::MAX } else { (sums.cover_pages() as f64 / floor) as u64 };
            (sums.debt_pages(), limit)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn promise(pages: u64) -> Promise {
        Promise { name: "a".into(), pages }
    }

    fn refusal(decision: Decision) -> Refusal {
        match decision {
            Decision::Refused(refusal) => refusal,
            admitted @ Decision::Admitted { .. } => panic!("{admitted:?}"),
        }
    }

    #[test]
    fn strict_fills_the_capacity_and_no_more() {
        let sums = Sums { capacity_pages: 1000, free_pages: 1000, ..Sums::default() };
        let names = ["a", "b", "c"].map(|n| Promise { name: n.into(), pages: 400 });
        let decisions = plan(&names, sums, Mode::Strict).expect("a plan");
        assert!(matches!(decisions[1], Decision::Admitted { sums: Sums { promised_pages: 800, .. } }));
        let third = refusal(decisions[2].clone());
        assert_eq!((third.excess_pages(), third.fits_pages, third.balloon_pages), (200, 200, None));
        assert_eq!(third.other_modes, [Mode::Ratio(150.0), Mode::Covered(0.5)]);
        let text = third.to_string();
        assert!(
            text.starts_with("4.7 MiB would be promised and not in balloons, 0.8 MiB more than"),
            "{text}"
        );
    }

    #[test]
    fn a_refused_guest_takes_nothing() {
        let sums = Sums { capacity_pages: 1000, ..Sums::default() };
        let decisions = plan(&[promise(2000), promise(1000)], sums, Mode::Strict).expect("a plan");
        assert!(matches!(decisions[1], Decision::Admitted { .. }));
    }

    #[test]
    fn ratio_is_the_commit_limit_of_linux() {
        let sums = Sums { capacity_pages: 1000, swap_pages: 100, promised_pages: 400, ..Sums::default() };
        let sums = Sums { ballooned_pages: 50, reclaimable_pages: 20, ..sums };
        let decide = |pages| admit(&promise(pages), sums, Mode::Ratio(50.0)).expect("a decision");
        assert!(matches!(decide(250), Decision::Admitted { .. }));
        assert_eq!(refusal(decide(251)).balloon_pages, Some(1));
        assert_eq!(refusal(decide(271)).balloon_pages, None, "balloons can take 20");
    }

    #[test]
    fn covered_weighs_cover_against_debt() {
        let sums = Sums { capacity_pages: 1000, free_pages: 300, swap_pages: 100, ..Sums::default() };
        let sums = Sums { reclaimable_pages: 100, sharing_debt_pages: 200, demand_debt_pages: 100, ..sums };
        let decide = |pages, floor| admit(&promise(pages), sums, Mode::Covered(floor)).expect("a decision");
        assert!(matches!(decide(200, 1.0), Decision::Admitted { .. }));
        assert_eq!(refusal(decide(201, 1.0)).fits_pages, 200);
        assert_eq!(refusal(decide(1000, 0.5)).fits_pages, 700);
        assert!(matches!(decide(u64::MAX / 2, 0.0), Decision::Admitted { .. }));
    }

    #[test]
    fn unavailable_memory_is_not_promised() {
        // 100 pages in the pool, 200 the system's, 300 promised by others, 10 for the VMs: 390 of
        // 1000 are left.
        let room = Room {
            total_pages: 1000,
            pool_pages: 100,
            system_pages: 200,
            others_pages: 300,
            overhead_pages: 10,
            ..Room::default()
        };
        let sums = Sums { capacity_pages: 1000, room: Some(room), ..Sums::default() };
        let decide = |pages, mode| admit(&promise(pages), sums, mode).expect("a decision");
        assert!(matches!(decide(390, Mode::Strict), Decision::Admitted { .. }));
        let refused = refusal(decide(391, Mode::Strict));
        assert_eq!((refused.limit_pages, refused.fits_pages), (390, 390));
        let text = refused.to_string();
        for term in [
            "more than what is available of 1.5 MiB",
            "this host's 3.9 MiB",
            "0.8 MiB held by the system",
            "0.4 MiB in the pool of huge pages",
            "1.2 MiB promised by other fleets",
            "0.0 MiB for the VMs themselves",
        ] {
            assert!(text.contains(term), "{term:?} is not in {text:?}");
        }
        // Linux's formula on what all fleets share, 700 pages, and others' promises count as ours.
        assert!(matches!(decide(740, Mode::Ratio(150.0)), Decision::Admitted { .. }));
        assert!(refusal(decide(741, Mode::Ratio(150.0))).to_string().contains("promised by other fleets"));
        // A capacity below what is available is the limit, and the only term.
        let less = Sums { capacity_pages: 390, ..sums };
        let refused = refusal(admit(&promise(391), less, Mode::Strict).expect("a decision"));
        assert!(!refused.to_string().contains("held by the system"), "{refused}");
        // A control group has no pool.
        let group = Sums { room: Some(Room { of_group: true, pool_pages: 0, ..room }), ..sums };
        let text = refusal(admit(&promise(500), group, Mode::Strict).expect("a decision")).to_string();
        assert!(text.contains("our control group's") && !text.contains("huge"), "{text}");
    }

    #[test]
    fn nonsense_is_an_error() {
        let sums = Sums { capacity_pages: 1000, ..Sums::default() };
        let error = |sums, mode| admit(&promise(1), sums, mode).expect_err("an error");
        assert_eq!(error(Sums::default(), Mode::Strict), AdmissionError::NoCapacity);
        for ratio in [f64::NAN, -1.0, 0.0, f64::INFINITY] {
            assert!(matches!(error(sums, Mode::Ratio(ratio)), AdmissionError::Ratio(_)), "{ratio}");
        }
        for floor in [f64::NAN, -0.1, f64::INFINITY] {
            assert!(matches!(error(sums, Mode::Covered(floor)), AdmissionError::Floor(_)), "{floor}");
        }
        assert!(admit(&promise(0), sums, Mode::Strict).is_err());
    }

    proptest! {
        /// A guest of the advised size fits, and one of a page more does not.
        #[test]
        fn advice_holds(
            capacity_pages in 1_u64..1_000_000, free in 0_u64..1_000_000, swap_pages in 0_u64..100_000,
            promised_pages in 0_u64..2_000_000, reclaimable_pages in 0_u64..100_000, debt in 0_u64..1_000_000,
            asked in 1_u64..2_000_000, mode in prop_oneof![
                Just(Mode::Strict), (1.0..300.0_f64).prop_map(Mode::Ratio), (0.1..2.0_f64).prop_map(Mode::Covered)
            ],
        ) {
            let sums = Sums {
                room: None, capacity_pages, free_pages: free.min(capacity_pages), swap_pages, promised_pages, ballooned_pages: 0,
                reclaimable_pages, sharing_debt_pages: debt / 2, demand_debt_pages: debt - debt / 2,
            };
            match admit(&promise(asked), sums, mode).expect("a decision") {
                Decision::Admitted { sums } => prop_assert!(fits(sums, mode)),
                Decision::Refused(refusal) => {
                    prop_assert!(refusal.fits_pages < asked && refusal.excess_pages() > 0);
                    let fits_now = fits(sums.with(refusal.fits_pages), mode);
                    prop_assert!(fits_now || refusal.fits_pages == 0);
                    prop_assert!(!fits(sums.with(refusal.fits_pages + 1), mode));
                    if let Some(pages) = refusal.balloon_pages {
                        let ballooned = Sums { ballooned_pages: pages, ..sums };
                        prop_assert!(fits(ballooned.with(asked), mode));
                    }
                }
            }
        }
    }
}
