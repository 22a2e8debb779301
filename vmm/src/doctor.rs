//! `samepage doctor`: what this host offers, what works, and what to change.

mod finding;
mod host;
mod kernel;
mod kvm;

use std::fmt;
use std::process::ExitCode;

use clap::Args as ClapArgs;
use finding::{Feature, Finding, Level};
use os::print::outln;
use serde::Serialize;

/// Look at this host: which KVM, kernel features and limits; what works here and what to change
#[derive(Debug, ClapArgs)]
#[command(after_help = "Examples:
  samepage doctor          a line for each thing looked at, then what works here
  samepage doctor --json   the same for programs

Changes nothing. The exit status is 1 if no guest can run here.")]
pub(super) struct Args {
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// Prints the findings; fails if no guest can run.
pub(super) fn run(args: Args) -> anyhow::Result<ExitCode> {
    let diagnosis = Diagnosis::of_this_host();
    if args.json {
        outln!("{}", serde_json::to_string_pretty(&diagnosis)?)?;
    } else {
        outln!("{diagnosis}")?;
    }
    Ok(if diagnosis.guests_run { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// The whole report.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Diagnosis {
    /// Short name of the KVM backend.
    pub backend: &'static str,
    pub findings: Vec<Finding>,
    /// KVM's capabilities, if it can be opened.
    pub kvm: Option<machine::probe::Capabilities>,
    /// What works.
    pub features: Vec<Feature>,
    /// Whether any guest can run.
    pub guests_run: bool,
}

impl Diagnosis {
    fn of_this_host() -> Self {
        let kvm = kvm::look();
        let kernel = kernel::look();
        let guests_run = kvm.trouble.is_none();
        let features = vec![
            Feature { name: "built-in guests", works: guests_run, why: kvm.trouble.clone() },
            kvm.linux_guests(),
            kernel.slab_engine(),
            kernel.ksm_engine(),
            kernel.exact_frames(),
        ];
        let mut findings = kvm.findings;
        findings.extend(kernel.findings);
        findings.extend(host::look());
        Self {
            backend: machine::probe::backend_name(),
            findings,
            kvm: kvm.capabilities,
            features,
            guests_run,
        }
    }
}

impl fmt::Display for Diagnosis {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for finding in &self.findings {
            let mark = match finding.level {
                Level::Ok => "ok",
                Level::Limited => "limited",
                Level::Missing => "missing",
            };
            writeln!(f, "{mark:<8} {:<20} {}", finding.name, finding.found)?;
            if let Some(change) = &finding.change {
                writeln!(f, "{:<29} -> {change}", "")?;
            }
        }
        writeln!(f)?;
        for feature in &self.features {
            let mark = if feature.works { "works" } else { "no" };
            write!(f, "{mark:<8} {}", feature.name)?;
            match &feature.why {
                Some(why) => writeln!(f, ": {why}")?,
                None => writeln!(f)?,
            }
        }
        writeln!(f)?;
        if self.guests_run {
            write!(f, "Guests run here ({}). Try: samepage demo", self.backend)
        } else {
            write!(
                f,
                "No guest can run here: /dev/kvm is unusable. In a source tree, tests/lab runs any command of \
                 Samepage on an emulated processor that has nested paging."
            )
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_host_is_diagnosed() {
        let diagnosis = Diagnosis::of_this_host();
        let text = diagnosis.to_string();
        for finding in &diagnosis.findings {
            assert!(text.contains(finding.name), "{text}");
            assert_eq!(finding.change.is_none(), finding.level == Level::Ok, "{finding:?}");
        }
        assert_eq!(diagnosis.guests_run, diagnosis.kvm.is_some(), "{text}");
        assert_eq!(diagnosis.features[0].works, diagnosis.guests_run);
        serde_json::to_value(&diagnosis).unwrap();
    }

    #[test]
    fn a_host_without_kvm_is_told_of_the_lab() {
        let none = Diagnosis { guests_run: false, kvm: None, ..Diagnosis::of_this_host() };
        assert!(none.to_string().contains("tests/lab"));
    }
}
