//! `samepage power`: off, button.

use std::process::ExitCode;
use std::time::Duration;

use clap::Subcommand;
use indicatif::ProgressBar;

use super::progress::{draw_target, interrupt_flag, is_set};
use super::which::Which;
use fleet::power::power_off;
use fleet::power::press_power_button;
use fleet::shutdown::DEFAULT_LIMIT;
use fleet::target::Target;
use os::print::{errln, outln};

/// Power a guest off in good order, or press its power button
#[derive(clap::Args)]
#[command(after_help = "Examples:
  samepage power off web-0                  asked by its power button and by COM2; cut off after 30 s
  samepage power off web-0 --timeout 120
  samepage power button ./vm.sock           only press: what follows is up to the guest

GUEST is a guest of the fleet that is up (or of --name FLEET), or the path of a control socket made by
`samepage run --control`, which has a / in it.")]
pub(super) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Ask a guest to power off, and wait; cut it off after the timeout
    #[command(
        after_help = "The exit status is 1 if the guest was cut off: data not yet written to its drives is lost.

Examples:
  samepage power off web-0
  samepage power off ./vm.sock --timeout 5"
    )]
    Off {
        #[command(flatten)]
        which: Which,
        /// Time limit for the guest
        #[arg(long, value_name = "SECONDS", default_value_t = DEFAULT_LIMIT.as_secs(), value_parser = clap::value_parser!(u64).range(1..=86_400))]
        timeout: u64,
    },
    /// Press the ACPI power button
    #[command(
        after_help = "The exit status is 1 if the guest has no driver for it (in Linux, the module button). A driver loaded later still
sees the press.

Examples:
  samepage power button web-0
  samepage power button ./vm.sock"
    )]
    Button {
        #[command(flatten)]
        which: Which,
    },
}

pub(super) fn run(args: Args) -> anyhow::Result<ExitCode> {
    match args.command {
        Command::Off { which, timeout } => off(&which.find()?, Duration::from_secs(timeout)),
        Command::Button { which } => button(&which.find()?),
    }
}

fn off(target: &Target, limit: Duration) -> anyhow::Result<ExitCode> {
    let interrupted = interrupt_flag()?;
    let bar = ProgressBar::with_draw_target(None, draw_target());
    let ended = power_off(target, limit, &mut |left| {
        let (seconds, guest) = (left.as_secs(), &target.guest);
        bar.set_message(format!("{seconds} s for {guest} to power off (Control-C cuts it off)"));
        bar.tick();
        !is_set(&interrupted)
    })?;
    bar.finish_and_clear();
    if ended {
        outln!("{} has powered off", target.guest)?;
        return Ok(ExitCode::SUCCESS);
    }
    let why = match is_set(&interrupted) {
        true => "as requested".into(),
        false => format!("it did not power off within {} s", limit.as_secs()),
    };
    errln!("error: {} was cut off: {why}; data not yet written to its drives is lost", target.guest);
    Ok(ExitCode::FAILURE)
}

fn button(target: &Target) -> anyhow::Result<ExitCode> {
    if press_power_button(target)? {
        outln!("{}: pressed", target.guest)?;
        return Ok(ExitCode::SUCCESS);
    }
    errln!(
        "error: {}: pressed, but the guest has no driver for it (in Linux, the module button)",
        target.guest
    );
    Ok(ExitCode::FAILURE)
}
