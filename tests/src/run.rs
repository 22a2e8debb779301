//! One command, run with a time limit and captured; whatever happens, its process group ends with
//! it.

use std::ffi::OsStr;
use std::fs;
use std::io::Read;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process, kill_process_group};

/// How often a waiting test looks.
const LOOK: Duration = Duration::from_millis(10);
/// How long output may still come after the end of the process that was started.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// A command to run. It gets no standard input and a process group of its own.
pub struct Run {
    command: Command,
    limit: Duration,
}

/// A command that runs. Dropped, it takes its process group with it.
pub struct Running {
    child: Child,
    line: String,
    started: Instant,
    limit: Duration,
    stdout: Captured,
    stderr: Captured,
}

/// What a command did.
#[derive(Debug)]
pub struct Outcome {
    /// The command line, for messages.
    pub line: String,
    /// The exit status, if it was not a signal that ended the command.
    pub code: Option<i32>,
    /// The signal that ended the command.
    pub signal: Option<i32>,
    pub stdout: String,
    /// What it complained about.
    pub stderr: String,
    /// From start to end.
    pub took: Duration,
}

impl Run {
    /// This program with these arguments, and 60 seconds for it.
    pub fn program(program: impl AsRef<Path>, args: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Self {
        let mut command = Command::new(program.as_ref());
        command.args(args);
        Self { command, limit: Duration::from_secs(60) }
    }

    /// How long it may take.
    #[must_use]
    pub fn timeout(mut self, limit: Duration) -> Self {
        self.limit = limit;
        self
    }

    /// Sets a variable of its environment.
    #[must_use]
    pub fn env(mut self, key: &str, value: impl AsRef<OsStr>) -> Self {
        self.command.env(key, value);
        self
    }

    /// Starts it.
    ///
    /// # Panics
    /// If it cannot be started.
    #[must_use]
    pub fn start(mut self) -> Running {
        let line = format!("{:?}", self.command);
        self.command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).process_group(0);
        let mut child = self.command.spawn().unwrap_or_else(|error| panic!("cannot start {line}: {error}"));
        let stdout = Captured::from(child.stdout.take());
        let stderr = Captured::from(child.stderr.take());
        Running { child, line, started: Instant::now(), limit: self.limit, stdout, stderr }
    }

    /// Runs it to its end.
    ///
    /// # Panics
    /// If it cannot be started, or takes longer than its limit.
    #[must_use]
    pub fn output(self) -> Outcome {
        self.start().wait()
    }
}

impl Running {
    /// The process that was started; also the number of its process group.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Resident memory in KiB.
    ///
    /// # Panics
    /// If it is gone.
    #[must_use]
    #[track_caller]
    pub fn rss_kib(&self) -> u64 {
        let path = format!("/proc/{}/status", self.pid());
        let status = fs::read_to_string(&path).unwrap_or_else(|e| panic!("{path}: {e}"));
        let line = status.lines().find_map(|l| l.strip_prefix("VmRSS:"));
        let number = line.and_then(|l| l.split_whitespace().next()?.parse().ok());
        number.unwrap_or_else(|| panic!("no VmRSS in {status}"))
    }

    /// Sends a signal to the process alone, as `kill PID` does.
    pub fn kill(&self, signal: Signal) {
        // A process that is gone already is what the caller wants.
        let _ = kill_process(Pid::from_child(&self.child), signal);
    }

    /// Sends a signal to the whole process group, as Ctrl-C on a terminal does.
    pub fn kill_group(&self, signal: Signal) {
        let _ = kill_process_group(Pid::from_child(&self.child), signal);
    }

    /// What it has complained about so far.
    #[must_use]
    pub fn stderr_so_far(&self) -> String {
        self.stderr.text()
    }

    /// What it has printed so far.
    #[must_use]
    pub fn stdout_so_far(&self) -> String {
        self.stdout.text()
    }

