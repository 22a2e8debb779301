//! Booting a Linux guest, measured from outside: how long until its /init speaks, and what the VMM
//! itself holds in memory then. The same for any VMM that puts the guest's console on its stdout.

mod smaps;

use std::ffi::OsString;
use std::io::{BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use crate::peer::Process;
use anyhow::{Context, Result, bail};

pub use smaps::overhead_bytes;

/// What the guest's /init says first.
pub const FIRST_LINE: &str = "samepage agent: init";
/// A boot that takes longer has failed.
const LIMIT: Duration = Duration::from_secs(60);

/// One boot of one guest.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Boot {
    /// From exec of the VMM to [`FIRST_LINE`] on its stdout.
    pub seconds: f64,
    /// Proportional set size of everything but the guest's RAM, when that line came.
    pub overhead_bytes: u64,
}

/// Boots a guest once, measures, and kills it.
///
/// `memory_bytes` is the guest's RAM, which tells its mapping from the VMM's own.
///
/// # Errors
/// The VMM does not start, ends early, takes longer than a minute, or its memory cannot be told
/// apart.
pub fn boot(command: &[OsString], memory_bytes: u64) -> Result<Boot> {
    let [program, args @ ..] = command else { bail!("no command to boot with") };
    let mut command = Command::new(program);
    command.args(args).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::inherit()).process_group(0);
    let started = Instant::now();
    let mut vmm = Process(command.spawn().with_context(|| format!("cannot start {}", program.display()))?);
    let stdout = vmm.0.stdout.take().context("no stdout to read the console from")?;
    let (send, console) = mpsc::channel();
    thread::spawn(move || {
        for line in BufReader::new(stdout).split(b'\n').map_while(Result::ok) {
            // The bench no longer listens once it has what it wants.
            let _ = send.send((Instant::now(), String::from_utf8_lossy(&line).into_owned()));
        }
    });
    let mut last = String::from("nothing");
    loop {
        let left = LIMIT.saturating_sub(started.elapsed());
        match console.recv_timeout(left) {
            Ok((when, line)) if line.contains(FIRST_LINE) => {
                let overhead_bytes = overhead_bytes(vmm.0.id(), memory_bytes)?;
                return Ok(Boot { seconds: (when - started).as_secs_f64(), overhead_bytes });
            }
            Ok((_, line)) => last = line,
            Err(_) => {
                let seconds = started.elapsed().as_secs_f64();
                bail!(
                    "{} did not get to '{FIRST_LINE}' in {seconds:.1} s; its last line: {last}",
                    program.display()
                )
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vmm_that_ends_early_is_an_error() {
        let command = ["sh", "-c", "echo no kernel"].map(OsString::from);
        let error = boot(&command, 1 << 20).unwrap_err().to_string();
        assert!(error.contains("no kernel"), "{error}");
    }
}
