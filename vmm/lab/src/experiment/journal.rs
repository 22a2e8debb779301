//! Finished trials in a file, a line of JSON each, so that an experiment that was interrupted can
//! go on.

use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::ExperimentError;
use super::plan::Plan;
use super::trial::Trial;
use crate::environment::Environment;
use os::named_file;

/// A line, with all that is needed to match it to a plan and a machine.
#[derive(Serialize, Deserialize)]
struct Line {
    plan: Plan,
    environment: Environment,
    trial: Trial,
}

#[derive(Debug)]
pub struct Journal {
    path: PathBuf,
    file: File,
    plan: Plan,
    environment: Environment,
}

/// The contents of the file.
#[derive(Debug, Default)]
pub struct Found {
    /// Trials of this plan on this machine.
    pub trials: Vec<Trial>,
    /// Lines of other plans or machines; they stay where they are.
    pub others: usize,
    /// How many of `trials` another build of this program measured.
    pub other_builds: usize,
}

/// Finished trials of one plan on one machine.
#[derive(Clone, Debug, PartialEq)]
pub struct Recorded {
    pub plan: Plan,
    pub environment: Environment,
    pub trials: Vec<Trial>,
}

/// Adds all trials of a file, each to those of its plan and machine. What stands in two files
/// counts once; a torn last line is left out.
///
/// # Errors
/// It cannot be read, or is something else.
pub fn read_into(path: &Path, all: &mut Vec<Recorded>) -> Result<(), ExperimentError> {
    let failed = |source| ExperimentError::Journal { what: "read", path: path.into(), source };
    let text = named_file::read_text(path).map_err(failed)?;
    let whole = text.rfind('\n').map_or(0, |end| end + 1);
    for (n, line) in text[..whole].lines().enumerate() {
        let Line { plan, environment, trial } = serde_json::from_str(line)
            .map_err(|source| ExperimentError::JournalLine { path: path.into(), line: n + 1, source })?;
        let same = |known: &&mut Recorded| {
            known.plan.measures_the_same(&plan) && known.environment.is_like(&environment)
        };
        match all.iter_mut().find(same) {
            Some(known) if known.trials.contains(&trial) => {}
            Some(known) => {
                known.plan.repeat = known.plan.repeat.max(plan.repeat);
                known.trials.push(trial);
            }
            None => all.push(Recorded { plan, environment, trials: vec![trial] }),
        }
    }
    Ok(())
}

impl Found {
    /// A note for readers of the results, if they are not all this build's.
    pub fn note(&self) -> Option<String> {
        let (other, all) = (self.other_builds, self.trials.len());
        (other > 0).then(|| {
            format!(
                "{other} of the {all} trials that were finished before are by another build of samepage than this one: to compare builds,                  give each a file of results of its own"
            )
        })
    }
}

impl Journal {
    /// Opens the file, or makes it, and reads what it has of this plan on this machine. A torn last
    /// line is removed.
    ///
    /// # Errors
    /// It cannot be read or written, or is something else.
    pub fn open(
        path: &Path,
        plan: &Plan,
        environment: &Environment,
    ) -> Result<(Self, Found), ExperimentError> {
        let failed = |what| move |source| ExperimentError::Journal { what, path: path.into(), source };
        let mut file = named_file::journal(path).map_err(failed("open"))?;
        let mut text = String::new();
        file.read_to_string(&mut text).map_err(failed("read"))?;
        let whole = text.rfind('\n').map_or(0, |end| end + 1);
        let mut found = Found::default();
        for (n, line) in text[..whole].lines().enumerate() {
            let line: Line = serde_json::from_str(line).map_err(|source| ExperimentError::JournalLine {
                path: path.into(),
                line: n + 1,
                source,
            })?;
            if line.plan.measures_the_same(plan) && line.environment.is_like(environment) {
                found.other_builds += usize::from(line.environment.build != environment.build);
                found.trials.push(line.trial);
            } else {
                found.others += 1;
            }
        }
        if whole < text.len() {
            // Only a line that we were writing: anything else stays as it is, and is refused.
            let rest = &text[whole..];
            if !rest.starts_with("{\"plan\"") {
                let source = serde_json::from_str::<Line>(rest).err();
                let source = source.unwrap_or_else(|| serde::de::Error::custom("the line has no end"));
                let line = text[..whole].lines().count() + 1;
                return Err(ExperimentError::JournalLine { path: path.into(), line, source });
            }
            file.set_len(whole as u64).map_err(failed("cut a torn line off"))?;
        }
        let journal = Self { path: path.into(), file, plan: plan.clone(), environment: environment.clone() };
        Ok((journal, found))
    }

