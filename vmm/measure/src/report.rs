//! The result of a run, for people and for machines.

use std::fmt;

use comfy_table::presets::UTF8_BORDERS_ONLY;
use comfy_table::{CellAlignment, Table};
use serde::{Deserialize, Serialize};

use super::content::Content;
use super::frames::{Frames, Pages};
use super::runs::Runs;
use memory::PAGE_BYTES;

/// What only the caller knows of a run.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Outcome {
    /// Short name of the KVM backend, such as "svm+npt".
    pub backend: String,
    /// Name of the engine that merged.
    pub engine: String,
    /// From the start of merging to its end, wall clock.
    pub merge_seconds: f64,
    /// Processor time of the engine, where it can be seen.
    pub merge_cpu_seconds: Option<f64>,
    /// Pages whose content was checked against what it must be.
    pub verified_pages: u64,
    /// Of these, how many were wrong.
    pub mismatched_pages: u64,
    /// Notes for readers of the numbers.
    pub notes: Vec<String>,
}

/// What the pages hold, without the details of how it was found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ContentClasses {
    /// Pages of zeros only.
    pub zero: u64,
    /// Pages whose content stands earlier in the same guest.
    pub self_duplicates: u64,
    /// Pages whose content was first seen in another guest.
    pub cross_duplicates: u64,
    /// Different contents.
    pub distinct: u64,
}

/// One guest's line.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct GuestReport {
    pub name: String,
    pub pid: u32,
    /// Memory it was promised.
    pub memory_bytes: u64,
    /// Its pages by class.
    pub pages: Pages,
    /// Its part of the frames: see [`super::frames::GuestFrames::frames`].
    pub frames: f64,
}

/// Everything a run found out. Field names are the JSON interface of `samepage demo --json`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Report {
    pub guests: u64,
    /// Short name of the KVM backend.
    pub backend: String,
    /// Name of the engine.
    pub engine: String,
    /// Memory promised to all guests.
    pub memory_bytes: u64,
    /// All guests' pages by class.
    pub pages: Pages,
    /// What could be shared.
    pub content: ContentClasses,
    /// Pages that ideal sharing would save.
    pub ideal_saved_pages: u64,
    /// What sharing saves: pages on shared frames less these frames.
    pub saved_pages: u64,
    /// The same in MiB.
    pub saved_mib: f64,
    /// Pages that were present when their contents were compared, and need no frame now: saved by
    /// sharing, and zeros that were given back or are on the zero frame.
    pub freed_pages: u64,
    /// `freed_pages / ideal_saved_pages`; `null` if there was nothing to free.
    pub fraction_of_ideal: Option<f64>,
    /// Distinct frames in use.
    pub frames: u64,
    /// Wall clock of the merging.
    pub merge_seconds: f64,
    /// Processor time of the engine; `null` where it cannot be seen.
    pub merge_cpu_seconds: Option<f64>,
    pub verified_pages: u64,
    pub mismatched_pages: u64,
    /// How the cross duplicates lie in memory.
    pub runs: Runs,
    /// Zero and shared pages are distinguished by estimate.
    pub estimated: bool,
    pub per_guest: Vec<GuestReport>,
    /// Notes for readers.
    pub notes: Vec<String>,
}

