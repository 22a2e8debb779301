//! An experiment's results as a page of plots and tables.

mod curve;
mod mechanisms;

use self::curve::{curve, first_series, mib};
use super::table::{columns, dimensions, readable, spread};
use lab::experiment::plan::{Kind, Plan};
use lab::experiment::run::Outcome;
use lab::experiment::summary::PointSummary;
use lab::experiment::trial::Series;
use lab::provenance::Provenance;
use measure::html::{Bars, Item, Lines, Page, Section, Table, number};

/// Figures plotted against the number of guests.
const AGAINST_GUESTS: [(&str, &str); 4] = [
    ("shared_pages", "on shared frames"),
    ("freed_pages", "freed"),
    ("zero_only_pages", "zeros alone would free"),
    ("metadata_pages", "metadata"),
];

/// What merging took, against the number of guests: its figure, a title, its unit.
const COSTS: [(&str, &str, &str); 2] = [
    ("merge_seconds", "From the start of merging to the last merged page", "s"),
    ("merge_cpu_seconds", "Processor time of merging", "s"),
];

pub(super) fn page(outcome: &Outcome) -> Page {
    let plan = &outcome.plan;
    let state = if outcome.complete { "" } else { "Incomplete: it ended before every trial had run. " };
    Page {
        title: format!("Experiment {}", plan.name),
        lead: format!("{state}{}", outcome.environment.line()),
        sections: sections(outcome),
    }
}

pub(super) fn sections(outcome: &Outcome) -> Vec<Section> {
    let plan = &outcome.plan;
    let mut sections = vec![Section {
        heading: "Setup".into(),
        text: format!("{}. After: {}.", plan.about, plan.source),
        items: vec![Item::KeyValues(vec![
            ("trials".into(), format!("{} of {}", outcome.trials.len(), outcome.planned_trials)),
            ("repetitions".into(), plan.repeat.to_string()),
            ("seed".into(), plan.seed.to_string()),
            ("guests".into(), if plan.guest.kernel.is_some() { "Linux" } else { "built-in" }.into()),
            ("numbers of guests".into(), numbers_of_guests(plan)),
            ("guest memory".into(), plan.guest.memory.clone()),
        ])],
    }];
    sections.extend(match plan.kind {
        Kind::IdenticalVms => against_guests(outcome),
        Kind::Ideal => over_time(outcome),
        Kind::SideChannel => distributions(outcome),
        Kind::PageCache => since_the_last_byte(outcome),
        Kind::ScannerPareto => costs(outcome),
        Kind::InflateDeflate => balloon(outcome),
        Kind::CloneFanout => clones(outcome),
        Kind::Shootdown => mechanisms::shootdown(outcome),
        Kind::HugePages => mechanisms::huge_pages(outcome),
        Kind::Mixed => mixed(outcome),
        Kind::Thrashing => mechanisms::thrashing(outcome),
    });
    sections.push(all_figures(outcome));
    sections.push(machine(outcome));
    if !outcome.notes.is_empty() {
        let rows = outcome.notes.iter().map(|note| vec![note.clone()]).collect();
        let items = vec![Item::Table(Table { header: vec!["note".into()], rows })];
        sections.push(Section { heading: "Notes".into(), text: String::new(), items });
    }
    sections
}

/// The numbers of guests that the plan asks for.
fn numbers_of_guests(plan: &Plan) -> String {
    let numbers: Vec<String> = plan.guests.iter().map(ToString::to_string).collect();
    if numbers.is_empty() { "-".into() } else { numbers.join(", ") }
}

