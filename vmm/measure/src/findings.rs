//! What a measurement found out about sharing, made of the sets of guests that hold each content.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::content::Content;
use super::report::ContentClasses;
use super::runs::{RunLengths, Runs};
use super::scan::Scan;

/// Guests beyond which there is no matrix of pairs.
pub const MAX_PAIRED: usize = 64;

/// A guest, before it is read.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Subject {
    /// Its name, or what it is.
    pub name: String,
    /// Its trust domain: with others of the same it may share.
    pub domain: String,
    /// Its process, unless it is a file.
    pub pid: Option<u32>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestFindings {
    #[serde(flatten)]
    pub subject: Subject,
    /// Pages of all its memory.
    pub total: u64,
    /// Pages without a frame.
    pub absent: u64,
    /// Pages on swap, which were not read.
    pub swapped: u64,
    /// Pages that went away while they were read.
    pub vanished: u64,
    /// Pages of zeros.
    pub zero: u64,
    /// Pages whose content stands earlier in this guest.
    pub self_duplicates: u64,
    /// Different contents, zeros not counted.
    pub contents: u64,
    /// Of these, how many another guest has too.
    pub in_common: u64,
}

/// What sharing within one trust domain would save.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DomainFindings {
    pub domain: String,
    pub guests: u64,
    /// Their pages that have a frame.
    pub present: u64,
    /// Different contents, zeros not counted.
    pub distinct: u64,
    /// Frames that ideal sharing frees.
    pub ideal_saved_pages: u64,
}

/// The first N guests together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Growth {
    pub guests: u64,
    /// Their pages that have a frame.
    pub present: u64,
    /// Different contents, zeros not counted.
    pub distinct: u64,
    /// Frames that ideal sharing frees.
    pub ideal_saved_pages: u64,
}

/// The simplest model of a fleet: each of N guests has c contents that all have, and d of its own.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Model {
    /// c: contents that every guest has.
    pub common: u64,
    /// d: what a guest has besides, on average.
    pub own: f64,
    /// c + N d.
    pub predicted: f64,
    /// The different contents that there are. Fewer than predicted, as some are held by some
    /// guests.
    pub measured: u64,
}

/// What could be shared.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Findings {
    pub guests: Vec<GuestFindings>,
    /// All pages that were read, by what they hold, as if all were one domain.
    pub content: ContentClasses,
    /// Frames that ideal sharing frees if all guests may share with each other.
    pub ideal_saved_pages: u64,
    /// The same within each trust domain.
    pub domains: Vec<DomainFindings>,
    /// The sum of these.
    pub ideal_within_domains_pages: u64,
    /// Contents that guest i and guest j both have; on the diagonal all that it has. Empty for more
    /// than [`MAX_PAIRED`] guests.
    pub pairs: Vec<Vec<u64>>,
    /// Number of contents that exactly N guests hold, by N.
    pub held_by: BTreeMap<u64, u64>,
    /// What the first guest has, the first two, and so on.
    pub growth: Vec<Growth>,
    /// The model against what was measured; for two guests or more.
    pub model: Option<Model>,
    /// How the cross duplicates lie; `null` after more than one pass.
    pub runs: Option<Runs>,
    /// The same by length.
    pub run_lengths: Vec<RunLengths>,
    /// Mappings that merging all runs would take at most: each is one, and so is what is left
    /// behind it; and as many again where the first holders' pages lie.
    pub mappings_at_most: Option<u64>,
    /// Frames that would be needed if every page of the ideal were written: what it saves.
    pub debt_pages: u64,
    /// Passes over the memory.
    pub passes: u32,
    /// Memory that the index took.
    pub index_bytes: u64,
    /// Wall clock of the reading.
    pub seconds: f64,
}

impl Findings {
    /// Of a scan of these guests, in its order.
    pub fn new(subjects: &[Subject], scan: &Scan) -> Self {
        let all = Content::of(scan);
        let count = subjects.len();
        let Held { guests, domains, pairs, held_by, first_seen } = Held::of(subjects, scan);
        let domains: Vec<_> = domains
            .into_iter()
            .map(|(name, found)| DomainFindings {
                domain: name.to_owned(),
                ideal_saved_pages: found.present.saturating_sub(found.distinct),
                ..found
            })
            .collect();
        let mut so_far = Growth::default();
        let growth = (0..count)
            .map(|guest| {
                so_far.guests += 1;
                so_far.present += scan.guests[guest].zero + scan.guests[guest].filled;
                so_far.distinct += first_seen[guest];
                so_far.ideal_saved_pages = so_far.present.saturating_sub(so_far.distinct);
                so_far
            })
            .collect();
        let model = (count > 1).then(|| model(&guests, held_by.get(&(count as u64)).copied(), all.distinct));
        let (runs, run_lengths) = scan.runs.clone().unzip();
        Self {
            content: ContentClasses {
                zero: all.zero,
                self_duplicates: all.self_duplicates,
                cross_duplicates: all.cross_duplicates,
                distinct: all.distinct,
            },
            ideal_saved_pages: all.ideal_saved_pages,
            ideal_within_domains_pages: domains.iter().map(|domain| domain.ideal_saved_pages).sum(),
            domains,
            pairs,
            held_by,
            growth,
            model,
            mappings_at_most: runs.map(|runs: Runs| 4 * runs.runs + count as u64),
            runs,
            run_lengths: run_lengths.unwrap_or_default(),
            debt_pages: all.ideal_saved_pages,
            passes: scan.passes,
            index_bytes: scan.index_bytes,
            seconds: scan.seconds,
            guests,
        }
    }

