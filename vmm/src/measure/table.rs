//! The result of `samepage measure` as tables, and one sentence at the end, where a terminal leaves
//! the eye.

use std::fmt;

use super::output::Measured;
use super::types::{ByType, TypeRow};
use crate::table::{counted, mib, table};
use measure::beyond::Beyond;
use measure::sample::Estimate;
use measure::watch::Watched;
use memory::PAGE_BYTES;

/// Pages, as a number and in MiB.
fn pages(pages: u64) -> [String; 2] {
    [pages.to_string(), mib(pages * PAGE_BYTES)]
}

impl fmt::Display for Measured {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.guests(f)?;
        self.could_be_shared(f)?;
        self.by_domain(f)?;
        self.runs_and_model(f)?;
        self.shared_now(f)?;
        if let Some(by_type) = &self.by_type {
            types_table(f, by_type)?;
        }
        if let Some(beyond) = &self.beyond {
            beyond_table(f, beyond)?;
        }
        if let Some(watched) = &self.watched {
            watched_table(f, watched)?;
        }
        for note in &self.notes {
            writeln!(f, "note: {note}")?;
        }
        write!(f, "{}", self.headline())
    }
}

impl Measured {
    fn guests(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut guests = table(
            &[
                "guest, MiB",
                "domain",
                "RAM",
                "in memory",
                "zero",
                "duplicates inside",
                "distinct",
                "of these others have",
            ],
            2,
        );
        for guest in &self.findings.guests {
            let present = guest.total - guest.absent - guest.swapped - guest.vanished;
            let numbers =
                [guest.total, present, guest.zero, guest.self_duplicates, guest.contents, guest.in_common];
            let mut cells = vec![guest.subject.name.clone(), guest.subject.domain.clone()];
            cells.extend(numbers.map(|pages| mib(pages * PAGE_BYTES)));
            guests.add_row(cells);
        }
        writeln!(f, "{guests}")
    }

    fn could_be_shared(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let found = &self.findings;
        let row = |name: &str, count: u64, what: &str| {
            let [pages, mib] = pages(count);
            [name.to_owned(), pages, mib, what.to_owned()]
        };
        let c = &found.content;
        let mut classes = table(&["could be shared", "pages", "MiB", ""], 1);
        for cells in [
            row("zero", c.zero, "all bytes zero"),
            row("within a guest", c.self_duplicates, "equal to another page of the guest"),
            row("between guests", c.cross_duplicates, "equal to a page of another guest"),
            row("distinct", c.distinct, "different contents"),
            row("ideal, all with all", found.ideal_saved_pages, "the first three"),
            row("ideal within domains", found.ideal_within_domains_pages, "what may be shared"),
            row("debt of the ideal", found.debt_pages, "needed if all of it were written"),
        ] {
            classes.add_row(cells);
        }
        if let Some(volatile) = &self.volatile {
            let within = format!("changed within {:.1} s", volatile.seconds);
            let what = match volatile.pages_error_95 {
                0 => within,
                error => format!(
                    "{within}: estimate, +- {error} pages (95 %); {} of {} read twice",
                    volatile.changed_pages, volatile.looked_pages
                ),
            };
            classes.add_row(row("volatile", volatile.pages, &what));
        }
        if let Some(column) = classes.column_mut(3) {
            column.set_cell_alignment(comfy_table::CellAlignment::Left);
        }
        writeln!(f, "{classes}")
    }

    fn by_domain(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.findings.domains.len() < 2 {
            return Ok(());
        }
        let mut domains = table(&["domain, MiB", "guests", "in memory", "distinct", "ideal frees"], 1);
        for d in &self.findings.domains {
            let [present, distinct, ideal] =
                [d.present, d.distinct, d.ideal_saved_pages].map(|pages| mib(pages * PAGE_BYTES));
            domains.add_row([d.domain.clone(), d.guests.to_string(), present, distinct, ideal]);
        }
        writeln!(f, "{domains}")
    }

    fn shared_now(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some(now) = &self.shared_now else { return Ok(()) };
        let by = &now.shared_by;
        let mut table = table(&["shared now", "pages", "MiB"], 1);
        for (name, count) in [
            ("zero frame", Some(now.pages.zero)),
            ("by slabs", Some(by.slab)),
            ("by KSM", by.ksm),
            ("by files", Some(by.file)),
            ("otherwise", Some(by.other)),
            ("saved by sharing", Some(now.saved_pages)),
            ("freed: saved, and zero frame", Some(now.freed_pages)),
        ] {
            let [pages, mib] = count.map_or(["-".to_owned(), "-".to_owned()], pages);
            table.add_row([name.to_owned(), pages, mib]);
        }
        writeln!(f, "{table}")
    }

