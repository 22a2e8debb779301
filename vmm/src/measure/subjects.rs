//! The subjects that the command line names: guests of fleets, processes, files; and their trust
//! domains.

use std::collections::BTreeSet;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{bail, ensure};
use serde::{Deserialize, Serialize};

use super::args::{Args, Domain, PidRange};
use crate::table::mib;
use fleet::living::choose;
use fleet::page_types::page_types;
use fleet::spaces::spaces;
use measure::Space;
use measure::findings::Subject;
use measure::freeze::Frozen;
use measure::page_types::{PageTypes, Ram, pc_ram};
use measure::source::Source;
use measure::source::choice::{Choice, Kind};
use measure::source::file::FileSource;
use measure::source::mappings::{guest_memory, mappings, named_memory};
use measure::source::process::ProcessSource;
use memory::{Extent, PAGE_BYTES};
use os::one_line;

/// The domain of subjects without --domain.
const DEFAULT_DOMAIN: &str = "default";

#[derive(Default)]
pub(super) struct Subjects {
    /// In order.
    pub(super) subjects: Vec<Subject>,
    /// The memory of the processes, which come first.
    pub(super) spaces: Vec<Space>,
    processes: Vec<ProcessSource>,
    /// The files, which come after the processes.
    pub(super) files: Vec<FileSource>,
    /// The page types of each, where known.
    pub(super) page_types: Vec<Option<Arc<PageTypes>>>,
    /// Other large mappings of the processes.
    pub(super) left_out: Vec<LeftOut>,
    /// Caveats of the choice.
    pub(super) notes: Vec<String>,
}

/// A large mapping not taken for guest memory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct LeftOut {
    pid: u32,
    /// Its addresses, as `--range` takes them.
    range: String,
    bytes: u64,
    /// Of these, resident or swapped.
    held_bytes: u64,
    /// Its backing.
    kind: String,
    /// Why it was left out.
    reason: String,
}

impl LeftOut {
    fn of(pid: u32, choice: &Choice) -> impl Iterator<Item = Self> {
        choice.left_out.iter().map(move |(stretch, reason)| Self {
            pid,
            range: format!("{:x}-{:x}", stretch.hvas.start, stretch.hvas.end),
            bytes: stretch.bytes(),
            held_bytes: stretch.held_bytes,
            kind: stretch.kind.to_string(),
            reason: reason.to_string(),
        })
    }
}

impl Subjects {
    pub(super) fn find(args: &Args) -> anyhow::Result<Self> {
        let mut found = Self::default();
        let named = !args.pid.is_empty() || !args.file.is_empty();
        if !named || !args.guests.is_empty() || args.fleet.is_some() {
            let fleet = match choose(args.fleet.clone()) {
                Err(e) if args.fleet.is_none() && args.guests.is_empty() => {
                    return Err(anyhow::Error::from(e).context("nothing to measure: no --pid, no --file"));
                }
                chosen => chosen?,
            };
            for (space, domain) in spaces(&fleet, &args.guests)? {
                if args.page_types {
                    found.ask_page_types(&fleet, &space)?;
                }
                found.push(space, domain);
            }
        } else if args.page_types {
            bail!(
                "--page-types asks the agents of a fleet's guests; for a --pid or a --file use --page-flags"
            );
        }
        let mut seen = BTreeSet::new();
        if let Some(pid) = args.pid.iter().find(|pid| !seen.insert(**pid)) {
            bail!("--pid {pid} is given twice");
        }
        for pid in &args.pid {
            let (space, choice) = process(*pid, args)?;
            found.left_out.extend(LeftOut::of(*pid, &choice));
            found.notes.extend(choice.note(*pid));
            found.notes.extend(untouched_file(&choice, *pid));
            found.push(space, domain_of(&args.domain, &pid.to_string()));
        }
        let mut seen = BTreeSet::new();
        for path in &args.file {
            let same = path.canonicalize().unwrap_or_else(|_| path.clone());
            ensure!(seen.insert(same), "--file {} is given twice", path.display());
            found.push_file(path, domain_of(&args.domain, &path.to_string_lossy()))?;
        }
        let members = args.domain.iter().flat_map(|domain| &domain.members);
        for member in members {
            let is_pid = args.pid.iter().any(|pid| pid.to_string() == *member);
            if !is_pid && !args.file.contains(&PathBuf::from(member)) {
                bail!("--domain names {member}, which is neither a --pid nor a --file of this command");
            }
        }
        ensure!(!found.subjects.is_empty(), "no guest of the fleet runs");
        found.read_page_flags(args)?;
        found.processes = found.process_sources(false);
        let files = std::mem::take(&mut found.files);
        let types = found.page_types[found.spaces.len()..].iter().cloned();
        found.files = files.into_iter().zip(types).map(|(file, types)| file.with_page_types(types)).collect();
        Ok(found)
    }

    fn push(&mut self, space: Space, domain: String) {
        self.subjects.push(Subject { name: space.name.clone(), domain, pid: Some(space.pid) });
        self.spaces.push(space);
        self.page_types.resize(self.subjects.len(), None);
    }

    fn push_file(&mut self, path: &Path, domain: String) -> anyhow::Result<()> {
        let name = path.display().to_string();
        self.files.push(FileSource::open(path, name.clone())?);
        self.subjects.push(Subject { name, domain, pid: None });
        self.page_types.push(None);
        Ok(())
    }

