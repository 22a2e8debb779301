//! What is measured of each contender, and how two of them compare.

use std::collections::BTreeMap;

use lab::spread::Spread;

/// Which of two numbers is the better one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Better {
    /// The lower.
    Lower,
    /// The higher.
    Higher,
    /// Neither: it is there to judge the others by.
    Neither,
}

#[derive(Clone, Copy, Debug)]
pub struct Figure {
    pub key: &'static str,
    pub label: &'static str,
    /// What counts as better.
    pub better: Better,
    /// Only those that reach the goal may be the best of KSM here: one that does nothing is cheap.
    pub needs_goal: bool,
}

const fn lower(key: &'static str, label: &'static str) -> Figure {
    Figure { key, label, better: Better::Lower, needs_goal: true }
}

const fn higher(key: &'static str, label: &'static str) -> Figure {
    Figure { key, label, better: Better::Higher, needs_goal: false }
}

const fn neither(key: &'static str, label: &'static str) -> Figure {
    Figure { key, label, better: Better::Neither, needs_goal: false }
}

/// All figures, in the order of the table.
pub const FIGURES: &[Figure] = &[
    lower(SECONDS, "seconds to 95 % of the ideal"),
    lower("cpu_seconds", "engine CPU seconds until then"),
    lower("cpu_seconds_per_merged_gib", "engine CPU seconds per merged GiB"),
    higher("share_percent", "share of the ideal when settled, %"),
    lower("idle_cpu_percent", "engine CPU, nothing changes, %"),
    lower("churn_unique_cpu_percent", "engine CPU, 1 %/s of unique pages change, %"),
    lower("churn_common_cpu_percent", "engine CPU, 1 %/s of common pages change, %"),
    higher("share_after_churn_percent", "share of the ideal at the end of that, %"),
    lower("write_p50_ns", "write while merging, p50 ns"),
    lower("write_p99_ns", "write while merging, p99 ns"),
    lower("write_p999_ns", "write while merging, p99.9 ns"),
    lower("write_max_ns", "write while merging, max ns"),
    lower("write_late_p99_us", "writer wakes up late while merging, p99 us"),
    lower("write_late_max_us", "writer wakes up late while merging, max us"),
    neither("writes", "  writes timed"),
    lower("settled_write_p50_ns", "write to unique pages, settled, p50 ns"),
    lower("settled_write_p99_ns", "write to unique pages, settled, p99 ns"),
    lower("settled_write_max_ns", "write to unique pages, settled, max ns"),
    lower("shared_write_p50_ns", "write to common pages, settled, p50 ns"),
    lower("shared_write_p99_ns", "write to common pages, settled, p99 ns"),
    lower("shared_write_max_ns", "write to common pages, settled, max ns"),
    lower("memory_bytes_per_gib", "engine memory per GiB of guest, bytes"),
    neither("memory_private_bytes", "  private memory of VMs and host, growth"),
    neither("memory_page_table_bytes", "  page tables of VMs, growth"),
    neither("memory_mapping_bytes", "  mappings of VMs, growth"),
    neither("memory_ksm_bytes", "  KSM's records"),
    neither("memory_unmapped_slab_bytes", "  slab pages that no guest maps"),
    neither("mappings", "  mappings added"),
    neither("idle_vm_cpu_percent", "VMs' other threads, nothing changes, %"),
    neither("churn_unique_vm_cpu_percent", "VMs' other threads, unique pages change, %"),
    neither("churn_common_vm_cpu_percent", "VMs' other threads, common pages change, %"),
    neither("progress_cpu_share", "engine's own word of its CPU / the kernel's"),
    neither("ideal_pages", "ideal, pages saved"),
];

/// The key of the figure without which the goal was not reached.
pub const SECONDS: &str = "seconds";

/// The figures of one round, by key. What could not be had is not there.
pub type Round = BTreeMap<&'static str, f64>;

/// A figure of all rounds; None if one has not got it, for a median of those that came through
/// would flatter.
#[must_use]
pub fn spread(rounds: &[Round], key: &str) -> Option<Spread> {
    let values: Option<Vec<f64>> = rounds.iter().map(|round| round.get(key).copied()).collect();
    Spread::of(&values?)
}

/// How many times better `ours` is. None where neither is, or one is nothing.
#[must_use]
pub fn times_better(figure: &Figure, ours: f64, theirs: f64) -> Option<f64> {
    let (above, below) = match figure.better {
        Better::Lower => (theirs, ours),
        Better::Higher => (ours, theirs),
        Better::Neither => return None,
    };
    (above > 0.0 && below > 0.0).then_some(above / below)
}

/// The best of `others` at this figure: its number among them and its value. Those of them that did
/// not reach the goal do not count where that matters.
#[must_use]
pub fn best(figure: &Figure, others: &[&[Round]]) -> Option<(usize, f64)> {
    let values = others.iter().enumerate().filter_map(|(n, rounds)| {
        let reached = spread(rounds, SECONDS).is_some();
        let value = spread(rounds, figure.key)?.median;
        (reached || !figure.needs_goal).then_some((n, value))
    });
    match figure.better {
        Better::Lower => values.min_by(|a, b| a.1.total_cmp(&b.1)),
        Better::Higher => values.max_by(|a, b| a.1.total_cmp(&b.1)),
        Better::Neither => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    fn rounds(of: &[&[(&'static str, f64)]]) -> Vec<Round> {
        of.iter().map(|round| round.iter().copied().collect()).collect()
    }

    #[test]
    fn keys_are_different() {
        let keys: BTreeSet<_> = FIGURES.iter().map(|figure| figure.key).collect();
        assert_eq!(keys.len(), FIGURES.len());
        assert!(keys.contains(SECONDS));
    }

    #[test]
    fn a_round_that_lacks_a_figure_takes_it_from_all() {
        let two = rounds(&[&[("a", 3.0), ("b", 1.0)], &[("a", 1.0)]]);
        assert_eq!(spread(&two, "a"), Some(Spread { median: 2.0, least: 1.0, most: 3.0 }));
        assert_eq!(spread(&two, "b"), None);
        assert_eq!(spread(&[], "a"), None);
    }

    #[test]
    fn better_is_above_one() {
        let (seconds, share) = (lower("s", ""), higher("h", ""));
        assert_eq!(times_better(&seconds, 2.0, 6.0), Some(3.0));
        assert_eq!(times_better(&share, 80.0, 40.0), Some(2.0));
        assert_eq!(times_better(&seconds, 0.0, 6.0), None);
        assert_eq!(times_better(&neither("n", ""), 1.0, 1.0), None);
    }

    #[test]
    fn one_that_did_not_get_there_is_not_the_best_at_being_cheap() {
        let idle = lower("idle", "");
        let lazy = rounds(&[&[("idle", 1.0), ("share", 90.0)]]);
        let busy = rounds(&[&[("idle", 50.0), ("share", 80.0), (SECONDS, 3.0)]]);
        assert_eq!(best(&idle, &[&lazy, &busy]), Some((1, 50.0)));
        assert_eq!(best(&higher("share", ""), &[&lazy, &busy]), Some((0, 90.0)));
        assert_eq!(best(&idle, &[&lazy]), None);
    }
}
