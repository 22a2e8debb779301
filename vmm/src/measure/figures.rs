//! A measurement as a page of tables and plots.

use super::output::Measured;
use super::types::{ByType, TypeRow};
use measure::beyond::Beyond;
use measure::findings::{Findings, MAX_PAIRED};
use measure::html::{Bars, Histogram, Item, Lines, Matrix, Page, Section, Table, number};
use measure::report::mib;
use measure::sample::Estimate;
use measure::watch::Watched;

fn strings(list: &[&str]) -> Vec<String> {
    list.iter().map(|text| (*text).to_owned()).collect()
}

pub(super) fn page(measured: &Measured) -> Page {
    let found = &measured.findings;
    let mut sections = vec![summary(measured), by_guest(found)];
    if found.guests.len() > 1 {
        sections.push(between(found));
    }
    sections.extend(runs(found));
    sections.extend(measured.by_type.as_ref().map(by_type));
    sections.extend(measured.watched.as_ref().map(watched));
    sections.extend(measured.beyond.as_ref().map(beyond));
    if !measured.notes.is_empty() {
        let items = vec![Item::Notes(measured.notes.clone())];
        sections.push(Section { heading: "Notes".into(), text: String::new(), items });
    }
    sections.push(measured.measured_by.section());
    Page { title: "What sharing equal pages would save".into(), lead: measured.headline(), sections }
}

fn summary(measured: &Measured) -> Section {
    let found = &measured.findings;
    let of = |pages: u64| format!("{} MiB", number(mib(pages)));
    let mut values = vec![
        ("in memory".to_owned(), of(found.present())),
        ("sharing would free".to_owned(), of(found.ideal_within_domains_pages)),
    ];
    if let Some(now) = &measured.shared_now {
        values.push(("saved by sharing now".to_owned(), of(now.saved_pages)));
        values.push(("on the zero frame now".to_owned(), of(now.pages.zero)));
        let achieved = now
            .fraction_of_ideal
            .map_or("nothing to share".to_owned(), |fraction| format!("{:.1} %", 100.0 * fraction));
        values.push(("achieved of the ideal".to_owned(), achieved));
    }
    if let Some(volatile) = &measured.volatile {
        let error = match volatile.pages_error_95 {
            0 => String::new(),
            _ => format!(" \u{b1} {:.2}", 100.0 * volatile.share.error_95),
        };
        let share = format!("{:.2} %{error}", 100.0 * volatile.share.mean);
        values.push((format!("changed within {:.1} s", volatile.seconds), share));
    }
    let mut items = vec![Item::KeyValues(values)];
    if let Some(now) = &measured.shared_now {
        let by = &now.shared_by;
        let parts = [
            ("zero frame", Some(now.pages.zero)),
            ("slabs", Some(by.slab)),
            ("KSM", by.ksm),
            ("files", Some(by.file)),
            ("otherwise", Some(by.other)),
        ];
        // An unknown value has no bar; a note says why.
        let bar = |(name, pages): (&str, Option<u64>)| Some((name.to_owned(), vec![mib(pages?)]));
        let bars: Vec<_> = parts.into_iter().filter_map(bar).collect();
        items.push(Item::Bars(Bars {
            title: "Memory that is on a shared frame now, by what shares it. The frames themselves are not saved, so it is more than what is \
                    saved"
                .into(),
            unit: "MiB".into(),
            series: strings(&["pages"]),
            bars,
        }));
    }
    let debt = format!(
        "Shared pages need frames again when they are written: {} MiB, if all potential sharing broke.",
        number(mib(found.debt_pages))
    );
    Section { heading: "In short".into(), text: debt, items }
}

