//! Names and paths in a fleet file.

use std::path::{Path, PathBuf};

use super::{MAX_NAME_BYTES, SpecError};

/// A path as a file in `dir` gives it: relative to that, or in the home directory.
pub fn resolve(path: &Path, dir: &Path) -> PathBuf {
    match (path.strip_prefix("~"), std::env::var_os("HOME")) {
        (Ok(rest), Some(home)) => Path::new(&home).join(rest),
        _ => dir.join(path),
    }
}

/// Whether it can be the name of a fleet, a guest or a domain.
pub(crate) fn check_name(name: &str) -> Result<(), SpecError> {
    let allowed = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
    match !name.is_empty() && name.len() <= MAX_NAME_BYTES && name.chars().all(allowed) {
        true => Ok(()),
        false => Err(SpecError::Name(name.into())),
    }
}
