//! Runs a plan: repetition after repetition, and in each every point that is possible here.

use std::fs;
use std::time::Instant;

use serde::Serialize;

use super::ExperimentError;
use super::journal::{Journal, Recorded};
use super::plan::{Kind, Plan};
use super::stage::Stage;
use super::summary::{PointSummary, summarize};
use super::trial::{Measured, Point, Trial};
use super::{
    clone_fanout, huge_pages, ideal, identical, inflate_deflate, kernel, mixed, page_cache, scanner,
};
use super::{shootdown, side_channel, thrashing};
use crate::environment::Environment;
use fleet::watch::Watch;
use memory::page_out;

/// Where the host says whether it gives huge pages on request.
const HUGE_PAGES: &str = "/sys/kernel/mm/transparent_hugepage/enabled";

/// Everything that is known of an experiment.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Outcome {
    pub plan: Plan,
    /// The environment.
    pub environment: Environment,
    /// Whether every trial is finished.
    pub complete: bool,
    /// The number of trials planned.
    pub planned_trials: usize,
    /// Medians and spread of each point.
    pub summary: Vec<PointSummary>,
    pub trials: Vec<Trial>,
    /// Notes for readers, such as the parts of the plan that are not possible here.
    pub notes: Vec<String>,
    #[serde(skip)]
    points: Vec<Point>,
}

impl Outcome {
    /// The outcome of a plan of which `trials` are finished.
    ///
    /// # Errors
    /// No point of it is possible here.
    pub fn new(plan: Plan, environment: Environment, trials: Vec<Trial>) -> Result<Self, ExperimentError> {
        let (points, notes) = possible(&plan);
        if points.is_empty() {
            return Err(ExperimentError::NothingToRun(notes.join("; ")));
        }
        let wanted = |trial: &Trial| trial.repetition <= plan.repeat && points.contains(&trial.point);
        let trials = trials.into_iter().filter(wanted).collect();
        let planned_trials = points.len() * plan.repeat as usize;
        let mut outcome = Self {
            plan,
            environment,
            complete: false,
            planned_trials,
            summary: Vec::new(),
            trials,
            notes,
            points,
        };
        outcome.sum_up();
        Ok(outcome)
    }

    /// What was recorded, whether it is possible here or not.
    pub fn of(recorded: Recorded) -> Self {
        let Recorded { plan, environment, trials } = recorded;
        let mut points = plan.points();
        points.retain(|point| trials.iter().any(|trial| trial.point == *point));
        let planned_trials = points.len() * plan.repeat as usize;
        let (summary, notes) = (Vec::new(), Vec::new());
        let mut outcome =
            Self { plan, environment, complete: false, planned_trials, summary, trials, notes, points };
        outcome.sum_up();
        outcome
    }

    /// Runs the trials that are not finished. `begin` is called with the point before each trial.
    /// On an error, the finished trials are in the outcome.
    ///
    /// # Errors
    /// A fleet failed, a page was wrong, the file of results cannot be written, or the user
    /// interrupts it.
    pub fn go_on(
        &mut self,
        mut journal: Option<&mut Journal>,
        watch: &Watch,
        begin: &dyn Fn(u32, &Point, usize),
    ) -> Result<(), ExperimentError> {
        for repetition in 1..=self.plan.repeat {
            for point in self.points.clone() {
                if self.trials.iter().any(|t| t.repetition == repetition && t.point == point) {
                    continue;
                }
                watch.check()?;
                begin(repetition, &point, self.trials.len());
                let began = Instant::now();
                let measured = measure(&Stage { plan: &self.plan, point: &point, repetition, watch })?;
                let seconds = began.elapsed().as_secs_f64();
                let trial = Trial { repetition, point, measured, seconds };
                let written = journal.as_mut().map_or(Ok(()), |journal| journal.append(&trial));
                self.trials.push(trial);
                self.sum_up();
                written?;
            }
        }
        Ok(())
    }

    fn sum_up(&mut self) {
        self.summary = summarize(&self.points, &self.trials);
        self.complete = self.trials.len() == self.planned_trials;
        for note in self.trials.iter().flat_map(|trial| &trial.measured.notes) {
            if !self.notes.contains(note) {
                self.notes.push(note.clone());
            }
        }
    }
}

fn measure(stage: &Stage<'_>) -> Result<Measured, ExperimentError> {
    match stage.plan.kind {
        Kind::IdenticalVms => identical::run(stage),
        Kind::Ideal => ideal::run(stage),
        Kind::SideChannel => side_channel::run(stage),
        Kind::PageCache => page_cache::run(stage),
        Kind::ScannerPareto => scanner::run(stage),
        Kind::InflateDeflate => inflate_deflate::run(stage),
        Kind::CloneFanout => clone_fanout::run(stage),
        Kind::Shootdown => shootdown::run(stage),
        Kind::HugePages => huge_pages::run(stage),
        Kind::Mixed => mixed::run(stage),
        Kind::Thrashing => thrashing::run(stage),
    }
}

