//! The engine in a process of its own, so that it can be killed.

use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use vmm::merge::Engine as _;
use vmm::merge::slab::engine::SlabEngine;

use super::choices::Choices;

/// The word on the command line that makes a process the engine.
pub const ROLE: &str = "engine";
/// What it says once it serves.
const READY: &str = "ready";
/// The longest wait before it is ended, or started again.
const PAUSE_MILLIS: u64 = 1500;

/// Is the engine, at `socket`, until standard input ends.
///
/// # Errors
/// It cannot be started.
pub fn serve(socket: PathBuf, hash_mask: u64) -> Result<()> {
    let mut engine = SlabEngine::new(socket).with_hash_mask(hash_mask);
    engine.start(&[])?;
    println!("{READY}");
    std::io::stdin().read_to_end(&mut Vec::new()).context("standard input")?;
    Ok(())
}

/// That process.
pub(super) struct Engine {
    program: PathBuf,
    socket: PathBuf,
    hash_mask: u64,
    child: Child,
    /// Closed, it ends the process.
    stdin: Option<ChildStdin>,
    restarts: u64,
}

impl Engine {
    pub(super) fn start(program: &Path, socket: &Path, hash_mask: u64) -> Result<Self> {
        let (child, stdin) = spawn(program, socket, hash_mask)?;
        let (program, socket) = (program.to_owned(), socket.to_owned());
        Ok(Self { program, socket, hash_mask, child, stdin, restarts: 0 })
    }

    pub(super) fn socket(&self) -> &Path {
        &self.socket
    }

    pub(super) fn restarts(&self) -> u64 {
        self.restarts
    }

    /// Ends and starts it some times, until `over`.
    pub(super) fn disturb(&mut self, choices: &mut Choices, over: &AtomicBool) -> Result<()> {
        for _ in 0..choices.below(4) {
            pause(choices, over);
            if let Some(status) = self.child.try_wait()? {
                bail!("has ended by itself: {status}");
            }
            match choices.below(4) {
                // In good order.
                0 => {
                    self.stdin = None;
                    let status = self.child.wait()?;
                    ensure!(status.success(), "ended with {status}");
                }
                killed => {
                    self.child.kill()?;
                    self.child.wait()?;
                    if killed == 1 {
                        pause(choices, over);
                    }
                }
            }
            (self.child, self.stdin) = spawn(&self.program, &self.socket, self.hash_mask)?;
            self.restarts += 1;
        }
        Ok(())
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn spawn(program: &Path, socket: &Path, hash_mask: u64) -> Result<(Child, Option<ChildStdin>)> {
    let mut child = Command::new(program)
        .args([ROLE.as_ref(), socket.as_os_str(), hash_mask.to_string().as_ref()])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot start {}", program.display()))?;
    let mut line = String::new();
    let stdout = child.stdout.take().context("standard output of the engine")?;
    BufReader::new(stdout).read_line(&mut line)?;
    ensure!(line.trim() == READY, "the engine did not start");
    let stdin = child.stdin.take();
    Ok((child, stdin))
}

/// Waits for a while, or until `over`.
fn pause(choices: &mut Choices, over: &AtomicBool) {
    let until = Instant::now() + Duration::from_millis(choices.below(PAUSE_MILLIS));
    while Instant::now() < until && !over.load(Ordering::Relaxed) {
        thread::sleep(Duration::from_millis(10));
    }
}
