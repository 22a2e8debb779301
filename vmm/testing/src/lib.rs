//! What the unit tests of several crates share: saying that a test was skipped, for what a test merely prints the harness
//! keeps to itself when it passes. Integration tests have their harness in `tests/src`.

use std::fmt::Display;
use std::io::Write;

/// Says on the terminal, past the harness's capture, that a test of `module` was skipped and why. `tests/run` counts these lines.
pub fn skipped(module: &str, why: impl Display) {
    // With standard error gone there is nothing to tell, and no reason to fail.
    let _ = writeln!(std::io::stderr(), "SKIPPED {module}: {why}");
}