fn by_guest(found: &Findings) -> Section {
    let bars = found.guests.iter().map(|guest| {
        let own = guest.contents - guest.in_common;
        let parts = [guest.zero, guest.self_duplicates, guest.in_common, own].map(mib);
        (guest.subject.name.clone(), parts.to_vec())
    });
    let bars = Bars {
        title: "Each guest's memory".into(),
        unit: "MiB".into(),
        series: strings(&["zero", "twice in the guest", "others have it too", "its own"]),
        bars: bars.collect(),
    };
    let rows = found.domains.iter().map(|domain| {
        let pages = [domain.present, domain.distinct, domain.ideal_saved_pages];
        let mut row = vec![domain.domain.clone(), domain.guests.to_string()];
        row.extend(pages.map(|pages| number(mib(pages))));
        row
    });
    let header = strings(&["trust domain", "guests", "in memory, MiB", "distinct, MiB", "ideal frees, MiB"]);
    Section {
        heading: "What the pages hold".into(),
        text: "Potential sharing is counted within each trust domain: guests of two domains must not share."
            .into(),
        items: vec![Item::Bars(bars), Item::Table(Table { header, rows: rows.collect() })],
    }
}

fn between(found: &Findings) -> Section {
    let mut items = Vec::new();
    if !found.pairs.is_empty() {
        items.push(Item::Matrix(Matrix {
            title: "Contents that two guests have in common, in MiB; on the diagonal all that one has".into(),
            unit: "MiB".into(),
            labels: found.guests.iter().map(|guest| guest.subject.name.clone()).collect(),
            values: found.pairs.iter().map(|row| row.iter().map(|pages| mib(*pages)).collect()).collect(),
        }));
    }
    let line = |of: fn(&measure::findings::Growth) -> u64| {
        found.growth.iter().map(|growth| (growth.guests as f64, mib(of(growth)))).collect()
    };
    let mut series: Vec<(String, Vec<(f64, f64)>)> = vec![
        ("without sharing".into(), line(|growth| growth.present)),
        ("shared ideally".into(), line(|growth| growth.distinct)),
    ];
    let mut text = String::new();
    if let Some(model) = &found.model {
        let page = mib(1);
        let model_line = found.growth.iter().map(|growth| {
            let guests = growth.guests as f64;
            (guests, (model.common as f64 + guests * model.own) * page)
        });
        series.push(("model c + N d".into(), model_line.collect()));
        text = format!(
            "The model: c = {} MiB that all have, d = {} MiB of each guest's own; it predicts {} MiB, and {} MiB are measured.",
            number(model.common as f64 * page),
            number(model.own * page),
            number(model.predicted * page),
            number(model.measured as f64 * page)
        );
    }
    if found.guests.len() > MAX_PAIRED {
        text.push_str(" With this many guests there is no matrix.");
    }
    items.push(Item::Lines(Lines {
        title: "Frames needed as guests are added one by one".into(),
        x: "guests".into(),
        y: "MiB".into(),
        series,
    }));
    // Zero counts are plotted too, unless there are very many guests.
    let all = 1..=found.guests.len() as u64;
    let numbers: Vec<u64> = match found.guests.len() {
        ..=MAX_PAIRED => all.collect(),
        _ => found.held_by.keys().copied().collect(),
    };
    let bins = numbers
        .iter()
        .map(|guests| (guests.to_string(), found.held_by.get(guests).copied().unwrap_or_default() as f64));
    items.push(Item::Histogram(Histogram {
        title: "By how many guests a content is held".into(),
        x: "guests".into(),
        y: "contents".into(),
        bins: bins.collect(),
    }));
    Section { heading: "Between guests".into(), text, items }
}

fn runs(found: &Findings) -> Option<Section> {
    let runs = found.runs.filter(|runs| runs.runs > 0)?;
    let bins = found.run_lengths.iter().map(|class| (class.from_pages.to_string(), class.pages as f64));
    let histogram = Histogram {
        title: "Pages that lie in the same order in two guests, by the length of the stretch".into(),
        x: "length in pages, from this to twice as much".into(),
        y: "pages".into(),
        bins: bins.collect(),
    };
    let text = format!(
        "Pages that another guest has, too, lie in {} runs: stretches in which they follow each other as there. The longest has {} pages. \
         Merging is done by runs; merging all of them takes at most {} mappings.",
        number(runs.runs as f64),
        number(runs.longest as f64),
        number(found.mappings_at_most.unwrap_or_default() as f64)
    );
    Some(Section { heading: "Equal pages in a row".into(), text, items: vec![Item::Histogram(histogram)] })
}