    /// Pages that were read.
    pub fn present(&self) -> u64 {
        let c = &self.content;
        c.zero + c.self_duplicates + c.cross_duplicates + c.distinct
    }
}

/// Which guests hold which contents, added up.
struct Held<'a> {
    guests: Vec<GuestFindings>,
    /// Without what they would save.
    domains: BTreeMap<&'a str, DomainFindings>,
    pairs: Vec<Vec<u64>>,
    held_by: BTreeMap<u64, u64>,
    /// Contents whose first holder is a guest, by guest.
    first_seen: Vec<u64>,
}

impl<'a> Held<'a> {
    fn of(subjects: &'a [Subject], scan: &Scan) -> Self {
        let count = subjects.len();
        let mut held = Self {
            guests: Vec::new(),
            domains: BTreeMap::new(),
            pairs: vec![vec![0; count]; if count <= MAX_PAIRED { count } else { 0 }],
            held_by: BTreeMap::new(),
            first_seen: vec![0; count],
        };
        for (subject, counts) in subjects.iter().zip(&scan.guests) {
            let domain = held.domains.entry(&subject.domain).or_default();
            domain.guests += 1;
            domain.present += counts.zero + counts.filled;
            held.guests.push(GuestFindings {
                subject: subject.clone(),
                total: counts.pages,
                absent: counts.unread.absent,
                swapped: counts.unread.swapped,
                vanished: counts.unread.vanished,
                zero: counts.zero,
                self_duplicates: 0,
                contents: 0,
                in_common: 0,
            });
        }
        for (set, contents) in scan.contents() {
            let holders: Vec<usize> = scan.sets.guests(set).map(usize::from).collect();
            held.add(subjects, &holders, contents);
        }
        for (guest, counts) in held.guests.iter_mut().zip(&scan.guests) {
            guest.self_duplicates = counts.filled.saturating_sub(guest.contents);
        }
        held
    }

    /// Adds contents that these guests hold, and no others.
    fn add(&mut self, subjects: &'a [Subject], holders: &[usize], contents: u64) {
        *self.held_by.entry(holders.len() as u64).or_default() += contents;
        for guest in holders {
            self.guests[*guest].contents += contents;
            self.guests[*guest].in_common += if holders.len() > 1 { contents } else { 0 };
        }
        // The last is listed first.
        self.first_seen[holders[holders.len() - 1]] += contents;
        let mut names: Vec<&str> = holders.iter().map(|g| subjects[*g].domain.as_str()).collect();
        names.sort_unstable();
        names.dedup();
        for name in names {
            self.domains.entry(name).or_default().distinct += contents;
        }
        if !self.pairs.is_empty() {
            for a in holders {
                holders.iter().for_each(|b| self.pairs[*a][*b] += contents);
            }
        }
    }
}

/// What the first `guests` of a scan would save by ideal sharing within their trust domains.
pub fn ideal_within_domains(subjects: &[Subject], scan: &Scan, guests: usize) -> u64 {
    let present: u64 = scan.guests[..guests].iter().map(|counts| counts.zero + counts.filled).sum();
    let distinct = |set, contents: u64| {
        let holders = scan.sets.guests(set).map(usize::from).filter(|guest| *guest < guests);
        let mut domains: Vec<&str> = holders.map(|guest| subjects[guest].domain.as_str()).collect();
        domains.sort_unstable();
        domains.dedup();
        contents * domains.len() as u64
    };
    present.saturating_sub(scan.contents().map(|(set, contents)| distinct(set, contents)).sum())
}

fn model(guests: &[GuestFindings], common: Option<u64>, measured: u64) -> Model {
    let (common, n) = (common.unwrap_or(0), guests.len() as f64);
    let all: u64 = guests.iter().map(|guest| guest.contents - common).sum();
    let own = all as f64 / n;
    Model { common, own, predicted: common as f64 + n * own, measured }
}
