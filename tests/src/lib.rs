//! What the integration tests and the benches stand on: running the `samepage` binary and seeing
//! what it leaves behind, the nested-paging lab, and the architecture invariants as code.
//!
//! It may import everything, and nothing may import it; what it says of the program it says of the
//! binary, run as its users run it. Begin with [`sandbox`] (a place of its own for each test, and
//! what was left behind in it), then [`run`] and [`lab`]. [`tidy`] is the house rules, [`torture`]
//! the long test of merging.

pub mod api;
pub mod bench;
pub mod boot;
pub mod code;
pub mod documents;
pub mod host;
pub mod huge_pages;
pub mod keeper;
pub mod lab;
pub mod linux_bench;
pub mod merging;
pub mod open_metrics;
pub mod peer;
pub mod reclaiming;
pub mod results;
pub mod run;
pub mod sandbox;
pub mod saved;
pub mod terminal;
pub mod tidy;
pub mod torture;
pub mod vm;
pub mod zram;

use std::path::{Path, PathBuf};

#[must_use]
pub fn workspace() -> &'static Path {
    let tests = Path::new(env!("CARGO_MANIFEST_DIR"));
    tests.parent().unwrap_or(tests)
}

/// The `samepage` binary under test: `$SAMEPAGE_BIN`, or the release build of this workspace.
///
/// # Panics
/// If there is none: tests of something else would be worse than none.
#[must_use]
pub fn samepage() -> PathBuf {
    let binary = std::env::var_os("SAMEPAGE_BIN").map_or_else(built, PathBuf::from);
    assert!(
        binary.is_file(),
        "no samepage binary at {}: build it with `cargo build --release -p vmm`, or set SAMEPAGE_BIN",
        binary.display()
    );
    binary
}

/// `release/samepage` in the target directory that holds this test.
fn built() -> PathBuf {
    target().join("release/samepage")
}

/// The target directory that holds this test.
pub(crate) fn target() -> PathBuf {
    let this = std::env::current_exe().unwrap_or_default();
    let target = this.ancestors().find(|d| d.join("CACHEDIR.TAG").is_file());
    target.map_or_else(|| workspace().join("target"), Path::to_path_buf)
}
