//! `samepage experiment report`: all results of files that `--results` wrote, side by side.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::bail;
use serde_json::json;

use super::table::{columns, dimensions, readable, spread};
use super::{figures, table};
use crate::output_file::{can_be_written, write};
use lab::experiment::journal;
use lab::experiment::run::Outcome;
use measure::html::{Item, Page, Section, Table};
use os::print::outln;

/// Columns of the terminal's table of an experiment that stand in the overview.
const OVERVIEW_FIGURES: usize = 4;

/// Show all results of a machine side by side, with what the papers report
#[derive(clap::Args)]
#[command(
    after_help = "Files are those that `samepage experiment run --results FILE` wrote; results of one plan on one machine are put together,
those of others stand by themselves. Nothing is measured.

Example:
  samepage experiment run shootdown --results all.jsonl
  samepage experiment run huge-pages --results all.jsonl
  samepage experiment report all.jsonl --html all.html"
)]
pub(super) struct Args {
    /// Files of results
    #[arg(required = true, value_name = "FILE")]
    files: Vec<PathBuf>,
    /// Print one JSON array, an object for each experiment
    #[arg(long)]
    json: bool,
    /// Write a self-contained HTML page
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
}

pub(super) fn run(args: &Args) -> anyhow::Result<ExitCode> {
    if let Some(path) = &args.html {
        can_be_written(path)?;
    }
    let mut recorded = Vec::new();
    for path in &args.files {
        journal::read_into(path, &mut recorded)?;
    }
    let outcomes: Vec<Outcome> = recorded.into_iter().map(Outcome::of).collect();
    if outcomes.is_empty() {
        bail!(
            "no result in {}: `samepage experiment run NAME --results FILE` writes them",
            names(&args.files)
        );
    }
    if let Some(path) = &args.html {
        write(path, &page(&outcomes).to_string())?;
    }
    if args.json {
        let all: Vec<_> = outcomes.iter().map(|outcome| json!(outcome)).collect();
        outln!("{}", serde_json::to_string(&all)?)?;
        return Ok(ExitCode::SUCCESS);
    }
    for outcome in &outcomes {
        outln!("{}", table::outcome(outcome))?;
        if !outcome.plan.published.is_empty() {
            outln!("published: {}", outcome.plan.published)?;
        }
        outln!("")?;
    }
    Ok(ExitCode::SUCCESS)
}

fn names(files: &[PathBuf]) -> String {
    files.iter().map(|path| Path::display(path).to_string()).collect::<Vec<_>>().join(", ")
}

fn page(outcomes: &[Outcome]) -> Page {
    let mut sections = vec![overview(outcomes)];
    for outcome in outcomes {
        sections.extend(figures::sections(outcome).into_iter().map(|section| Section {
            heading: format!("{}: {}", outcome.plan.name, section.heading),
            ..section
        }));
    }
    let machines =
        outcomes.iter().map(|outcome| outcome.environment.line()).collect::<std::collections::BTreeSet<_>>();
    Page { title: "Experiments".into(), lead: machines.into_iter().collect::<Vec<_>>().join(" | "), sections }
}

/// A row for each point: what it is, its first figures, and what was published.
fn overview(outcomes: &[Outcome]) -> Section {
    let rows = outcomes.iter().flat_map(|outcome| {
        let dimensions = dimensions(&outcome.summary);
        outcome.summary.iter().map(move |summary| {
            let figures = columns(outcome.plan.kind).iter().filter_map(|name| {
                let (label, factor) = readable(name);
                Some(format!("{label}: {}", spread(summary.figures.get(*name)?, factor)))
            });
            let point: Vec<String> = dimensions.iter().map(|(_, of)| of(summary)).collect();
            vec![
                outcome.plan.name.clone(),
                point.join(", "),
                figures.take(OVERVIEW_FIGURES).collect::<Vec<_>>().join("; "),
                outcome.plan.published.clone(),
                outcome.plan.source.clone(),
            ]
        })
    });
    let header = ["experiment", "point", "here", "published", "by"].map(String::from).to_vec();
    Section {
        heading: "All results".into(),
        text: "Medians, with minimum and maximum where they differ. What was published was measured on other machines and with other guests: it says where the bar is, and is not \
               comparable number by number."
            .into(),
        items: vec![Item::Table(Table { header, rows: rows.collect() })],
    }
}