impl Report {
    /// Puts together what was measured. `content` is of the same guests, read before merging: pages
    /// of zeros that an engine gives back are absent afterwards.
    pub fn new(outcome: Outcome, frames: &Frames, content: &Content) -> Self {
        let per_guest = frames.guests.iter().map(|guest| GuestReport {
            name: guest.name.clone(),
            pid: guest.pid,
            memory_bytes: guest.pages.total * PAGE_BYTES,
            pages: guest.pages,
            frames: rounded(guest.frames),
        });
        let mut notes = outcome.notes;
        notes.extend(frames.notes.iter().cloned());
        if content.swapped_unread > 0 {
            notes.push(format!("{} swapped pages were not read", content.swapped_unread));
        }
        let saved_pages = frames.saved_pages;
        let freed_pages = content.present().saturating_sub(frames.frames);
        let ideal = content.ideal_saved_pages;
        Self {
            guests: frames.guests.len() as u64,
            backend: outcome.backend,
            engine: outcome.engine,
            memory_bytes: frames.pages.total * PAGE_BYTES,
            pages: frames.pages,
            content: ContentClasses {
                zero: content.zero,
                self_duplicates: content.self_duplicates,
                cross_duplicates: content.cross_duplicates,
                distinct: content.distinct,
            },
            ideal_saved_pages: content.ideal_saved_pages,
            saved_pages,
            saved_mib: rounded(mib(saved_pages)),
            freed_pages,
            fraction_of_ideal: (ideal > 0).then(|| rounded(freed_pages as f64 / ideal as f64)),
            frames: frames.frames,
            merge_seconds: rounded(outcome.merge_seconds),
            merge_cpu_seconds: outcome.merge_cpu_seconds.map(rounded),
            verified_pages: outcome.verified_pages,
            mismatched_pages: outcome.mismatched_pages,
            runs: content.runs,
            estimated: frames.estimated,
            per_guest: per_guest.collect(),
            notes,
        }
    }

    /// Pages of zeros that need no frame.
    fn zeros_pages(&self) -> u64 {
        self.freed_pages.saturating_sub(self.saved_pages)
    }

    /// The result in one sentence.
    pub fn headline(&self) -> String {
        let guests = if self.guests == 1 { "1 guest".to_owned() } else { format!("{} guests", self.guests) };
        let about = if self.estimated { "about " } else { "" };
        let ideal = match self.fraction_of_ideal {
            None => "nothing could be".to_owned(),
            Some(fraction) => format!("{:.1} % of what could be", fraction * 100.0),
        };
        let checked = if self.verified_pages == 0 {
            "no page verified".to_owned()
        } else {
            format!("{} of {} pages wrong", self.mismatched_pages, self.verified_pages)
        };
        let promised = mib(self.memory_bytes / PAGE_BYTES);
        let (freed, saved) = (mib(self.freed_pages), self.saved_mib);
        let zeros = mib(self.zeros_pages());
        format!(
            "{guests}, {promised:.0} MiB promised: {about}{freed:.0} MiB freed ({ideal}): {saved:.0} saved by sharing, {zeros:.0} of zeros; \
             {checked}"
        )
    }
}

impl fmt::Display for Report {
    /// A table, the cost, the notes, and the headline last, where a reader of the terminal looks.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let p = &self.pages;
        let c = &self.content;
        let rows = [
            ("guest memory", p.total, "promised"),
            ("  absent", p.absent, "never touched, or given back"),
            ("  zero", p.zero, "on the kernel's zero frame"),
            ("  private", p.private, "alone on their frame"),
            ("  shared", p.shared, "on a frame mapped more than once"),
            ("  swapped", p.swapped, "on swap"),
            ("could be freed", self.ideal_saved_pages, "zero and duplicate pages"),
            ("  zeros", c.zero, "all bytes zero"),
            ("  within a guest", c.self_duplicates, "equal to an earlier page of the guest"),
            ("  between guests", c.cross_duplicates, "equal to a page of another guest"),
            ("is freed", self.freed_pages, "pages that need no frame"),
            ("  zeros", self.zeros_pages(), "given back, or on the zero frame"),
            ("  saved", self.saved_pages, "by sharing: pages less frames"),
        ];
        let mut table = Table::new();
        table.load_style(UTF8_BORDERS_ONLY).set_header(["", "pages", "MiB", ""]);
        for (name, pages, meaning) in rows {
            table.add_row([
                name.to_owned(),
                pages.to_string(),
                format!("{:.1}", mib(pages)),
                meaning.to_owned(),
            ]);
        }
        for column in [1, 2] {
            if let Some(column) = table.column_mut(column) {
                column.set_cell_alignment(CellAlignment::Right);
            }
        }
        writeln!(f, "{table}")?;
        let cpu = self.merge_cpu_seconds.map_or("unknown".to_owned(), |seconds| format!("{seconds:.2} s"));
        writeln!(
            f,
            "backend {}, engine {}: {:.2} s, processor time {cpu}",
            self.backend, self.engine, self.merge_seconds
        )?;
        for note in &self.notes {
            writeln!(f, "note: {note}")?;
        }
        write!(f, "{}", self.headline())
    }
}

