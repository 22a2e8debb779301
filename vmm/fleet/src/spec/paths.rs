//! Paths in a fleet file.

use std::path::{Path, PathBuf};

/// What stands for a guest's number among those of one `count`.
pub(super) const NUMBER: &str = "{n}";

/// A path as a file in `dir` gives it: relative to that, or in the home directory.
pub fn resolve(path: &Path, dir: &Path) -> PathBuf {
    match (path.strip_prefix("~"), std::env::var_os("HOME")) {
        (Ok(rest), Some(home)) => Path::new(&home).join(rest),
        _ => dir.join(path),
    }
}

/// The path of guest number `n`, as a file in `dir` gives it.
pub(super) fn numbered(path: &Path, n: usize, dir: &Path) -> PathBuf {
    let path = match path.to_str() {
        Some(text) if text.contains(NUMBER) => text.replace(NUMBER, &n.to_string()).into(),
        _ => path.to_owned(),
    };
    resolve(&path, dir)
}
