//! The exit statuses of `samepage`, the same for every command.
//!
//! | status | reason |
//! |---|---|
//! | 0 | it worked |
//! | 1 | it did not |
//! | 2 | the command line was wrong: clap's own |
//! | 130 | a second signal came before the first was dealt with: `os::interrupt` |
//! | 152 | a VM's config file was wrong |
//! | 153 | the command line of `samepage firecracker` was wrong: `by_name.rs` |
//!
//! Which endings of a VM are failures, `run.rs` says.

use std::process::ExitCode;

use machine::api::{ApiError, EXIT_BAD_CONFIGURATION};

/// The status of a command that failed with `error`.
pub(crate) fn of(error: &anyhow::Error) -> ExitCode {
    match error.downcast_ref::<ApiError>() {
        Some(error) if error.is_bad_configuration() => ExitCode::from(EXIT_BAD_CONFIGURATION),
        _ => ExitCode::FAILURE,
    }
}
