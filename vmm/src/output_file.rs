//! Files that reports go to.

use std::path::Path;

use anyhow::Context;
use os::named_file;

/// Hours of measuring must not end at a directory that is not there.
pub(super) fn can_be_written(path: &Path) -> anyhow::Result<()> {
    named_file::writable(path).map(drop).with_context(|| format!("cannot write {}", path.display()))
}

pub(super) fn write(path: &Path, text: &str) -> anyhow::Result<()> {
    named_file::write(path, text.as_bytes()).with_context(|| format!("cannot write {}", path.display()))
}
