//! Who is compared with whom: the slab engine, the kernel's KSM with three sets of knobs, and nothing.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use fleet::runtime::FleetDir;
use fleet::spec::EngineName;
use fleet::watch::Watch;
use kernel_view::ksm_stat::KsmStat;
use merge::ksm::{self, Ksm, KsmSettings};
use merge::off::Off;
use merge::slab::engine::{SlabEngine, Tuning};
use merge::{Engine, EngineError};

/// How long to wait for a KSM that another fleet drives.
const BUSY_LIMIT: Duration = Duration::from_secs(120);
/// KSM forgets what processes that have ended left in its tables; what is still there after so long without less is not theirs.
const SWEEP_LIMIT: Duration = Duration::from_secs(10);
/// How often either is looked at.
const LOOK: Duration = Duration::from_millis(50);

/// What merges, and how it is set.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Contender {
    /// Nothing: the floor.
    Off,
    /// KSM as the kernel starts with: 100 pages, 20 ms.
    KsmDefault,
    /// KSM at 20000 pages, 10 ms.
    KsmFast,
    /// KSM led by the kernel's scan-time advisor, with smart scan.
    KsmAdvisor,
    /// Samepage's own.
    Slab,
}

impl Contender {
    /// All of them.
    pub const ALL: [Self; 5] = [Self::Off, Self::KsmDefault, Self::KsmFast, Self::KsmAdvisor, Self::Slab];

    /// On the command line and in tables.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Off => "off",
            Self::KsmDefault => "ksm-default",
            Self::KsmFast => "ksm-fast",
            Self::KsmAdvisor => "ksm-advisor",
            Self::Slab => "slab",
        }
    }

    /// The one of this name.
    #[must_use]
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|contender| contender.name() == name)
    }

    /// Whether it is KSM.
    #[must_use]
    pub fn is_ksm(self) -> bool {
        self.settings().is_some()
    }

    /// What a fleet is to know of it.
    #[must_use]
    pub const fn kind(self) -> EngineName {
        match self {
            Self::Off => EngineName::Off,
            Self::Slab => EngineName::Slab,
            _ => EngineName::Ksm,
        }
    }

    fn settings(self) -> Option<KsmSettings> {
        match self {
            Self::KsmDefault => Some(KsmSettings::kernel_default()),
            Self::KsmFast => Some(KsmSettings::fast()),
            Self::KsmAdvisor => Some(KsmSettings::advisor()),
            Self::Off | Self::Slab => None,
        }
    }

    /// The engine, for the fleet in `dir`.
    ///
    /// # Errors
    /// The directory's path is too long for a socket.
    pub fn engine(self, dir: &FleetDir) -> Result<Box<dyn Engine>> {
        Ok(match (self, self.settings()) {
            (Self::Slab, _) => Box::new(SlabEngine::for_members(dir.merge_socket()?, &Tuning::default())),
            (_, Some(settings)) => Box::new(Ksm::new(settings)),
            (_, None) => Box::new(Off),
        })
    }
}

/// Has KSM forget what ended processes left in its tables, so that nobody pays for the one before. Waits for another fleet
/// that drives KSM. Returns what else is in them, and so is scanned too: a line for each process.
///
/// # Errors
/// KSM cannot be driven, or the user wants an end.
pub fn sweep_ksm(watch: &Watch) -> Result<Vec<String>> {
    let mut sweeper = Ksm::new(KsmSettings::fast());
    let began = Instant::now();
    loop {
        match sweeper.start(&[]) {
            Ok(()) => break,
            Err(EngineError::Busy { .. }) if began.elapsed() < BUSY_LIMIT => std::thread::sleep(LOOK),
            Err(error) => return Err(error).context("cannot empty KSM's tables before a measurement"),
        }
        watch.check()?;
    }
    let (mut least, mut since) = (u64::MAX, Instant::now());
    loop {
        let (records, others) = (records(), others());
        let theirs: u64 = others.iter().map(|(_, pages)| pages).sum();
        // Theirs change while they are counted.
        let swept = records <= theirs + theirs / 20;
        if swept || since.elapsed() >= SWEEP_LIMIT {
            let line =
                |(who, pages)| format!("KSM scans {pages} pages of {who} too, so its figures are too bad");
            return Ok(others.into_iter().map(line).collect());
        }
        if records < least - least / 50 {
            (least, since) = (records, Instant::now());
        }
        watch.check()?;
        std::thread::sleep(LOOK);
    }
}

/// Pages that KSM keeps records of.
fn records() -> u64 {
    let tables = ["pages_shared", "pages_sharing", "pages_unshared", "pages_volatile"];
    tables.iter().filter_map(|name| knob(name)?.parse::<u64>().ok()).sum()
}

/// The processes that have opted in to KSM, and how many of their pages it keeps records of.
fn others() -> Vec<(String, u64)> {
    let processes = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = processes.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    let with_records = pids.filter_map(|pid| {
        let pages = KsmStat::of(pid).ok()?.rmap_items;
        let name = std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
        (pages > 0).then(|| (format!("{} (pid {pid})", name.trim()), pages))
    });
    with_records.collect()
}

/// Names and values of KSM's knobs.
pub type Knobs = Vec<(&'static str, String)>;

/// The knobs that decide how KSM works, as they are now.
#[must_use]
pub fn ksm_knobs() -> Knobs {
    const NAMES: [&str; 12] = [
        "run",
        "pages_to_scan",
        "sleep_millisecs",
        "use_zero_pages",
        "smart_scan",
        "advisor_mode",
        "advisor_max_cpu",
        "advisor_min_pages_to_scan",
        "advisor_max_pages_to_scan",
        "advisor_target_scan_time",
        "max_page_sharing",
        "merge_across_nodes",
    ];
    NAMES.iter().filter_map(|name| Some((*name, knob(name)?))).collect()
}

fn knob(name: &str) -> Option<String> {
    let text = std::fs::read_to_string(ksm::Knobs::default().path(name)).ok()?;
    Some(text.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_lead_back() {
        for contender in Contender::ALL {
            assert_eq!(Contender::named(contender.name()), Some(contender));
            assert_eq!(contender.is_ksm(), contender.kind() == EngineName::Ksm);
        }
        assert_eq!(Contender::named("ksm"), None);
    }
}
