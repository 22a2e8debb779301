//! The nested-paging lab, for tests: see `tests/lab`.

use std::ffi::{OsStr, OsString};
use std::path::PathBuf;
use std::time::Duration;

use crate::run::{Outcome, Run};

/// Runs a command in the lab, for at most `limit` on an idle machine, boot included.
///
/// # Panics
/// If the lab cannot be started at all; the lab's own failures are statuses 123 to 125.
pub fn lab_run(limit: Duration, command: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Outcome {
    run(2, limit, command)
}

/// As [`lab_run`], with one processor: for guests whose memory is given back while they run.
///
/// With more, QEMU 7.2 emulates them by as many threads, and about every fifth Linux guest ends in
/// a triple fault while the lab's kernel drops pages of it, QEMU's own guests too. The built-in
/// guest, merged by KSM, hung once in eight runs.
///
/// # Panics
/// As [`lab_run`].
pub fn lab_run_on_one(limit: Duration, command: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Outcome {
    run(1, limit, command)
}

/// As [`lab_run`], with so many NUMA nodes, each with a processor of its own.
///
/// # Panics
/// As [`lab_run`].
pub fn lab_run_on_nodes(
    nodes: u8,
    limit: Duration,
    command: impl IntoIterator<Item = impl AsRef<OsStr>>,
) -> Outcome {
    let which = ["-c".into(), nodes.to_string(), "-n".into(), nodes.to_string()];
    start(which.map(OsString::from).into(), limit, command)
}

fn run(cpus: u8, limit: Duration, command: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Outcome {
    let which = vec!["-c".into(), cpus.to_string().into()];
    start(which, limit, command)
}

/// The limits of tests are what a machine needs that does nothing else. They are there to end what
/// hangs, and a test does not depend on how busy the machine is.
const PATIENCE: u32 = 4;

fn start(
    which: Vec<OsString>,
    limit: Duration,
    command: impl IntoIterator<Item = impl AsRef<OsStr>>,
) -> Outcome {
    let limit = limit * PATIENCE;
    let mut args = which;
    args.extend(["-t".into(), limit.as_secs().to_string().into(), "--".into()]);
    args.extend(command.into_iter().map(|word| word.as_ref().to_owned()));
    // The lab ends itself; the rest is for provisioning it.
    let lab = Run::program(crate::workspace().join("tests/lab"), args);
    lab.timeout(limit + Duration::from_secs(300)).output()
}

/// Runs a shell script in the lab, on one processor; it ends at the first command that fails, and
/// shows each.
///
/// # Panics
/// As [`lab_run`].
#[must_use]
pub fn lab_script(limit: Duration, script: &str) -> Outcome {
    lab_run_on_one(limit, ["bash", "-euxo", "pipefail", "-c", script])
}

/// Where Linux images for the lab are kept: a directory of this user's cache.
#[must_use]
pub fn image_dir() -> PathBuf {
    let home = std::env::var_os("HOME").map_or_else(|| "/root".into(), PathBuf::from);
    std::env::var_os("XDG_CACHE_HOME")
        .map_or_else(|| home.join(".cache"), PathBuf::from)
        .join("samepage/images/latest")
}

/// Runs a shell script in the lab with an emulated Intel processor, as [`lab_script`] does; by
/// busybox' shell, with these files.
///
/// # Panics
/// As [`lab_run`].
#[must_use]
pub fn lab_vmx_script(limit: Duration, files: &[PathBuf], script: &str) -> Outcome {
    let mut which = vec!["--vmx".into()];
    for file in files {
        which.extend(["-f".into(), file.clone().into_os_string()]);
    }
    start(which, limit, ["sh", "-euxo", "pipefail", "-c", script])
}