/// A plot for each engine and variant: lines where the number of guests differs, bars where it does
/// not.
fn against_guests(outcome: &Outcome) -> Vec<Section> {
    let mut curves: Vec<(String, Vec<&PointSummary>)> = Vec::new();
    for summary in &outcome.summary {
        let name = curve(summary);
        match curves.iter_mut().find(|(known, _)| *known == name) {
            Some((_, points)) => points.push(summary),
            None => curves.push((name, vec![summary])),
        }
    }
    let text = "Medians of all repetitions. On shared frames counts every page that is not alone on its frame; freed is the frames that \
                this saves, and zeros that were given back or are on the zero frame. Frames in use are what is left. Metadata is what the fleet costs more than before it was merged.";
    if outcome.plan.guests.len() > 1 {
        let mut items = variants_against_guests(outcome);
        let plot = |(name, points): &(String, Vec<&PointSummary>)| {
            let series = AGAINST_GUESTS.map(|(figure, label)| {
                let at = |s: &&PointSummary| Some((f64::from(s.point.guests), mib(s.median(figure)?)));
                (label.to_owned(), points.iter().filter_map(at).collect())
            });
            Item::Lines(Lines {
                title: name.clone(),
                x: "guests".into(),
                y: "MiB".into(),
                series: series.to_vec(),
            })
        };
        items.extend(curves.iter().map(plot));
        items.extend(COSTS.map(|(figure, title, y)| {
            let line = |(name, points): &(String, Vec<&PointSummary>)| {
                let at = |s: &&PointSummary| Some((f64::from(s.point.guests), s.median(figure)?));
                (name.clone(), points.iter().filter_map(at).collect())
            };
            Item::Lines(Lines {
                title: title.into(),
                x: "guests".into(),
                y: y.into(),
                series: curves.iter().map(line).collect(),
            })
        }));
        return vec![Section { heading: "Against the number of guests".into(), text: text.into(), items }];
    }
    let items = vec![by_kind("Freed, by what frees it", "freed", outcome.summary.iter())];
    vec![Section { heading: "Freed".into(), text: text.into(), items }]
}

/// The figures of clones that are plotted against their number: a title, a unit, and the lines.
type Plot = (&'static str, &'static str, &'static [(&'static str, &'static str)]);
const OF_CLONES: [Plot; 3] = [
    (
        "Frames of a clone's own: private pages, its VMM, page tables",
        "MiB",
        &[
            ("own_at_0_s_pages", "when all answer"),
            ("own_at_1_s_pages", "1 s later"),
            ("own_at_10_s_pages", "10 s"),
            ("own_at_60_s_pages", "60 s"),
        ],
    ),
    ("Until all clones answer", "s", &[("ready_seconds", "ready")]),
    ("Processor time of a clone's VM until then", "s", &[("vm_cpu_seconds_per_clone", "VM")]),
];

fn clones(outcome: &Outcome) -> Vec<Section> {
    let text = "Medians of all repetitions. One guest is filled and captured, and the clones go on from there, all at once. What they share is counted once, \
                with the image; here is what each has besides.";
    let mut items = Vec::new();
    for (title, y, lines) in OF_CLONES {
        let line = |(figure, label): &(&str, &str)| {
            let factor = if figure.ends_with("_pages") { mib(1.0) } else { 1.0 };
            let at = |s: &PointSummary| Some((f64::from(s.point.guests), s.median(figure)? * factor));
            ((*label).to_owned(), outcome.summary.iter().filter_map(at).collect())
        };
        let series = lines.iter().map(line).collect();
        items.push(Item::Lines(Lines { title: title.into(), x: "clones".into(), y: y.into(), series }));
    }
    vec![Section { heading: "Against the number of clones".into(), text: text.into(), items }]
}

/// A bar for each point, of what is freed (`freed`) or could be (`ideal`), in three parts.
fn by_kind<'a>(title: &str, what: &str, points: impl Iterator<Item = &'a PointSummary>) -> Item {
    let part = |s: &PointSummary, kind: &str| mib(s.median(&format!("{what}_{kind}_pages")).unwrap_or(0.0));
    Item::Bars(Bars {
        title: title.into(),
        unit: "MiB".into(),
        series: ["zeros", "within a guest", "between guests"].map(String::from).to_vec(),
        bars: points
            .map(|s| (curve(s), ["zero", "self", "cross"].map(|kind| part(s, kind)).to_vec()))
            .collect(),
    })
}

/// Variants side by side, where there are several: by what saves with the most guests, then over
/// the number of guests for each engine.
fn variants_against_guests(outcome: &Outcome) -> Vec<Item> {
    let most = outcome.summary.iter().map(|s| s.point.guests).max().unwrap_or(0);
    let title = format!("Freed with {most} guests, by what frees it");
    let all = by_kind(&title, "freed", outcome.summary.iter().filter(|s| s.point.guests == most));
    let of = |what: &str, figure: &str| {
        by_variant(outcome, what, "MiB", "guests", |s, line: &mut Vec<(f64, f64)>| {
            line.extend(s.median(figure).map(|pages| (f64::from(s.point.guests), mib(pages))));
        })
    };
    let compared = [of("frames in use", "frames_pages"), of("freed", "freed_pages")].concat();
    if compared.is_empty() { Vec::new() } else { std::iter::once(all).chain(compared).collect() }
}

