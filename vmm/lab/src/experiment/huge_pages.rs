//! How far the TLB reaches, as a guest sees it, in small and in huge pages of the host; and what
//! that is worth against what merging saves.
//!
//! A guest reads one line of each page of growing sets, in an order that no prefetcher guesses,
//! each read after the one before. As many lines packed into few pages take the same room in the
//! caches and no TLB: what is left of the difference is the walk of the page tables. Once more when
//! merging has settled, over the pages that are merged and over those that cannot be.

use std::fs;
use std::time::Instant;

use guest::protocol::{Chase, Chased, Class, Command, Done, Target};

use super::ExperimentError;
use super::shootdown::{obey, observed};
use super::stage::{Present, Stage};
use super::trial::Measured;
use fleet::fleet::Fleet;
use memory::PAGE_BYTES;

/// The smallest set, in pages.
const LEAST_PAGES: u64 = 16;
/// A set is within reach of the TLB while a read takes at most this many times what it takes
/// packed.
const WITHIN_REACH: f64 = 1.5;
/// Lines of a page.
const PAGE_LINES: u64 = 64;

pub(super) fn run(stage: &Stage<'_>) -> Result<Measured, ExperimentError> {
    let domains = vec!["experiment"; stage.point.guests as usize];
    stage.play(&domains, |fleet, measured| {
        let huge = huge_pages(fleet)?;
        measured.count([("huge_before_pages", huge)]);
        sets(stage, fleet, Class::Unique, "unmerged", measured)?;
        let present = Present::now(fleet)?;
        fleet.start_merging()?;
        stage.settle(fleet, Instant::now(), |_, _| Ok(()))?;
        let (saved, frames) = fleet.paused(|_| present.saved())?;
        measured.count([
            ("freed_pages", saved.total()),
            ("frames_pages", frames.frames),
            ("huge_after_pages", huge_pages(fleet)?),
        ]);
        // While the engine watches writes, KVM maps small pages only.
        sets(stage, fleet, Class::Common, "merged", measured)?;
        sets(stage, fleet, Class::Unique, "beside_merged", measured)?;
        fleet.stop_merging();
        sets(stage, fleet, Class::Unique, "after_merging", measured)
    })
}

/// Pages of all guests that are in huge pages of the host.
fn huge_pages(fleet: &mut Fleet) -> Result<u64, ExperimentError> {
    let all = fleet.each(|guest| {
        let rollup = guest.pid().map(|pid| fs::read_to_string(format!("/proc/{pid}/smaps_rollup")));
        Ok(rollup.and_then(Result::ok).map_or(0, |text| anon_huge_pages(&text)))
    })?;
    Ok(all.iter().sum())
}

fn anon_huge_pages(rollup: &str) -> u64 {
    let line = rollup.lines().find_map(|line| line.strip_prefix("AnonHugePages:"));
    let kib = line.and_then(|rest| rest.split_whitespace().next()).and_then(|kib| kib.parse::<u64>().ok());
    kib.unwrap_or(0) * 1024 / PAGE_BYTES
}

/// Reads sets of pages of `class`, each twice as large as the one before, as far as the guest holds
/// them.
fn sets(
    stage: &Stage<'_>,
    fleet: &mut Fleet,
    class: Class,
    name: &str,
    measured: &mut Measured,
) -> Result<(), ExperimentError> {
    let (mut spread, mut packed, mut reach) = (Vec::new(), Vec::new(), None);
    let mut pages = LEAST_PAGES;
    while let Some(one) = chase(stage, fleet, Chase { class, nodes: pages, packed: false })? {
        let Some(dense) = chase(stage, fleet, Chase { class, nodes: pages, packed: true })? else { break };
        let mib = (pages * PAGE_BYTES) as f64 / f64::from(1 << 20);
        spread.push((mib, ticks(one)));
        packed.push((mib, ticks(dense)));
        if reach.is_none() && ticks(one) > WITHIN_REACH * ticks(dense) {
            reach = Some(pages / 2);
        }
        pages *= 2;
    }
    let (Some((mib, most)), Some((_, least))) = (spread.last(), packed.last()) else {
        return Err(ExperimentError::FewPages { class: class.name(), least: LEAST_PAGES });
    };
    measured.put(&format!("{name}_largest_set_mib"), *mib);
    measured.put(&format!("{name}_ticks"), *most);
    measured.put(&format!("{name}_packed_ticks"), *least);
    // A set that is never out of reach says only that the reach is no smaller.
    measured.put(&format!("{name}_reach_pages"), reach.unwrap_or(pages / 2) as f64);
    measured.series.insert(format!("{name}_ticks"), spread);
    measured.series.insert(format!("{name}_packed_ticks"), packed);
    Ok(())
}

/// Ticks of a read in the fastest batch: others were disturbed.
fn ticks(chased: Chased) -> f64 {
    chased.best_ticks as f64 / chased.accesses.max(1) as f64
}

/// None where the guest holds fewer pages.
fn chase(stage: &Stage<'_>, fleet: &mut Fleet, chase: Chase) -> Result<Option<Chased>, ExperimentError> {
    observed(fleet, |guest| {
        let held = guest.pages_of(Target::Only(chase.class)).unwrap_or(0);
        let pages = if chase.packed { chase.nodes.div_ceil(PAGE_LINES) } else { chase.nodes };
        if pages > held {
            return Ok(None);
        }
        match obey(stage, guest, &Command::Chase(chase))? {
            Done::Chase(chased) => Ok(Some(chased)),
            _ => Ok(None),
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn huge_pages_are_counted_in_small_ones() {
        assert_eq!(anon_huge_pages("Rss: 9 kB\nAnonHugePages:      4096 kB\nSwap: 0 kB\n"), 1024);
        assert_eq!(anon_huge_pages("Rss: 9 kB\n"), 0);
    }
}
