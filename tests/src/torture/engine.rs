//! The engine in a process of its own, so that it can be killed.

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use merge::Engine as _;
use merge::slab::engine::{SlabEngine, Statistics};

use super::choices::Choices;

/// The word on the command line that makes a process the engine.
pub const ROLE: &str = "engine";
/// What it says once it serves.
const READY: &str = "ready";
/// How long agents may take to report to an engine that was just started.
const REPORTED: Duration = Duration::from_secs(10);
/// The longest wait before it is ended, or started again.
const PAUSE_MILLIS: u64 = 1500;

/// Is the engine, at `socket`, until standard input ends. Answers each line there with what is
/// known of merging.
///
/// # Errors
/// It cannot be started.
pub fn serve(socket: PathBuf, hash_mask: u64) -> Result<()> {
    let mut engine = SlabEngine::new(socket).with_hash_mask(hash_mask);
    engine.start(&[])?;
    println!("{READY}");
    for line in std::io::stdin().lines() {
        line.context("standard input")?;
        let statistics = engine.statistics().context("statistics")?;
        println!("{}", serde_json::to_string(&statistics)?);
    }
    Ok(())
}

/// That process.
pub(super) struct Engine {
    program: PathBuf,
    socket: PathBuf,
    hash_mask: u64,
    process: Process,
    restarts: u64,
}

struct Process {
    child: Child,
    /// Closed, it ends the process.
    stdin: Option<ChildStdin>,
    stdout: BufReader<ChildStdout>,
}

impl Engine {
    pub(super) fn start(program: &Path, socket: &Path, hash_mask: u64) -> Result<Self> {
        let process = Process::start(program, socket, hash_mask)?;
        let (program, socket) = (program.to_owned(), socket.to_owned());
        Ok(Self { program, socket, hash_mask, process, restarts: 0 })
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
            let Process { child, stdin, .. } = &mut self.process;
            if let Some(status) = child.try_wait()? {
                bail!("has ended by itself: {status}");
            }
            match choices.below(4) {
                // In good order.
                0 => {
                    *stdin = None;
                    let status = child.wait()?;
                    ensure!(status.success(), "ended with {status}");
                }
                killed => {
                    child.kill()?;
                    child.wait()?;
                    if killed == 1 {
                        pause(choices, over);
                    }
                }
            }
            self.process = Process::start(&self.program, &self.socket, self.hash_mask)?;
            self.restarts += 1;
        }
        Ok(())
    }

    /// The statistics of merging, once `guests` agents have reported, or will not soon.
    pub(super) fn statistics(&mut self, guests: usize) -> Result<Statistics> {
        let until = Instant::now() + REPORTED;
        loop {
            let Process { stdin, stdout, .. } = &mut self.process;
            writeln!(stdin.as_mut().context("the engine has ended")?)?;
            let mut line = String::new();
            stdout.read_line(&mut line)?;
            let statistics: Statistics = serde_json::from_str(&line)?;
            if statistics.guests.len() >= guests || Instant::now() > until {
                return Ok(statistics);
            }
            thread::sleep(Duration::from_millis(50));
        }
    }
}

impl Process {
    fn start(program: &Path, socket: &Path, hash_mask: u64) -> Result<Self> {
        let mut child = Command::new(program)
            .args([ROLE.as_ref(), socket.as_os_str(), hash_mask.to_string().as_ref()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot start {}", program.display()))?;
        let stdout = child.stdout.take().context("standard output of the engine")?;
        let mut process = Self { stdin: child.stdin.take(), stdout: BufReader::new(stdout), child };
        let mut line = String::new();
        process.stdout.read_line(&mut line)?;
        ensure!(line.trim() == READY, "the engine did not start");
        Ok(process)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Waits for a while, or until `over`.
fn pause(choices: &mut Choices, over: &AtomicBool) {
    let until = Instant::now() + Duration::from_millis(choices.below(PAUSE_MILLIS));
    while Instant::now() < until && !over.load(Ordering::Relaxed) {
        thread::sleep(Duration::from_millis(10));
    }
}
