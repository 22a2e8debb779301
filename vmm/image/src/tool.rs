//! Running the programs of others: to their end, or until the work is to stop.

use std::fs::File;
use std::io::{self, Read, Seek};
use std::process::{Command, ExitStatus, Stdio};
use std::time::Duration;

use super::progress::Progress;

const POLL: Duration = Duration::from_millis(20);

/// How a program ended.
pub(super) struct Ended {
    pub(super) status: ExitStatus,
    /// What it wrote to standard error.
    pub(super) words: String,
}

/// Runs `command`, whose standard output is `out`, and calls `look` every now and then. None if the
/// work is to stop; then the program was killed.
pub(super) fn run(
    command: &mut Command,
    out: Stdio,
    progress: &mut dyn Progress,
    mut look: impl FnMut(&mut dyn Progress),
) -> io::Result<Option<Ended>> {
    // A file and not a pipe: nothing reads a pipe while we poll.
    let mut words = tempfile::tempfile()?;
    let stderr: File = words.try_clone()?;
    let mut child = command.stdin(Stdio::null()).stdout(out).stderr(stderr).spawn()?;
    let status = loop {
        if progress.stopped() {
            // It may have ended by itself; either way it is gone after `wait`.
            let _ = child.kill();
            let _ = child.wait();
            return Ok(None);
        }
        if let Some(status) = child.try_wait()? {
            break status;
        }
        look(progress);
        std::thread::sleep(POLL);
    };
    let mut text = Vec::new();
    words.rewind()?;
    words.read_to_end(&mut text)?;
    Ok(Some(Ended { status, words: String::from_utf8_lossy(&text).into_owned() }))
}
