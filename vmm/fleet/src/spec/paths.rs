//! Paths in a fleet file.

use std::path::{Path, PathBuf};

/// A path as a file in `dir` gives it: relative to that, or in the home directory.
pub fn resolve(path: &Path, dir: &Path) -> PathBuf {
    match (path.strip_prefix("~"), std::env::var_os("HOME")) {
        (Ok(rest), Some(home)) => Path::new(&home).join(rest),
        _ => dir.join(path),
    }
}