fn by_type(found: &ByType) -> Section {
    let bar = |row: &TypeRow| {
        let c = &row.counts;
        let parts = [c.zero, c.self_duplicates, c.cross_duplicates, c.distinct].map(mib);
        (row.name.clone(), parts.to_vec())
    };
    let bars = Bars {
        title: "Memory by what the guests' kernels use it for".into(),
        unit: "MiB".into(),
        series: strings(&["zero", "within a guest", "between guests", "had it first"]),
        bars: found.types.iter().filter(|row| row.counts.present() > 0).map(bar).collect(),
    };
    let rows = found.types.iter().map(|row| {
        let c = &row.counts;
        let pages =
            [c.pages, c.present(), c.zero, c.self_duplicates, c.cross_duplicates, c.distinct, c.shared_now];
        let mut cells = vec![row.name.clone()];
        cells.extend(pages.map(|pages| number(mib(pages))));
        cells
    });
    let header = ["MiB", "all", "in memory", "zero", "within", "between", "distinct", "shared now"];
    let names: Vec<&str> = found.guests.iter().map(|guest| guest.guest.as_str()).collect();
    Section {
        heading: "What the pages are for".into(),
        text: format!("By the kernels of {}, asked before their memory was read.", names.join(", ")),
        items: vec![Item::Bars(bars), Item::Table(Table { header: strings(&header), rows: rows.collect() })],
    }
}

fn watched(watched: &Watched) -> Section {
    let line = |of: fn(&measure::watch::Look) -> u64| {
        watched.looks.iter().map(|look| (look.seconds.round(), mib(of(look)))).collect()
    };
    let lines = Lines {
        title: "What sharing saves, against the ideal of the moment".into(),
        x: "seconds".into(),
        y: "MiB".into(),
        series: vec![
            ("freed".into(), line(|look| look.freed_pages)),
            ("ideal".into(), line(|look| look.ideal_saved_pages)),
        ],
    };
    let lifetimes = watched.lifetimes.iter().map(|l| (format!("{:.0} s", l.seconds), l.pages as f64));
    let histogram = Histogram {
        title: "Lifetime of sharing, for pages whose sharing began and ended during the watch".into(),
        x: "seconds".into(),
        y: "pages".into(),
        bins: lifetimes.collect(),
    };
    let half = watched.half_life_seconds;
    let text = half.map_or("No page stopped being shared.".to_owned(), |seconds| {
        format!("At the observed rate, half of the shared pages stop being shared within {seconds:.0} s.")
    });
    let mut items = vec![Item::Lines(lines)];
    if !watched.lifetimes.is_empty() {
        items.push(Item::Histogram(histogram));
    }
    Section { heading: "Over time".into(), text, items }
}

fn beyond(beyond: &Beyond) -> Section {
    let rows = [
        ("patches", beyond.patches_save),
        ("lz4", beyond.lz4_saves),
        ("zstd", beyond.zstd_saves),
        ("patch or lz4", beyond.patches_and_lz4_save),
    ];
    let bars = rows.map(|(name, saves): (&str, Estimate)| {
        (format!("{name} \u{b1} {:.1}", 100.0 * saves.error_95), vec![100.0 * saves.mean])
    });
    let text = format!(
        "Of the memory left once all equal pages are shared: estimated from {} of {} contents, with 95 % intervals. {:.1} % (\u{b1} {:.1}) \
         have a page in memory from which they differ by half a page or less.",
        number(beyond.sampled as f64),
        number(beyond.contents as f64),
        100.0 * beyond.near_duplicates.mean,
        100.0 * beyond.near_duplicates.error_95
    );
    let bars = Bars {
        title: "Part of the remaining memory that would be saved".into(),
        unit: "%".into(),
        series: strings(&["saved"]),
        bars: bars.into(),
    };
    Section { heading: "Beyond identity".into(), text, items: vec![Item::Bars(bars)] }
}