pub fn mib(pages: u64) -> f64 {
    pages as f64 * PAGE_BYTES as f64 / f64::from(1 << 20)
}

/// Four digits after the point: more would be noise.
fn rounded(value: f64) -> f64 {
    (value * 1e4).round() / 1e4
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frames::GuestFrames;

    fn example() -> Report {
        let pages = Pages {
            total: 65536,
            absent: 10000,
            zero: 15000,
            private: 19000,
            shared: 21536,
            swapped: 0,
            image: 0,
        };
        let guest = GuestFrames { name: "a".to_owned(), pid: 7, pages, frames: 22000.25, anonymous: 20000 };
        let frames =
            Frames { guests: vec![guest; 4], pages, frames: 22000, saved_pages: 18536, ..Frames::default() };
        let content = Content {
            zero: 15000,
            self_duplicates: 5000,
            cross_duplicates: 13979,
            distinct: 21557,
            ideal_saved_pages: 33979,
            ..Content::default()
        };
        let outcome = Outcome {
            backend: "pvm".to_owned(),
            engine: "ksm".to_owned(),
            merge_seconds: 2.345678,
            merge_cpu_seconds: Some(1.2),
            verified_pages: 65536,
            ..Outcome::default()
        };
        Report::new(outcome, &frames, &content)
    }

    #[test]
    fn the_headline_says_it_all() {
        assert_eq!(
            example().headline(),
            "4 guests, 256 MiB promised: 131 MiB freed (98.7 % of what could be): 72 saved by sharing, 59 of zeros; 0 of 65536 pages wrong"
        );
    }

    #[test]
    fn the_promised_json_fields_are_there() {
        let json = serde_json::to_value(example()).unwrap();
        for field in [
            "guests",
            "backend",
            "engine",
            "pages",
            "content",
            "ideal_saved_pages",
            "saved_pages",
            "freed_pages",
            "fraction_of_ideal",
            "merge_seconds",
            "merge_cpu_seconds",
            "verified_pages",
            "mismatched_pages",
        ] {
            assert!(!json[field].is_null(), "{field}");
        }
        let keys = |name: &str| json[name].as_object().unwrap().keys().cloned().collect::<Vec<_>>();
        let mut pages = keys("pages");
        pages.sort();
        assert_eq!(pages, ["absent", "private", "shared", "swapped", "total", "zero"]);
        let mut content = keys("content");
        content.sort();
        assert_eq!(content, ["cross_duplicates", "distinct", "self_duplicates", "zero"]);
        assert_eq!(json["merge_seconds"], 2.3457);
        let back: Report = serde_json::from_value(json).unwrap();
        assert_eq!(back, example());
    }

    #[test]
    fn the_table_ends_with_the_headline() {
        let text = example().to_string();
        assert!(text.contains("between guests") && text.ends_with("pages wrong"), "{text}");
        assert!(text.lines().rev().skip(1).all(|line| line.chars().count() <= 100), "{text}");
    }

    #[test]
    fn nothing_of_nothing_is_no_hundred_percent() {
        let report = Report::new(Outcome::default(), &Frames::default(), &Content::default());
        assert_eq!(report.fraction_of_ideal, None);
        assert!(report.headline().contains("nothing could be"), "{}", report.headline());
    }
}
