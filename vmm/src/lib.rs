//! The `samepage` command: a file for each subcommand, which parses, calls and prints.
//!
//! The work is done below, in the crates it calls; `clap`, tables and the terminal are here and
//! nowhere else. Only `main.rs` may import this crate. It must not open `/dev/kvm`, map guest
//! memory or decide anything about a fleet.
//!
//! Begin with [`main`] below, then `power.rs` (a small command) and `run.rs` (the VM process, where
//! the merge agent joins the VM). `which.rs` has the arguments that name a guest, `choice.rs` those
//! with a list of values.

mod balloon;
mod balloon_table;
mod by_name;
mod checkpoint;
mod choice;
mod demo;
mod demo_clones;
mod demo_fleet;
mod doctor;
mod energy;
mod errors;
mod exec;
mod exit_status;
mod experiment;
mod firecracker;
mod fleet;
mod fleet_table;
mod host;
mod image;
mod jailer;
mod ledger_table;
mod measure;
mod output_file;
mod power;
mod progress;
mod run;
mod simulate;
mod simulate_table;
mod snapshot;
mod standby;
mod stress;
mod table;
mod top;
mod transfer;
mod walk;
mod which;

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use tracing::Level;

use errors::{help_with, say};
use machine::api::logger;

/// Launch guest VMs, merge the pages they have in common, and account for every frame
#[derive(Parser)]
#[command(name = "samepage", version, arg_required_else_help = true, propagate_version = true)]
#[command(
    after_help = "Begin with `samepage doctor` (what this host can do) and `samepage demo` (a fleet, merged and measured).
`samepage help COMMAND` has examples of each.

Exit status: 0 it worked; 1 it did not, and standard error says why; 2 the command line was wrong;
148 a VM's process made a system call that it does not need; 152 the config file of `samepage run` was wrong; 130 a second Control-C came before the first one had been dealt with.
A pipe that nothing reads any more (`| head`) changes none of these; standard output that cannot be written is a 1.

RUST_LOG=info (or debug) makes it say more."
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Doctor(doctor::Args),
    Demo(demo::Args),
    Run(Box<run::Args>),
    Firecracker(Box<by_name::Args>),
    Fleet(fleet::Args),
    Top(top::Args),
    Balloon(balloon::Args),
    Exec(exec::Args),
    Power(power::Args),
    Walk(walk::Args),
    Snapshot(snapshot::Args),
    Clone(snapshot::CloneArgs),
    Restore(checkpoint::Args),
    Send(transfer::SendArgs),
    Receive(transfer::ReceiveArgs),
    Host(host::Args),
    Image(image::Args),
    Simulate(simulate::Args),
    Stress(stress::Args),
    Measure(measure::Args),
    Energy(energy::Args),
    Experiment(experiment::Args),
    /// Restore the kernel's KSM settings once their owner is gone
    #[command(hide = true)]
    KsmGuard,
    /// Resume stopped processes once their owner is gone
    #[command(hide = true)]
    FreezeGuard {
        pids: Vec<u32>,
    },
}

/// Parses the command line, runs the command, prints what went wrong.
pub fn main() -> ExitCode {
    os::prepare();
    if let Some(handed) = run::Handed::parse(std::env::args_os()) {
        log();
        return ended(run::run_handed(&handed));
    }
    if let Some(args) = standby::Args::parse(std::env::args_os()) {
        log();
        return ended(standby::run(&args));
    }
    let arguments = match by_name::Name::of(std::env::args_os().collect()) {
        (Some(name), arguments) => {
            log();
            return by_name::main(name, arguments);
        }
        (None, arguments) => arguments,
    };
    let cli = match Cli::try_parse_from(arguments) {
        Ok(cli) => cli,
        Err(said) => return help_with(&said, None),
    };
    log();
    ended(match cli.command {
        Command::Doctor(args) => doctor::run(args),
        Command::Demo(args) => demo::run(args),
        Command::Run(args) => run::run(*args),
        Command::Firecracker(args) => by_name::run(*args),
        Command::Fleet(args) => fleet::run(args),
        Command::Top(args) => top::run(args),
        Command::Balloon(args) => balloon::run(args),
        Command::Exec(args) => exec::run(args),
        Command::Power(args) => power::run(args),
        Command::Walk(args) => walk::run(args),
        Command::Snapshot(args) => snapshot::run(args),
        Command::Clone(args) => snapshot::run_clone(args),
        Command::Send(args) => transfer::run_send(args),
        Command::Receive(args) => transfer::run_receive(args),
        Command::Restore(args) => checkpoint::run(args),
        Command::Host(args) => host::run(args),
        Command::Image(args) => image::run(args, programs::AGENT).map(|()| ExitCode::SUCCESS),
        Command::Simulate(args) => simulate::run(args),
        Command::Stress(args) => stress::run(args),
        Command::Measure(args) => measure::run(args),
        Command::Energy(args) => energy::run(args),
        Command::Experiment(args) => experiment::run(args),
        Command::KsmGuard => ksm_guard(),
        Command::FreezeGuard { pids } => freeze_guard(&pids),
    })
}

fn log() {
    let level = std::env::var("RUST_LOG").ok().and_then(|l| l.parse().ok()).unwrap_or(Level::WARN);
    logger::start(level);
}

/// The exit status of a command that ended so; an error is printed.
fn ended(result: anyhow::Result<ExitCode>) -> ExitCode {
    result.unwrap_or_else(|error| {
        say(&*error);
        exit_status::of(&error)
    })
}

fn ksm_guard() -> anyhow::Result<ExitCode> {
    merge::ksm::guard::run_on_stdin()?;
    Ok(ExitCode::SUCCESS)
}

fn freeze_guard(pids: &[u32]) -> anyhow::Result<ExitCode> {
    ::measure::freeze::guard(pids)?;
    Ok(ExitCode::SUCCESS)
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    /// An inconsistency aborts a debug build at the first call; a release build would silently
    /// misparse.
    #[test]
    fn the_command_line_is_consistent() {
        super::Cli::command().debug_assert();
    }
}
