//! A VM process that stands by, for a daemon with a pool. Hidden: only a daemon starts one.

use std::ffi::OsString;
use std::process::ExitCode;

use anyhow::Context;
use clap::Parser;
use machine::standby::stand_by;
use memory::own;
use os::handed;

use super::run;

/// Its command line. The rest is room for what it shows once it is a VM.
#[derive(clap::Parser)]
#[command(disable_help_flag = true, disable_version_flag = true)]
pub(super) struct Args {
    #[arg(long)]
    link_fd: i32,
    #[arg(long, allow_hyphen_values = true)]
    oom_score_adj: i16,
    _room: String,
}

impl Args {
    /// From the command line, if it is such a one.
    pub(super) fn parse(mut words: impl Iterator<Item = OsString>) -> Option<Self> {
        let program = words.next()?;
        let is_standby = words.next()? == machine::standby::COMMAND;
        is_standby.then(|| Self::try_parse_from(std::iter::once(program).chain(words)).ok())?
    }
}

pub(super) fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let link = handed::take(args.link_fd).context("cannot take the socket of the daemon")?;
    // As its daemon it would be the last to be ended for want of memory.
    own::set_oom_score_adj(args.oom_score_adj).context("cannot set oom_score_adj")?;
    let Some(chosen) = stand_by(link)? else { return Ok(ExitCode::SUCCESS) };
    let config = chosen.config().clone();
    run::prepare(&config)?;
    let ending = chosen.run().with_context(|| format!("{} did not start", config.name))?;
    Ok(run::status(&config.name, false, ending))
}