    /// Adds a finished trial, and syncs it to disk before it returns.
    ///
    /// # Errors
    ///
    /// It cannot be written.
    pub fn append(&mut self, trial: &Trial) -> Result<(), ExperimentError> {
        let line =
            Line { plan: self.plan.clone(), environment: self.environment.clone(), trial: trial.clone() };
        let written = serde_json::to_vec(&line).map_err(std::io::Error::from).and_then(|mut line| {
            line.push(b'\n');
            self.file.write_all(&line)?;
            self.file.sync_data()
        });
        written.map_err(|source| ExperimentError::Journal { what: "write", path: self.path.clone(), source })
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::super::catalogue;
    use super::super::trial::Measured;
    use super::*;

    fn trial(plan: &Plan, repetition: u32) -> Trial {
        let mut measured = Measured::default();
        measured.put("saved_pages", 7.5);
        measured.series.insert("s".into(), vec![(0.0, 1.0)]);
        Trial { repetition, point: plan.points()[0].clone(), measured, seconds: 0.25 }
    }

    #[test]
    fn what_was_written_is_found_by_the_same_plan_on_the_same_machine_only() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("results.jsonl");
        let (plan, here) = (catalogue::find("identical-vms").unwrap(), Environment::now());
        let (mut journal, found) = Journal::open(&path, &plan, &here).unwrap();
        assert!(found.trials.is_empty());
        let trials = [trial(&plan, 1), trial(&plan, 2)];
        trials.iter().for_each(|trial| journal.append(trial).unwrap());
        let open = |plan: &Plan, here: &Environment| Journal::open(&path, plan, here).unwrap().1;
        assert_eq!(open(&plan, &here).trials, trials);
        assert_eq!(open(&Plan { repeat: 99, ..plan.clone() }, &here).trials, trials);
        let other = open(&Plan { seed: 99, ..plan.clone() }, &here);
        assert_eq!((other.trials.len(), other.others), (0, 2));
        assert_eq!(Journal::open(&path, &plan, &here).unwrap().1.note(), None);
        let (_, found) =
            Journal::open(&path, &plan, &Environment { build: "another".into(), ..here.clone() }).unwrap();
        assert_eq!((found.trials.len(), found.other_builds), (2, 2));
        assert!(found.note().unwrap().starts_with("2 of the 2 trials"), "{found:?}");
        assert_eq!(open(&plan, &Environment { kernel: "2.6.32".into(), ..here.clone() }).others, 2);
    }

    #[test]
    fn a_report_has_every_plan_by_itself() {
        let dir = tempfile::tempdir().unwrap();
        let paths = ["a.jsonl", "b.jsonl"].map(|name| dir.path().join(name));
        let here = Environment::now();
        let plans = ["identical-vms", "ideal"].map(|name| catalogue::find(name).unwrap());
        for path in &paths {
            for plan in &plans {
                let (mut journal, _) = Journal::open(path, plan, &here).unwrap();
                (1..=2).for_each(|repetition| journal.append(&trial(plan, repetition)).unwrap());
            }
        }
        let mut all = Vec::new();
        paths.iter().for_each(|path| read_into(path, &mut all).unwrap());
        let seen: Vec<_> =
            all.iter().map(|recorded| (recorded.plan.name.as_str(), recorded.trials.len())).collect();
        assert_eq!(seen, [("identical-vms", 2), ("ideal", 2)]);
        assert!(read_into(&dir.path().join("none"), &mut all).is_err());
    }

    #[test]
    fn a_torn_line_is_cut_off_and_a_foreign_file_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("results.jsonl");
        let (plan, here) = (catalogue::find("ideal").unwrap(), Environment::now());
        let (mut journal, _) = Journal::open(&path, &plan, &here).unwrap();
        journal.append(&trial(&plan, 1)).unwrap();
        let whole = fs::read_to_string(&path).unwrap();
        fs::write(&path, format!("{whole}{}", &whole[..40])).unwrap();
        let (mut journal, found) = Journal::open(&path, &plan, &here).unwrap();
        assert_eq!(found.trials.len(), 1);
        journal.append(&trial(&plan, 2)).unwrap();
        assert_eq!(Journal::open(&path, &plan, &here).unwrap().1.trials.len(), 2);
        for foreign in ["a,b\n1,2\n", "no newline"] {
            fs::write(&path, foreign).unwrap();
            let error = Journal::open(&path, &plan, &here).unwrap_err().to_string();
            assert!(error.contains("line 1 of"), "{error}");
            assert_eq!(fs::read_to_string(&path).unwrap(), foreign);
        }
    }
}
