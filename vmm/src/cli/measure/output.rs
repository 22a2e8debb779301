//! How `samepage measure` says what it found: one struct, as JSON and as tables.

use std::fmt::{self, Write};

use serde::{Deserialize, Serialize};

use super::subjects::Subjects;
use crate::cli::fleet_table::{mib, table};
use crate::measure::MeasureError;
use crate::measure::findings::Findings;
use crate::measure::frames::{self, Pages, SharedBy};
use crate::measure::scan::Scan;
use crate::measure::volatile::Volatile;
use crate::memory::PAGE_BYTES;

/// What is shared now.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct SharedNow {
    /// Pages by class.
    pub(super) pages: Pages,
    /// Of the shared ones, by what.
    pub(super) shared_by: SharedBy,
    /// Distinct frames.
    pub(super) frames: u64,
    /// Present pages less distinct frames.
    pub(super) saved_pages: u64,
    /// Saved pages as a part of the ideal within the trust domains; 1 if there was nothing to save.
    pub(super) fraction_of_ideal: f64,
    /// Frames that writing to every shared page would take.
    pub(super) debt_pages: u64,
    /// Frame numbers are hidden from this user.
    pub(super) estimated: bool,
}

/// All of it; field names are the JSON interface of `samepage measure --json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Measured {
    /// What could be shared.
    #[serde(flatten)]
    pub(super) findings: Findings,
    /// What is, of the processes among what was measured.
    pub(super) shared_now: Option<SharedNow>,
    /// What changed meanwhile.
    pub(super) volatile: Option<Volatile>,
    /// Threads that read.
    pub(super) threads: usize,
    /// What a reader should know.
    pub(super) notes: Vec<String>,
}

impl Measured {
    pub(super) fn new(
        subjects: &Subjects,
        scan: &Scan,
        volatile: Option<Volatile>,
        threads: usize,
    ) -> Result<Self, MeasureError> {
        let findings = Findings::new(&subjects.subjects, scan);
        let mut notes = Vec::new();
        let mut shared_now = None;
        if !subjects.spaces.is_empty() {
            let frames = frames::measure(&subjects.spaces)?;
            notes.extend(frames.notes.iter().cloned());
            // Of files nothing is in memory that could be shared.
            let ideal = match subjects.files.is_empty() {
                true => findings.ideal_within_domains_pages,
                false => 0,
            };
            let fraction = if ideal == 0 { 1.0 } else { frames.saved_pages as f64 / ideal as f64 };
            shared_now = Some(SharedNow {
                pages: frames.pages,
                shared_by: frames.shared_by_what,
                frames: frames.frames,
                saved_pages: frames.saved_pages,
                fraction_of_ideal: fraction,
                debt_pages: frames.saved_pages,
                estimated: frames.estimated,
            });
            if !subjects.files.is_empty() {
                notes.push("the ideal counts files too, of which nothing is shared now".to_owned());
            }
        }
        for file in subjects.files.iter().filter(|file| file.was_written()) {
            use crate::measure::source::Source;
            notes.push(format!("{} was written while it was measured: measure a copy", file.name()));
        }
        let swapped: u64 = findings.guests.iter().map(|guest| guest.swapped).sum();
        if swapped > 0 {
            notes.push(format!("{swapped} swapped pages were not read"));
        }
        if findings.passes > 1 {
            notes.push(format!(
                "the memory was read {} times, as the index was limited; how runs lie is not known then",
                findings.passes
            ));
        }
        Ok(Self { findings, shared_now, volatile, threads, notes })
    }

    pub(super) fn print(&self, json: bool) -> anyhow::Result<()> {
        match json {
            true => println!("{}", serde_json::to_string(self)?),
            false => println!("{self}"),
        }
        Ok(())
    }

    /// The result in one sentence.
    fn headline(&self) -> String {
        let f = &self.findings;
        let present = f.present();
        let ideal = f.ideal_within_domains_pages;
        let percent =
            |part: u64, whole: u64| if whole == 0 { 0.0 } else { 100.0 * part as f64 / whole as f64 };
        let mut text = format!(
            "{} MiB in memory, sharing would save {} MiB of it ({:.1} %)",
            mib(present * PAGE_BYTES),
            mib(ideal * PAGE_BYTES),
            percent(ideal, present)
        );
        if let Some(now) = &self.shared_now {
            let about = if now.estimated { "about " } else { "" };
            let saved = mib(now.saved_pages * PAGE_BYTES);
            let _ = write!(
                text,
                "; {about}{saved} MiB are saved now ({:.1} % of that)",
                100.0 * now.fraction_of_ideal
            );
        }
        text
    }
}