    /// Page types of the next guest to be pushed; a kernel that cannot be asked gets a note.
    fn ask_page_types(&mut self, fleet: &str, space: &Space) -> anyhow::Result<()> {
        let frames =
            |extent: &Extent| Ram { first: extent.gpa.0 / PAGE_BYTES, pages: extent.bytes / PAGE_BYTES };
        let ram: Vec<Ram> = space.extents.iter().map(frames).collect();
        match page_types(fleet, &space.name) {
            Ok(runs) => {
                self.page_types.push(Some(Arc::new(PageTypes::of_runs(&space.name, &runs, &ram)?)));
            }
            Err(e) => self.notes.push(format!("{}: page types are unknown: {}", space.name, one_line(&e))),
        }
        Ok(())
    }

    /// Page flags of processes and files; a PID or path before the `=` names the subject.
    fn read_page_flags(&mut self, args: &Args) -> anyhow::Result<()> {
        let pids = args.pid.iter().map(u32::to_string);
        let names: Vec<String> =
            pids.chain(args.file.iter().map(|file| file.to_string_lossy().into())).collect();
        let guests = self.subjects.len() - names.len();
        for text in &args.page_flags {
            let named = names
                .iter()
                .position(|name| text.strip_prefix(name).is_some_and(|rest| rest.starts_with('=')));
            let (at, path) = match (named, names.len()) {
                (Some(at), _) => (at, &text[names[at].len() + 1..]),
                (None, 1) => (0, text.as_str()),
                _ => bail!(
                    "--page-flags {text} names no --pid or --file of this command: write PID=FLAGS or FILE=FLAGS"
                ),
            };
            let at = guests + at;
            let stretches: Vec<u64> = match self.spaces.get(at) {
                Some(space) => space.extents.iter().map(|extent| extent.bytes).collect(),
                None => self.files[at - self.spaces.len()]
                    .extents()
                    .iter()
                    .map(|pages| pages * PAGE_BYTES)
                    .collect(),
            };
            let ram = pc_ram(&self.subjects[at].name, &stretches, args.low_memory)?;
            let types = PageTypes::of_flags(Path::new(path), &ram, args.low_memory)?;
            ensure!(
                self.page_types[at].is_none(),
                "--page-flags of {} is given twice",
                self.subjects[at].name
            );
            self.page_types[at] = Some(Arc::new(types));
        }
        Ok(())
    }

    fn process_sources(&self, stopped: bool) -> Vec<ProcessSource> {
        let source = |(space, types): (&Space, &Option<Arc<PageTypes>>)| {
            ProcessSource::new(space.clone(), stopped).with_page_types(types.clone())
        };
        self.spaces.iter().zip(&self.page_types).map(source).collect()
    }

    /// Stops the processes if `wanted`, until what it returns is dropped.
    pub(super) fn freeze(&mut self, wanted: bool) -> anyhow::Result<Option<Frozen>> {
        if !wanted || self.spaces.is_empty() {
            return Ok(None);
        }
        let pids: Vec<u32> = self.spaces.iter().map(|space| space.pid).collect();
        let frozen = Frozen::new(&pids)?;
        self.processes = self.process_sources(true);
        Ok(Some(frozen))
    }

    /// All, in the order of `subjects`.
    pub(super) fn sources(&self) -> Vec<&dyn Source> {
        let processes = self.processes.iter().map(|source| source as &dyn Source);
        processes.chain(self.files.iter().map(|source| source as &dyn Source)).collect()
    }
}

/// A restored guest's memory is a file; only pages touched since are mapped in the process.
fn untouched_file(choice: &Choice, pid: u32) -> Option<String> {
    let files = choice.taken.iter().filter(|stretch| stretch.kind == Kind::File);
    let absent: u64 = files.map(|stretch| stretch.bytes().saturating_sub(stretch.held_bytes)).sum();
    (absent > 0).then(|| {
        format!(
            "memory of process {pid} is a mapped file, as after a restore: {} MiB not touched since are in the file only, \
             and count as absent",
            mib(absent)
        )
    })
}

/// The guest in a process, and how it was chosen.
fn process(pid: u32, args: &Args) -> anyhow::Result<(Space, Choice)> {
    let mappings = mappings(pid)?;
    let of_this = |range: &&PidRange| range.pid == Some(pid) || (range.pid.is_none() && args.pid.len() == 1);
    let ranges: Vec<Range<u64>> = args.range.iter().filter(of_this).map(|range| range.hvas.clone()).collect();
    if let Some(PidRange { hvas, .. }) = args.range.iter().find(|range| range.pid.is_none())
        && args.pid.len() > 1
    {
        bail!("--range {:x}-{:x} names no process: write PID:START-END", hvas.start, hvas.end);
    }
    if let Some(unknown) = args.range.iter().filter_map(|range| range.pid).find(|pid| !args.pid.contains(pid))
    {
        bail!("--range names process {unknown}, which is no --pid of this command");
    }
    let (extents, choice) = match ranges.is_empty() {
        true => {
            let choice = guest_memory(pid, &mappings)?;
            (choice.extents(), choice)
        }
        false => named_memory(pid, &mappings, &ranges)?,
    };
    let comm = std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    let name = match comm.trim() {
        "" => pid.to_string(),
        comm => format!("{comm} {pid}"),
    };
    Ok((Space { name, pid, extents }, choice))
}

fn domain_of(domains: &[Domain], member: &str) -> String {
    let found = domains.iter().find(|domain| domain.members.iter().any(|m| m == member));
    found.map_or_else(|| DEFAULT_DOMAIN.to_owned(), |domain| domain.name.clone())
}

#[cfg(test)]
mod tests {
    use super::super::args::domain;
    use super::*;

    #[test]
    fn domains_name_their_members() {
        let domains = [domain("a=1,2").unwrap(), domain("b=x.mem").unwrap()];
        assert_eq!(["2", "x.mem", "3"].map(|m| domain_of(&domains, m)), ["a", "b", DEFAULT_DOMAIN]);
        for wrong in ["", "a", "a=", "=1"] {
            assert!(domain(wrong).is_err(), "{wrong}");
        }
    }
}
