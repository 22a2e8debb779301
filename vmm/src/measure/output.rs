//! The result of `samepage measure` in one struct; its JSON is the interface.

use std::fmt::Write;

use serde::{Deserialize, Serialize};

use super::subjects::{LeftOut, Subjects};
use super::types::ByType;
use crate::table::mib;
use lab::provenance::Provenance;
use measure::MeasureError;
use measure::beyond::Beyond;
use measure::findings::{Findings, ideal_within_domains};
use measure::frames::{self, Pages, SharedBy};
use measure::scan::Scan;
use measure::source::Source;
use measure::source::file::FileSource;
use measure::volatile::Volatile;
use measure::watch::Watched;
use memory::PAGE_BYTES;

/// Actual sharing.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct SharedNow {
    /// Pages by class.
    pub(super) pages: Pages,
    /// The shared ones by what shares them.
    pub(super) shared_by: SharedBy,
    pub(super) frames: u64,
    /// Pages on shared frames less these frames.
    pub(super) saved_pages: u64,
    /// Saved pages plus pages on the zero page.
    pub(super) freed_pages: u64,
    /// Freed pages as a fraction of the ideal within the trust domains; `null` if there was nothing
    /// to free.
    pub(super) fraction_of_ideal: Option<f64>,
    /// Frames needed if every shared page and every page on the zero page were written.
    pub(super) debt_pages: u64,
    /// Frame numbers are hidden from this user.
    pub(super) estimated: bool,
    /// Caveats of these numbers.
    #[serde(skip)]
    notes: Vec<String>,
}

impl SharedNow {
    /// Reads the processes among `subjects`; the ideal within their trust domains comes from a scan
    /// of all subjects.
    pub(super) fn of(subjects: &Subjects, scan: &Scan) -> Result<(Self, u64), MeasureError> {
        let frames = frames::measure(&subjects.spaces)?;
        let ideal = ideal_within_domains(&subjects.subjects, scan, subjects.spaces.len());
        let fraction_of_ideal = (ideal > 0).then(|| frames.freed_pages() as f64 / ideal as f64);
        let now = Self {
            pages: frames.pages,
            shared_by: frames.shared_by_what,
            frames: frames.frames,
            saved_pages: frames.saved_pages,
            freed_pages: frames.freed_pages(),
            fraction_of_ideal,
            debt_pages: frames.freed_pages(),
            estimated: frames.estimated,
            notes: frames.notes,
        };
        Ok((now, ideal))
    }
}

/// All of it; field names are the JSON interface of `samepage measure --json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Measured {
    /// Potential sharing.
    #[serde(flatten)]
    pub(super) findings: Findings,
    /// Actual sharing, of the processes among the subjects.
    pub(super) shared_now: Option<SharedNow>,
    /// Pages by their use in the guests' kernels, where known.
    pub(super) by_type: Option<ByType>,
    /// What changed meanwhile.
    pub(super) volatile: Option<Volatile>,
    /// Near-duplicates and compression, if asked for.
    pub(super) beyond: Option<Beyond>,
    /// Changes from look to look, if asked for.
    pub(super) watched: Option<Watched>,
    /// Other large mappings of the processes, not measured.
    pub(super) left_out: Vec<LeftOut>,
    /// When, where and how.
    pub(super) measured_by: Provenance,
    /// Threads that read.
    pub(super) threads: usize,
    /// Caveats.
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
        let mut notes = subjects.notes.clone();
        let by_type = ByType::of(subjects, scan)?;
        let mut shared_now = None;
        if !subjects.spaces.is_empty() {
            let (now, _) = SharedNow::of(subjects, scan)?;
            notes.extend(now.notes.iter().cloned());
            shared_now = Some(now);
            if !subjects.files.is_empty() {
                notes.push(
                    "actual sharing is that of the processes, compared with their own potential sharing"
                        .to_owned(),
                );
            }
        }
        notes.extend(subjects.files.iter().flat_map(FileSource::notes));
        for file in subjects.files.iter().filter(|file| file.was_written()) {
            notes.push(format!("{} was written while it was measured: measure a copy", file.name()));
        }
        let swapped: u64 = findings.guests.iter().map(|guest| guest.swapped).sum();
        if swapped > 0 {
            notes.push(format!("{swapped} swapped pages were not read"));
        }
        if findings.passes > 1 {
            notes.push(format!(
                "the memory was read {} times, as the index was limited; runs and page types are unknown then",
                findings.passes
            ));
        }
        let left_out = subjects.left_out.clone();
        let measured_by = Provenance::now(subjects.spaces.iter().map(|space| space.pid));
        Ok(Self {
            findings,
            shared_now,
            by_type,
            volatile,
            beyond: None,
            watched: None,
            left_out,
            measured_by,
            threads,
            notes,
        })
    }

    /// The result in one sentence.
    pub(super) fn headline(&self) -> String {
        let f = &self.findings;
        let present = f.present();
        let ideal = f.ideal_within_domains_pages;
        let mut text = match present {
            0 => "nothing is in memory: there is nothing to share".to_owned(),
            _ => format!(
                "{} MiB in memory, sharing would free {} MiB of it ({:.1} %)",
                mib(present * PAGE_BYTES),
                mib(ideal * PAGE_BYTES),
                100.0 * ideal as f64 / present as f64
            ),
        };
        if let Some(now) = &self.shared_now {
            let about = if now.estimated { "about " } else { "" };
            let [saved, zero] = [now.saved_pages, now.pages.zero].map(|pages| mib(pages * PAGE_BYTES));
            let _ = write!(
                text,
                "; now {about}{saved} MiB are saved by sharing and {zero} MiB are on the zero frame"
            );
            if let Some(fraction) = now.fraction_of_ideal {
                let _ = write!(text, " ({:.1} % of that)", 100.0 * fraction);
            }
        }
        text
    }
}