/// A plot for each engine with more than one variant, and in it a line for each of them.
fn by_variant(
    outcome: &Outcome,
    what: &str,
    y: &str,
    x: &str,
    add: impl Fn(&PointSummary, &mut Vec<(f64, f64)>),
) -> Vec<Item> {
    let mut plots: Vec<Lines> = Vec::new();
    for summary in &outcome.summary {
        let (title, name) = (format!("{}, {what}", summary.point.engine), &summary.point.variant);
        let at = plots.iter().position(|plot| plot.title == title).unwrap_or_else(|| {
            plots.push(Lines { title, x: x.into(), y: y.into(), series: Vec::new() });
            plots.len() - 1
        });
        let series = &mut plots[at].series;
        if series.last().is_none_or(|(last, _)| last != name) {
            series.push((name.clone(), Vec::new()));
        }
        if let Some((_, line)) = series.last_mut() {
            add(summary, line);
        }
    }
    plots.into_iter().filter(|plot| plot.series.len() > 1).map(Item::Lines).collect()
}

fn over_time(outcome: &Outcome) -> Vec<Section> {
    let named = [
        ("achieved_percent_of_ideal", "all"),
        ("zero_percent_of_ideal", "zeros"),
        ("self_percent_of_ideal", "within a guest"),
        ("cross_percent_of_ideal", "between guests"),
    ];
    let first = first_series(outcome);
    let achieved = |s: &PointSummary, line: &mut Vec<(f64, f64)>| {
        let of = first.iter().find(|(summary, _)| summary.point == s.point);
        line.extend(of.and_then(|(_, all)| all.get("achieved_percent_of_ideal")).into_iter().flatten());
    };
    let mut compared =
        by_variant(outcome, "freed", "% of the ideal", "seconds since merging began", achieved);
    if !compared.is_empty() {
        compared.insert(0, by_kind("What could be freed", "ideal", outcome.summary.iter()));
        compared.insert(1, by_kind("What was freed, merging being over", "freed", outcome.summary.iter()));
    }
    let (mut merging, mut churning) = (compared, Vec::new());
    for (summary, all) in first {
        let series =
            named.iter().filter_map(|(key, name)| Some(((*name).to_owned(), all.get(*key)?.clone())));
        merging.push(Item::Lines(Lines {
            title: curve(summary),
            x: "seconds since merging began".into(),
            y: "% of the ideal".into(),
            series: series.collect(),
        }));
        if let Some(saved) = all.get("churn_freed_pages") {
            churning.push((curve(summary), saved.iter().map(|(at, pages)| (*at, mib(*pages))).collect()));
        }
    }
    let churn = Lines {
        title: "Freed".into(),
        x: "seconds since guests began to write".into(),
        y: "MiB".into(),
        series: churning,
    };
    let rate = outcome.plan.churn.pages_per_second;
    vec![
        Section {
            heading: "While merging".into(),
            text: "The first repetition. The ideal is every page of zeros and every page whose content stands elsewhere, before merging."
                .into(),
            items: merging,
        },
        Section {
            heading: "While pages change".into(),
            text: format!("The first repetition. Each guest writes {} random pages a second.", number(rate as f64)),
            items: vec![Item::Lines(churn)],
        },
    ]
}

