//! What the integration tests and the benches stand on: running the `samepage` binary, the nested-paging lab, and
//! the architecture invariants as code.

pub mod tidy;

use std::path::Path;

/// The workspace's root.
#[must_use]
pub fn workspace() -> &'static Path {
    let tests = Path::new(env!("CARGO_MANIFEST_DIR"));
    tests.parent().unwrap_or(tests)
}
