//! Shared by the unit tests of several crates: reports a skipped test, as the harness hides the
//! output of a test that passes. Integration tests have their harness in `tests/src`.

use std::fmt::Display;
use std::io::Write;

/// Reports on the terminal, past the harness's capture, that a test of `module` was skipped and
/// why. `tests/run` counts these lines.
pub fn skipped(module: &str, why: impl Display) {
    // Without standard error there is nothing to report to, and no reason to fail.
    let _ = writeln!(std::io::stderr(), "SKIPPED {module}: {why}");
}