fn distributions(outcome: &Outcome) -> Vec<Section> {
    let named = [
        ("same_domain_common_windows", "common, own"),
        ("same_domain_unique_windows", "unique, own"),
        ("other_domain_common_windows", "common, other"),
        ("other_domain_unique_windows", "unique, other"),
    ];
    let plot = |(summary, all): (&PointSummary, &Series)| {
        let line = |(key, name): &(&str, &str)| {
            let points = all.get(*key)?.iter().map(|(ns, part)| (ns / 1000.0, *part));
            Some(((*name).to_owned(), points.collect()))
        };
        Item::Lines(Lines {
            title: curve(summary),
            x: "us: median write of a window".into(),
            y: "% of windows".into(),
            series: named.iter().filter_map(line).collect(),
        })
    };
    let telling = |s: &PointSummary| {
        let values = ["same_domain_slower_percent", "other_domain_slower_percent"];
        values
            .iter()
            .zip(["own domain", "other domain"])
            .filter_map(|(name, domain)| Some((format!("{}, {domain}", curve(s)), vec![s.median(name)?])))
            .collect::<Vec<_>>()
    };
    let bars = Bars {
        title: "Windows of common pages that are slower than a window of unique ones".into(),
        unit: "% of pairs".into(),
        series: vec!["pairs".into()],
        bars: outcome.summary.iter().flat_map(telling).collect(),
    };
    vec![
        Section {
            heading: "Can a guest tell?".into(),
            text: "At 50 % it can only guess; at 100 % two windows are enough. In its own domain another guest has the same common pages, and \
                   they are merged; in the other domain another guest has them too, and they must not be."
                .into(),
            items: vec![Item::Bars(bars)],
        },
        Section {
            heading: "Write times".into(),
            text: "The first repetition: the part of the windows with a median write that took no longer, in the own domain and in the other."
                .into(),
            items: first_series(outcome).into_iter().map(plot).collect(),
        },
    ]
}

/// A plot for each variant, with a line for each engine and round.
fn since_the_last_byte(outcome: &Outcome) -> Vec<Section> {
    let mut plots: Vec<Lines> = Vec::new();
    for (summary, all) in first_series(outcome) {
        let variant = &summary.point.variant;
        let lines = all.iter().filter_map(|(key, points)| {
            let round = key.strip_prefix("round_")?.strip_suffix("_shared_percent")?;
            Some((format!("{}, round {round}", summary.point.engine), points.clone()))
        });
        match plots.iter_mut().find(|plot| plot.title == *variant) {
            Some(plot) => plot.series.extend(lines),
            None => plots.push(Lines {
                title: variant.clone(),
                x: "seconds since both guests have read the file".into(),
                y: "% of the file on one frame".into(),
                series: lines.collect(),
            }),
        }
    }
    vec![Section {
        heading: "Pages of the file that both guests share".into(),
        text: format!(
            "The first repetition. Two guests read a file of {}, the second after a delay; merging runs throughout. When as much as \
             can be is shared, or after {} s, both have their page cache forget the file.",
            outcome.plan.file.size,
            number(outcome.plan.merge_seconds)
        ),
        items: plots.into_iter().map(Item::Lines).collect(),
    }]
}

fn costs(outcome: &Outcome) -> Vec<Section> {
    let bars = |title: &str, unit: &str, figure: &str, of: fn(f64) -> f64| {
        let bar = |s: &PointSummary| Some((curve(s), vec![of(s.median(figure)?)]));
        Item::Bars(Bars {
            title: title.into(),
            unit: unit.into(),
            series: vec![title.into()],
            bars: outcome.summary.iter().filter_map(bar).collect(),
        })
    };
    vec![Section {
        heading: format!("In {} seconds of merging", number(outcome.plan.merge_seconds)),
        text: "More freed for less processor time and shorter writes is better; medians of all repetitions."
            .into(),
        items: vec![
            bars("Freed", "MiB", "freed_pages", mib),
            bars("Processor time of the engine", "s", "merge_cpu_seconds", |seconds| seconds),
            bars("99 of 100 writes of a guest take at most", "us", "write_p99_ns", |ns| ns / 1000.0),
        ],
    }]
}

/// A plot for each step: never touched and touched memory side by side, of each point.
fn balloon(outcome: &Outcome) -> Vec<Section> {
    let bars = |title: &str, unit: &str, figure: &str| {
        let bar = |s: &PointSummary| {
            ["untouched", "touched"].map(|memory| {
                Some((format!("{}, {memory}", variant(s)), vec![s.median(&format!("{memory}_{figure}"))?]))
            })
        };
        Item::Bars(Bars {
            title: title.into(),
            unit: unit.into(),
            series: vec![title.into()],
            bars: outcome.summary.iter().flat_map(bar).flatten().collect(),
        })
    };
    let steps = [("reclaim", "Reclaim"), ("return", "Return"), ("return_install", "Return and install")];
    let rates = steps.map(|(step, title)| bars(title, "GiB/s", &format!("{step}_gib_per_second")));
    let costs = steps.map(|(step, title)| bars(title, "s/GiB", &format!("{step}_vmm_seconds_per_gib")));
    vec![
        Section {
            heading: "How fast".into(),
            text: "Reclaim is until the driver says that all it can spare is in the balloon, return until all of it is out, return and \
                   install until the guest has written it, too. Medians of all repetitions; longer is better."
                .into(),
            items: rates.to_vec(),
        },
        Section {
            heading: "Processor time of the VMM".into(),
            text: "Of its threads that run no guest code, for each GiB; shorter is better.".into(),
            items: costs.to_vec(),
        },
    ]
}