/// The points of a plan that are possible here, and a note for each engine and variant that is not.
fn possible(plan: &Plan) -> (Vec<Point>, Vec<String>) {
    let mut notes = Vec::new();
    let mut points = plan.points();
    for engine in &plan.engines {
        if let Some(why) = engine.missing() {
            points.retain(|point| point.engine != *engine);
            notes.push(format!("left out: engine {engine}, because {why}"));
        }
    }
    if let Some(why) = missing(plan) {
        points.clear();
        notes.push(why.into());
    }
    let mut kaslr = false;
    let huge_pages = fs::read_to_string(HUGE_PAGES).unwrap_or_default();
    for variant in &plan.variant {
        let why: String = if variant.cmdline.is_some() && plan.guest.kernel.is_none() {
            "the built-in guest has no command line: give Linux guests with --kernel and --initrd".into()
        } else if variant.huge_pages == Some(true)
            && (huge_pages.is_empty() || huge_pages.contains("[never]"))
        {
            "this host gives no transparent huge pages".into()
        } else if variant.kaslr.is_some() && plan.guest.kernel.is_none() {
            // One note for all of them.
            kaslr = true;
            continue;
        } else if let Err(why) = kernel::of(plan, variant) {
            why
        } else {
            continue;
        };
        points.retain(|point| point.variant != variant.name);
        notes.push(format!("left out: variant {:?}, because {why}", variant.name));
    }
    if kaslr {
        notes.push(
            "left out: KASLR, which the built-in guest does not have: give Linux guests with --kernel and --initrd".into(),
        );
    }
    (points, notes)
}

/// What every point of a plan needs and this host lacks.
fn missing(plan: &Plan) -> Option<&'static str> {
    match plan.kind {
        Kind::PageCache if plan.guest.kernel.is_none() => Some(
            "guests that read files are Linux guests, the built-in one has no page cache: give --kernel and --initrd (`samepage image` \
             makes both)",
        ),
        Kind::PageCache if !rustix::process::geteuid().is_root() => {
            Some("only root sees the frames of a file's pages")
        }
        Kind::Shootdown if plan.guest.kernel.is_some() => {
            Some("the processors of a Linux guest are its own: leave --kernel out")
        }
        Kind::Thrashing if page_out::has_swap().is_err() => Some(
            "this host has no active swap with room in it (`swapon --show`): make some, on zram for instance",
        ),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::super::catalogue;
    use super::*;
    use crate::contender::Contender;

    fn plan() -> Plan {
        let mut plan = catalogue::find("fidelity").unwrap();
        plan.engines = vec![Contender::Off];
        plan
    }

    #[test]
    fn what_a_guest_cannot_have_is_left_out_and_said() {
        let (points, notes) = possible(&plan());
        assert!(!points.is_empty() && points.iter().all(|point| !point.variant.contains("init_on_free")));
        assert!(
            notes.iter().any(|note| note.contains("init_on_free") && note.contains("--kernel")),
            "{notes:?}"
        );
        let mut linux = plan();
        linux.guest.kernel = Some("vmlinux".into());
        assert!(possible(&linux).0.iter().any(|point| point.variant.contains("init_on_free")));
        linux.variant.retain(|variant| variant.cmdline.is_some());
        linux.guest.kernel = None;
        let error = Outcome::new(linux, Environment::default(), Vec::new()).unwrap_err();
        assert!(error.to_string().contains("nothing of this experiment"), "{error}");
    }

    #[test]
    fn files_are_read_by_linux_guests_only() {
        let plan = catalogue::find("page-cache").unwrap();
        let error = Outcome::new(plan.clone(), Environment::default(), Vec::new()).unwrap_err().to_string();
        assert!(error.contains("--kernel"), "{error}");
        let mut linux = plan;
        linux.guest.kernel = Some("vmlinux".into());
        linux.engines = vec![Contender::Off];
        let (points, notes) = possible(&linux);
        match rustix::process::geteuid().is_root() {
            true => assert_eq!(points.len(), linux.variant.len(), "{notes:?}"),
            false => assert!(points.is_empty() && notes[0].contains("root"), "{notes:?}"),
        }
    }

    #[test]
    fn what_is_finished_is_not_run_again_and_more_than_is_wanted_is_not_shown() {
        let plan = Plan { repeat: 1, ..plan() };
        let points = possible(&plan).0;
        let trial = |repetition: u32, point: &Point| Trial {
            repetition,
            point: point.clone(),
            measured: Measured::default(),
            seconds: 0.0,
        };
        let finished: Vec<_> =
            (1..=2).flat_map(|n| points.iter().map(move |point| trial(n, point))).collect();
        let mut outcome = Outcome::new(plan, Environment::default(), finished).unwrap();
        assert_eq!((outcome.complete, outcome.trials.len()), (true, points.len()));
        outcome.go_on(None, &Watch::none(), &|_, point, _| panic!("{point} is run again")).unwrap();
    }
}