    fn runs_and_model(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let found = &self.findings;
        if (2..=12).contains(&found.pairs.len()) {
            let numbers: Vec<String> = (1..=found.pairs.len()).map(|n| n.to_string()).collect();
            let mut header = vec!["contents in common, pages"];
            header.extend(numbers.iter().map(String::as_str));
            let mut pairs = table(&header, 1);
            for (n, (guest, row)) in found.guests.iter().zip(&found.pairs).enumerate() {
                let mut cells = vec![format!("{} {}", n + 1, guest.subject.name)];
                cells.extend(row.iter().map(u64::to_string));
                pairs.add_row(cells);
            }
            writeln!(f, "{pairs}")?;
        }
        if let Some(runs) = found.runs.filter(|runs| runs.runs > 0) {
            writeln!(
                f,
                "{} of pages between guests, the longest of {}; merging them takes at most {} mappings",
                counted(runs.runs, "run"),
                runs.longest,
                found.mappings_at_most.unwrap_or_default()
            )?;
        }
        if let Some(model) = &found.model {
            writeln!(
                f,
                "model: {} contents common to all, {:.0} of each guest's own: {:.0} in all; {} are measured",
                model.common, model.own, model.predicted, model.measured
            )?;
        }
        Ok(())
    }
}

fn types_table(f: &mut fmt::Formatter<'_>, by_type: &ByType) -> fmt::Result {
    let header =
        ["used for, in pages", "all", "in memory", "zero", "within", "between", "distinct", "shared now"];
    let mut table = table(&header, 1);
    for TypeRow { name, counts: c } in &by_type.types {
        let counts =
            [c.pages, c.present(), c.zero, c.self_duplicates, c.cross_duplicates, c.distinct, c.shared_now];
        let mut cells = vec![name.clone()];
        cells.extend(counts.map(|pages| pages.to_string()));
        table.add_row(cells);
    }
    writeln!(f, "{table}")
}

fn percent(estimate: Estimate) -> String {
    format!("{:.1} % +- {:.1}", 100.0 * estimate.mean, 100.0 * estimate.error_95)
}

fn beyond_table(f: &mut fmt::Formatter<'_>, beyond: &Beyond) -> fmt::Result {
    let bytes = |estimate: Estimate| match estimate.mean {
        mean if mean > 0.0 => format!("{mean:.0} +- {:.0} bytes a page", estimate.error_95),
        _ => String::new(),
    };
    let title = format!("beyond sharing ({} of {} contents)", beyond.sampled, beyond.contents);
    let mut table = table(&[&title, "saves", ""], 1);
    let rows = [
        ("patches to a similar page", beyond.patches_save, bytes(beyond.patch_bytes)),
        ("  pages that have one", beyond.near_duplicates, "of half a page or less".to_owned()),
        ("lz4", beyond.lz4_saves, bytes(beyond.lz4_bytes)),
        ("zstd", beyond.zstd_saves, bytes(beyond.zstd_bytes)),
        ("patch or lz4, the smaller", beyond.patches_and_lz4_save, String::new()),
    ];
    for (name, saves, what) in rows {
        table.add_row([name.to_owned(), percent(saves), what]);
    }
    writeln!(f, "{table}\nestimates with their 95 % intervals")
}

fn watched_table(f: &mut fmt::Formatter<'_>, watched: &Watched) -> fmt::Result {
    let mut table = table(&["after", "shared pages", "began", "ended", "freed MiB", "ideal MiB"], 0);
    for look in &watched.looks {
        let cells = [look.shared_pages, look.began_pages, look.ended_pages].map(|pages| pages.to_string());
        let [shared, began, ended] = cells;
        let [freed, ideal] = [look.freed_pages, look.ideal_saved_pages].map(|pages| mib(pages * PAGE_BYTES));
        table.add_row([format!("{:.1} s", look.seconds), shared, began, ended, freed, ideal]);
    }
    writeln!(f, "{table}")?;
    match watched.half_life_seconds {
        Some(seconds) => {
            writeln!(f, "half of the shared pages would stop being shared within {seconds:.0} s")
        }
        None => writeln!(f, "no page stopped being shared"),
    }
}