fn mixed(outcome: &Outcome) -> Vec<Section> {
    let kinds = [
        ("sharing_percent", "Sharing"),
        ("sharing_patches_percent", "Sharing and patches"),
        ("sharing_compression_percent", "Sharing and compression"),
        ("sharing_patches_compression_percent", "Sharing, patches and compression"),
    ];
    let plot = |(figure, title): (&str, &str)| {
        let bar = |s: &PointSummary| {
            Some((format!("{}, {} guests", curve(s), s.point.guests), vec![s.median(figure)?]))
        };
        Item::Bars(Bars {
            title: title.into(),
            unit: "% of what is present".into(),
            series: vec![title.into()],
            bars: outcome.summary.iter().filter_map(bar).collect(),
        })
    };
    vec![Section {
        heading: "Saved of guests that are not alike".into(),
        text: "Medians of all repetitions. Sharing is measured; patches of similar pages and compression (lz4, each page by itself) are estimates of what they would save of the \
               rest."
            .into(),
        items: kinds.map(plot).to_vec(),
    }]
}

/// The point without its engine, where that says nothing.
fn variant(summary: &PointSummary) -> String {
    match summary.point.variant.is_empty() {
        true => summary.point.engine.to_string(),
        false => summary.point.variant.clone(),
    }
}

/// The terminal's columns first, then the rest.
fn all_figures(outcome: &Outcome) -> Section {
    let dimensions = dimensions(&outcome.summary);
    let first = columns(outcome.plan.kind);
    let mut names: Vec<&str> = first.to_vec();
    for name in outcome.summary.iter().flat_map(|summary| summary.figures.keys()) {
        if !names.contains(&name.as_str()) {
            names.push(name);
        }
    }
    let (labels, factors): (Vec<_>, Vec<_>) = names.iter().map(|name| readable(name)).unzip();
    let row = |summary: &PointSummary| {
        let cells = names.iter().zip(&factors).map(|(name, factor)| {
            summary.figures.get(*name).map_or("-".into(), |figure| spread(figure, *factor))
        });
        dimensions.iter().map(|(_, of)| of(summary)).chain(cells).collect()
    };
    let table = Table {
        header: dimensions.iter().map(|(name, _)| (*name).to_owned()).chain(labels).collect(),
        rows: outcome.summary.iter().map(row).collect(),
    };
    let text = "Medians of all repetitions, with minimum and maximum where they differ.";
    Section { heading: "All figures".into(), text: text.into(), items: vec![Item::Table(table)] }
}

fn machine(outcome: &Outcome) -> Section {
    let e = &outcome.environment;
    let Provenance { date, host, command, .. } = Provenance::now([]);
    let known = [
        ("this page is of", date),
        ("host", host),
        ("command", command),
        ("processor", e.cpu.clone()),
        ("processors", e.cores.to_string()),
        ("memory, MiB", number((e.memory_bytes >> 20) as f64)),
        ("swap, MiB", number((e.swap_bytes >> 20) as f64)),
        ("kernel", e.kernel.clone()),
        ("KVM", e.backend.clone()),
        ("samepage", e.samepage.clone()),
        ("as root", if e.root { "yes" } else { "no" }.into()),
        ("load when it began", format!("{:.2}", e.load)),
    ];
    let known = known.into_iter().map(|(name, value)| vec![name.to_owned(), value]);
    let knobs = e.knobs.iter().map(|(path, value)| vec![path.clone(), value.clone()]);
    let table = Table { header: vec!["what".into(), "value".into()], rows: known.chain(knobs).collect() };
    Section {
        heading: "The machine".into(),
        text: "Before the first trial; an engine sets KSM while it merges, and restores it.".into(),
        items: vec![Item::Table(table)],
    }
}