impl fmt::Display for Measured {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let found = &self.findings;
        let pages = |pages: u64| [pages.to_string(), mib(pages * PAGE_BYTES)];
        let row = |name: &str, count: u64, what: &str| {
            let [pages, mib] = pages(count);
            [name.to_owned(), pages, mib, what.to_owned()]
        };
        let mut guests = table(
            &["guest", "domain", "MiB", "in memory", "zero", "twice in it", "contents", "in common"],
            2,
        );
        for guest in &found.guests {
            let present = guest.total - guest.absent - guest.swapped - guest.vanished;
            let numbers =
                [guest.total, present, guest.zero, guest.self_duplicates, guest.contents, guest.in_common];
            let mut cells = vec![guest.subject.name.clone(), guest.subject.domain.clone()];
            cells.extend(numbers.map(|pages| mib(pages * PAGE_BYTES)));
            guests.add_row(cells);
        }
        writeln!(f, "{guests}")?;
        let c = &found.content;
        let mut classes = table(&["could be shared", "pages", "MiB", ""], 1);
        for cells in [
            row("zero", c.zero, "all bytes zero"),
            row("within a guest", c.self_duplicates, "equal to another page of the guest"),
            row("between guests", c.cross_duplicates, "equal to a page of another guest"),
            row("distinct", c.distinct, "different contents"),
            row("ideal, all with all", found.ideal_saved_pages, "the first three"),
            row("ideal within domains", found.ideal_within_domains_pages, "what may be shared"),
            row("debt of the ideal", found.debt_pages, "frames that writing to all of it would take"),
        ] {
            classes.add_row(cells);
        }
        if let Some(volatile) = &self.volatile {
            let what = match volatile.share.error_95 > 0.0 {
                true => format!(
                    "changed within {:.1} s: {:.2} % +- {:.2} (95 %)",
                    volatile.seconds,
                    100.0 * volatile.share.mean,
                    100.0 * volatile.share.error_95
                ),
                false => format!("changed within {:.1} s", volatile.seconds),
            };
            classes.add_row(row("volatile", volatile.pages, &what));
        }
        if let Some(column) = classes.column_mut(3) {
            column.set_cell_alignment(comfy_table::CellAlignment::Left);
        }
        writeln!(f, "{classes}")?;
        if found.domains.len() > 1 {
            let mut domains = table(&["domain", "guests", "in memory", "distinct", "ideal saves"], 1);
            for d in &found.domains {
                let [present, distinct, ideal] =
                    [d.present, d.distinct, d.ideal_saved_pages].map(|pages| mib(pages * PAGE_BYTES));
                domains.add_row([d.domain.clone(), d.guests.to_string(), present, distinct, ideal]);
            }
            writeln!(f, "{domains}")?;
        }
        self.runs_and_model(f)?;
        if let Some(now) = &self.shared_now {
            let by = &now.shared_by;
            let mut table = table(&["shared now", "pages", "MiB"], 1);
            for (name, count) in [
                ("zero frame", now.pages.zero),
                ("by slabs", by.slab),
                ("by KSM", by.ksm),
                ("by files", by.file),
                ("otherwise", by.other),
                ("saved", now.saved_pages),
                ("debt", now.debt_pages),
            ] {
                let [pages, mib] = pages(count);
                table.add_row([name.to_owned(), pages, mib]);
            }
            writeln!(f, "{table}")?;
        }
        for note in &self.notes {
            writeln!(f, "note: {note}")?;
        }
        write!(f, "{}", self.headline())
    }
}

impl Measured {
    fn runs_and_model(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let found = &self.findings;
        if (2..=12).contains(&found.pairs.len()) {
            let numbers: Vec<String> = (1..=found.pairs.len()).map(|n| n.to_string()).collect();
            let mut header = vec!["contents in common"];
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
                "{} runs of pages between guests, the longest of {}; merging them takes at most {} mappings",
                runs.runs,
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
