//! What is said of an error.

use std::error::Error;
use std::io;
use std::process::ExitCode;

use os::limits;
use os::print::{errln, out};

/// Help and versions are results; anything else that clap says is an error in the command line,
/// whose status is `wrong` or clap's own.
pub(super) fn help_with(said: &clap::Error, wrong: Option<u8>) -> ExitCode {
    if said.use_stderr() {
        errln!("{}", said.render().to_string().trim_end());
        return ExitCode::from(wrong.unwrap_or(said.exit_code().clamp(0, 255) as u8));
    }
    match out!("{}", said.render()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            say(&error as &dyn Error);
            ExitCode::FAILURE
        }
    }
}

/// An error with its causes, and what to do where a limit of this process is the cause.
pub(super) fn say(error: &(dyn Error + 'static)) {
    errln!("error: {error}");
    let mut cause = error.source();
    let mut advice = None;
    while let Some(error) = cause {
        errln!("  because: {error}");
        advice = advice.or_else(|| limits::advice(error.downcast_ref::<io::Error>()?));
        cause = error.source();
    }
    if let Some(advice) = advice {
        errln!("  {advice}");
    }
}
