//! KSM's tables, emptied before a contender is measured.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use fleet::watch::Watch;
use kernel_view::ksm_stat::KsmStat;
use merge::ksm::{self, Ksm, KsmSettings};
use merge::{Engine, EngineError};

/// How long to wait for a KSM that another fleet drives.
const BUSY_LIMIT: Duration = Duration::from_secs(120);
/// KSM removes the entries of ended processes from its tables; entries left after this long without
/// a decrease are not theirs.
const SWEEP_LIMIT: Duration = Duration::from_secs(10);
/// How often either is looked at.
const LOOK: Duration = Duration::from_millis(50);

/// Has KSM forget what ended processes left in its tables, so that no run pays for the one before.
/// Waits for another fleet that drives KSM. Returns what else is in them, and so is scanned too: a
/// line for each process.
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

fn knob(name: &str) -> Option<String> {
    let text = std::fs::read_to_string(ksm::Knobs::default().path(name)).ok()?;
    Some(text.trim().to_owned())
}
