//! Pages of the experiments with mechanisms of the processor: shootdowns, and the reach of the TLB.

use super::curve::{curve, first_series, mib};
use lab::experiment::run::Outcome;
use lab::experiment::summary::PointSummary;
use measure::html::{Bars, Item, Lines, Section};

/// Steps of the experiment that do something to pages, and their names for people.
const STEPS: [(&str, &str); 4] = [
    ("discard_at_once", "balloon, many pages at once"),
    ("discard_one_by_one", "balloon, one by one"),
    ("merge", "merge"),
    ("break", "copy on write"),
];

fn bars(title: &str, unit: &str, figures: &[(String, &str)], factor: f64, outcome: &Outcome) -> Item {
    let bar = |s: &PointSummary| {
        let values: Option<Vec<f64>> =
            figures.iter().map(|(name, _)| Some((s.median(name)? * factor).max(0.0))).collect();
        Some((curve(s), values?))
    };
    Item::Bars(Bars {
        title: title.into(),
        unit: unit.into(),
        series: figures.iter().map(|(_, label)| (*label).into()).collect(),
        bars: outcome.summary.iter().filter_map(bar).collect(),
    })
}

/// Every step's bars are side by side in one plot for each kind of event.
pub(super) fn shootdown(outcome: &Outcome) -> Vec<Section> {
    let events = [
        ("remote_tlb_flush_requests", "Requests to flush the VM's TLBs (KVM)"),
        ("remote_tlb_flush", "Flushes that interrupted a vCPU (KVM)"),
        ("tlb_interrupts", "Shootdown interrupts of the host"),
        ("call_interrupts", "Function call interrupts of the host"),
        ("reschedule_interrupts", "Rescheduling interrupts of the host"),
    ];
    let per_page = events.iter().flat_map(|(event, title)| {
        STEPS.map(|(step, label)| {
            bars(
                &format!("{title}: {label}"),
                "for each page",
                &[(format!("{step}_{event}_per_page"), label)],
                1.0,
                outcome,
            )
        })
    });
    let quiet = ("quiet", "nothing");
    let delays = std::iter::once(quiet).chain(STEPS).flat_map(|(step, label)| {
        [
            bars(
                &format!("Reads that took 5 us to 1 ms: {label}"),
                "of a million",
                &[(format!("{step}_late_per_million_reads"), label)],
                1.0,
                outcome,
            ),
            bars(
                &format!("99 of 100 writes took at most: {label}"),
                "us",
                &[(format!("{step}_write_p99_ns"), label)],
                1e-3,
                outcome,
            ),
        ]
    });
    vec![
        Section {
            heading: "For each page".into(),
            text: "Medians of all repetitions. KVM counts the flushes of this VM alone; interrupts are those of the whole host, less what came without work in \
                   the same time, and 0 where that was more."
                .into(),
            items: per_page.collect(),
        },
        Section {
            heading: "What the guest sees".into(),
            text: "By the guest's own time stamp counter: one vCPU writes pages that no other guest has, the others read pages that are merged.".into(),
            items: delays.collect(),
        },
    ]
}

pub(super) fn huge_pages(outcome: &Outcome) -> Vec<Section> {
    let named = [
        ("unmerged_ticks", "one line a page"),
        ("unmerged_packed_ticks", "as many lines, packed"),
        ("merged_ticks", "merged pages"),
        ("beside_merged_ticks", "own pages, while the engine watches"),
        ("after_merging_ticks", "own pages, when it has ended"),
    ];
    let plots = first_series(outcome).into_iter().map(|(summary, all)| {
        // Twice the size is one step to the right.
        let step =
            |points: &Vec<(f64, f64)>| points.iter().map(|(mib, ticks)| (mib.log2(), *ticks)).collect();
        let lines = named.iter().filter_map(|(key, label)| Some(((*label).to_owned(), step(all.get(*key)?))));
        Item::Lines(Lines {
            title: curve(summary),
            x: "size of the set: powers of two of a MiB".into(),
            y: "ticks for each read".into(),
            series: lines.collect(),
        })
    });
    let own = [
        ("unmerged_ticks".to_owned(), "before merging"),
        ("beside_merged_ticks".to_owned(), "while the engine watches"),
    ];
    let trade = vec![
        bars("Freed by merging", "MiB", &[("freed_pages".to_owned(), "freed")], mib(1.0), outcome),
        bars("A read in the largest set", "ticks", &own, 1.0, outcome),
        bars(
            "In huge pages of the host",
            "MiB",
            &[("huge_before_pages".to_owned(), "before"), ("huge_after_pages".to_owned(), "after")],
            mib(1.0),
            outcome,
        ),
    ];
    vec![
        Section {
            heading: "The reach of the TLB".into(),
            text: "The first repetition, by the time stamp counter, the fastest batch of each set. Each read waits for the one before. As many lines packed into \
                   few pages take the same room in the caches: what is between the lines is the walk of the page tables."
                .into(),
            items: plots.collect(),
        },
        Section {
            heading: "What merging gives, and what it takes".into(),
            text: "Medians of all repetitions.".into(),
            items: trade,
        },
    ]
}

pub(super) fn thrashing(outcome: &Outcome) -> Vec<Section> {
    let plot = |key: &str, title: &str, y: &str, factor: f64| {
        let lines = first_series(outcome).into_iter().filter_map(|(summary, all)| {
            let line = all.get(key)?.iter().map(|(at, value)| (*at, value * factor)).collect();
            Some((format!("{}, {} guests", curve(summary), summary.point.guests), line))
        });
        Item::Lines(Lines {
            title: title.into(),
            x: "overcommit, percent: memory that was filled, of what is left".into(),
            y: y.into(),
            series: lines.collect(),
        })
    };
    vec![Section {
        heading: "Against overcommit".into(),
        text: "The first repetition. Guests write their working set all the time; the host pages out what is beyond their share. The knee is where less than half of the \
               work without pressure is done."
            .into(),
        items: vec![
            plot("writes_per_second", "Work", "pages written a second", 1.0),
            plot("paged_out_per_second", "Paged out", "pages a second", 1.0),
            plot("swapped_pages", "On swap", "MiB", mib(1.0)),
        ],
    }]
}