    /// Whether it still runs.
    pub fn is_running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// Waits for its end.
    ///
    /// # Panics
    /// If it takes longer than its limit.
    #[must_use]
    pub fn wait(mut self) -> Outcome {
        let status = loop {
            match self.child.try_wait() {
                Ok(Some(status)) => break status,
                Ok(None) if self.started.elapsed() < self.limit => thread::sleep(LOOK),
                Ok(None) => {
                    let (out, err) = (self.stdout.text(), self.stderr.text());
                    panic!("{} still ran after {:?}\nstdout:\n{out}\nstderr:\n{err}", self.line, self.limit);
                }
                Err(error) => panic!("cannot wait for {}: {error}", self.line),
            }
        };
        let took = self.started.elapsed();
        // A daemon that the command left may hold the pipes open: that must not hold up the test.
        let until = Instant::now() + LAST_WORDS;
        while Instant::now() < until && !(self.stdout.is_complete() && self.stderr.is_complete()) {
            thread::sleep(LOOK);
        }
        self.outcome(status, took)
    }

    fn outcome(&self, status: ExitStatus, took: Duration) -> Outcome {
        Outcome {
            line: self.line.clone(),
            code: status.code(),
            signal: status.signal(),
            stdout: self.stdout.text(),
            stderr: self.stderr.text(),
            took,
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.kill_group(Signal::KILL);
        // Its end is certain; how it ended does not matter here.
        let _ = self.child.wait();
    }
}

impl Outcome {
    /// Itself, if the command succeeded.
    ///
    /// # Panics
    /// If it did not: with everything it said.
    #[must_use]
    #[track_caller]
    pub fn success(self) -> Self {
        assert_eq!(self.code, Some(0), "{self}");
        self
    }

    /// Its stdout as one JSON value.
    ///
    /// # Panics
    /// If it is not that.
    #[must_use]
    #[track_caller]
    pub fn json(&self) -> serde_json::Value {
        serde_json::from_str(&self.stdout).unwrap_or_else(|error| panic!("not JSON: {error}\n{self}"))
    }
}

impl std::fmt::Display for Outcome {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { line, code, signal, stdout, stderr, took } = self;
        write!(
            f,
            "{line}: status {code:?}, signal {signal:?}, {took:?}\nstdout:\n{stdout}\nstderr:\n{stderr}"
        )
    }
}

/// What has come out of a pipe so far.
#[derive(Clone, Default)]
struct Captured {
    bytes: Arc<Mutex<Vec<u8>>>,
    /// Held by the reading thread alone once the pipe is open, so that its end can be seen.
    reading: Arc<()>,
}

impl Captured {
    fn from(pipe: Option<impl Read + Send + 'static>) -> Self {
        let captured = Self::default();
        if let Some(mut pipe) = pipe {
            let Self { bytes, reading } = captured.clone();
            thread::spawn(move || {
                let mut buffer = [0; 4096];
                while let Ok(count @ 1..) = pipe.read(&mut buffer) {
                    os::lock(&bytes).extend_from_slice(&buffer[..count]);
                }
                drop(reading);
            });
        }
        captured
    }

    fn is_complete(&self) -> bool {
        Arc::strong_count(&self.reading) == 1
    }

    fn text(&self) -> String {
        String::from_utf8_lossy(&os::lock(&self.bytes)).into_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sh(script: &str) -> Run {
        Run::program("sh", ["-c", script])
    }

    #[test]
    fn output_and_status_are_captured() {
        let outcome = sh("echo out; echo err >&2; exit 3").output();
        assert_eq!(
            (outcome.code, outcome.stdout.as_str(), outcome.stderr.as_str()),
            (Some(3), "out\n", "err\n")
        );
    }

    #[test]
    fn a_signal_is_reported() {
        let running = sh("sleep 60").start();
        running.kill_group(Signal::TERM);
        assert_eq!(running.wait().signal, Some(15));
    }

    #[test]
    #[should_panic(expected = "still ran")]
    fn time_is_limited() {
        let _ = sh("sleep 60").timeout(Duration::from_millis(50)).output();
    }
}
