//! A place of its own for each test, and what a command has left behind in it.

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

use crate::host::KsmSettings;
use crate::run::Run;

/// The variable that says where `samepage` keeps its sockets; every process of a sandbox carries
/// it.
const RUNTIME_DIR: &str = "SAMEPAGE_RUNTIME_DIR";
/// The variable that says where it keeps checkpoints.
const STORE_DIR: &str = "SAMEPAGE_STORE_DIR";

/// A runtime directory and a directory for files. Dropped, it kills every process that was started
/// in it.
pub struct Sandbox {
    runtime: TempDir,
    files: TempDir,
    /// Where the test is the only user of KSM.
    ksm: Option<KsmSettings>,
}

/// A process of a sandbox.
#[derive(Debug, Clone)]
pub struct Process {
    /// Its number.
    pub pid: i32,
    /// Its arguments, with spaces between.
    pub args: String,
}

impl Process {
    /// Kills it at once, as the out-of-memory killer does.
    pub fn kill(&self) {
        if let Some(pid) = Pid::from_raw(self.pid) {
            // A process that is gone already is what the caller wants.
            let _ = kill_process(pid, Signal::KILL);
        }
    }
}

impl Default for Sandbox {
    fn default() -> Self {
        Self::new()
    }
}

impl Sandbox {
    /// An empty one.
    ///
    /// # Panics
    /// If no temporary directory can be made.
    #[must_use]
    pub fn new() -> Self {
        let made = || tempfile::tempdir().expect("a temporary directory");
        Self { runtime: made(), files: made(), ksm: KsmSettings::if_held() }
    }

    /// A path for a file of this test.
    #[must_use]
    pub fn file(&self, name: &str) -> PathBuf {
        self.files.path().join(name)
    }

    /// Where `samepage` keeps its sockets.
    #[must_use]
    pub fn runtime_dir(&self) -> &Path {
        self.runtime.path()
    }

    /// Where it keeps checkpoints.
    #[must_use]
    pub fn store_dir(&self) -> PathBuf {
        self.file("checkpoints")
    }

    /// `samepage` with these arguments, in this sandbox.
    pub fn samepage(&self, args: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Run {
        Run::program(crate::samepage(), args)
            .env(RUNTIME_DIR, self.runtime.path())
            .env(STORE_DIR, self.store_dir())
            .env("NO_COLOR", "1")
    }

    /// The program by a link that is called `firecracker`.
    ///
    /// # Panics
    /// If the link cannot be made.
    pub fn firecracker(&self, args: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Run {
        let link = self.file("firecracker");
        if !link.exists() {
            std::os::unix::fs::symlink(crate::samepage(), &link).expect("a link");
        }
        Run::program(link, args).env(RUNTIME_DIR, self.runtime.path()).env("NO_COLOR", "1")
    }

    /// A shell on a script in which `$SAMEPAGE` is the program, and `$DIR` is a directory for files
    /// of this test.
    pub fn shell(&self, script: &str) -> Run {
        Run::program("bash", ["--norc", "-c", script])
            .env("SAMEPAGE", crate::samepage())
            .env("DIR", self.files.path())
            .env(RUNTIME_DIR, self.runtime.path())
            .env(STORE_DIR, self.store_dir())
            .env("NO_COLOR", "1")
    }

    /// The processes that run in it, whatever their parents: found by their environment.
    #[must_use]
    pub fn processes(&self) -> Vec<Process> {
        let mark = format!("{RUNTIME_DIR}={}", self.runtime.path().display());
        let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
        let mut found: Vec<Process> = entries
            .filter_map(|entry| {
                let pid = entry.file_name().to_str()?.parse().ok()?;
                // A zombie's environment reads as nothing: it is gone, but for its parent's notice.
                let environment = fs::read(entry.path().join("environ")).ok()?;
                environment.split(|b| *b == 0).any(|variable| variable == mark.as_bytes()).then_some(())?;
                let args = fs::read(entry.path().join("cmdline")).ok()?;
                let args = String::from_utf8_lossy(&args).replace('\0', " ").trim().to_owned();
                Some(Process { pid, args })
            })
            .collect();
        found.sort_by_key(|process| process.pid);
        found
    }

    /// What is left behind: processes, files and sockets in the runtime directory, KSM settings
    /// that only this test may have changed.
    #[must_use]
    pub fn leaks(&self) -> Vec<String> {
        let mut leaks: Vec<String> =
            self.processes().iter().map(|p| format!("process {}: {}", p.pid, p.args)).collect();
        leaks.extend(files_below(self.runtime.path()).iter().map(|path| format!("file {}", path.display())));
        leaks.extend(self.ksm.iter().flat_map(KsmSettings::changes));
        leaks
    }

    /// Waits until nothing is left behind.
    ///
    /// # Panics
    /// If something still is after `limit`.
    #[track_caller]
    pub fn assert_clean_within(&self, limit: Duration) {
        let until = Instant::now() + limit;
        let mut leaks = self.leaks();
        while !leaks.is_empty() && Instant::now() < until {
            thread::sleep(Duration::from_millis(50));
            leaks = self.leaks();
        }
        assert!(leaks.is_empty(), "left behind after {limit:?}:\n{}", leaks.join("\n"));
    }
}

impl Drop for Sandbox {
    fn drop(&mut self) {
        for process in self.processes() {
            process.kill();
        }
        self.ksm.iter().for_each(KsmSettings::restore);
    }
}

/// Everything below a directory that is not a directory; locks are meant to stay.
fn files_below(directory: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_dir() {
            found.extend(files_below(&path));
        } else if path.extension().is_none_or(|extension| extension != "lock") {
            found.push(path);
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn processes_and_files_left_behind_are_found() {
        let sandbox = Sandbox::new();
        let mut leaver = std::process::Command::new("sleep");
        let mut leaver = leaver.arg("60").env(RUNTIME_DIR, sandbox.runtime_dir()).spawn().unwrap();
        fs::write(sandbox.runtime_dir().join("vm.sock"), "").unwrap();
        let until = Instant::now() + Duration::from_secs(10);
        while sandbox.processes().is_empty() && Instant::now() < until {
            thread::sleep(Duration::from_millis(10));
        }
        let leaks = sandbox.leaks().join("\n");
        assert!(leaks.contains("sleep 60") && leaks.contains("vm.sock"), "{leaks}");
        drop(sandbox);
        assert!(!leaver.wait().unwrap().success());
    }
}
