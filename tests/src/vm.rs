//! One VM, `samepage run`, and the ways into it: control socket, COM2 socket, /proc.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use kernel_view::pagemap::{Pagemap, PagemapEntry};
use memory::PAGE_BYTES;
use serde_json::{Value, json};

use crate::run::Running;
use crate::sandbox::Sandbox;

/// How long a VM may take for what it does at once, on a machine that is busy with other tests.
pub const SOON: Duration = Duration::from_secs(60);

/// A VM with a control socket and a COM2 socket.
pub struct Vm {
    running: Running,
    /// Its control socket.
    pub control: PathBuf,
    /// Its COM2 socket.
    pub com2: PathBuf,
}

impl Vm {
    /// Starts one called `name` with more arguments for `samepage run`, and waits for its sockets.
    ///
    /// # Panics
    /// If they do not come.
    #[track_caller]
    pub fn start(sandbox: &Sandbox, name: &str, args: &[impl AsRef<OsStr>]) -> Self {
        let (control, com2) = Self::sockets(sandbox, name);
        let all = ["run", "--console", "none", "--control"].map(OsString::from);
        let mut all = Vec::from(all);
        all.extend([control.as_os_str(), "--com2".as_ref(), com2.as_os_str()].map(OsString::from));
        all.extend(args.iter().map(OsString::from));
        Self::of(sandbox.samepage(all).timeout(SOON * 2).start(), control, com2)
    }

    /// Where the sockets of a VM called `name` are.
    #[must_use]
    pub fn sockets(sandbox: &Sandbox, name: &str) -> (PathBuf, PathBuf) {
        let socket = |kind| sandbox.runtime_dir().join(format!("{name}.{kind}"));
        (socket("ctl"), socket("com2"))
    }

    /// The VM that `running` is, once it answers.
    ///
    /// # Panics
    /// If it does not.
    #[track_caller]
    pub fn of(running: Running, control: PathBuf, com2: PathBuf) -> Self {
        let vm = Self { running, control, com2 };
        let until = Instant::now() + SOON;
        while UnixStream::connect(&vm.control).is_err() {
            assert!(Instant::now() < until, "no control socket: {}", vm.running.stderr_so_far());
            thread::sleep(Duration::from_millis(10));
        }
        vm
    }

    /// Asks its control socket, by a connection of its own.
    ///
    /// # Panics
    /// If there is no answer.
    #[track_caller]
    pub fn ask(&self, request: &Value) -> Value {
        if !self.control.exists() {
            // Its last words come after its socket is gone.
            thread::sleep(Duration::from_secs(1));
            panic!("the VM has ended: {}", self.running.stderr_so_far());
        }
        Client::connect(&self.control).ask(request)
    }

    /// What it says of itself.
    #[track_caller]
    pub fn status(&self) -> Value {
        self.ask(&json!({"op": "status"}))["status"].clone()
    }

    /// The page table's entries of guest RAM, in the order of the guest's memory.
    ///
    /// # Panics
    /// If they cannot be read.
    #[must_use]
    #[track_caller]
    pub fn page_entries(&self) -> Vec<PagemapEntry> {
        let status = self.status();
        let mut pagemap = Pagemap::open(self.running.pid()).expect("its pagemap");
        let (mut entries, mut all) = (Vec::new(), Vec::new());
        for extent in status["extents"].as_array().expect("extents") {
            let (hva, bytes) =
                (extent["hva"].as_u64().expect("hva"), extent["bytes"].as_u64().expect("bytes"));
            pagemap.read(memory::Hva(hva), (bytes / PAGE_BYTES) as usize, &mut entries).expect("its pagemap");
            all.append(&mut entries);
        }
        all
    }

    /// A connection to COM2.
    #[track_caller]
    pub fn com2(&self) -> Client {
        Client::connect(&self.com2)
    }

    #[must_use]
    pub fn running(&self) -> &Running {
        &self.running
    }

    /// Gives the process away, to wait for its end.
    #[must_use]
    pub fn into_running(self) -> Running {
        self.running
    }

    #[must_use]
    pub fn vcpu_threads(&self) -> Vec<u32> {
        let tasks = fs::read_dir(format!("/proc/{}/task", self.running.pid()));
        let is_vcpu = |path: &Path| {
            fs::read_to_string(path.join("comm"))
                .is_ok_and(|c| c.trim().strip_prefix("vcpu").is_some_and(|n| n.parse::<u8>().is_ok()))
        };
        let tasks = tasks.into_iter().flatten().flatten();
        tasks.filter(|t| is_vcpu(&t.path())).filter_map(|t| t.file_name().to_str()?.parse().ok()).collect()
    }

    /// Processor time of a thread so far, in clock ticks (of 10 ms).
    ///
    /// # Panics
    /// If there is no such thread.
    #[must_use]
    #[track_caller]
    pub fn ticks(&self, thread: u32) -> u64 {
        let path = format!("/proc/{}/task/{thread}/stat", self.running.pid());
        let stat = fs::read_to_string(&path).unwrap_or_else(|e| panic!("{path}: {e}"));
        // After the name, which ends with the last parenthesis: utime and stime are fields 14 and
        // 15 of all.
        let fields = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
        let fields: Vec<u64> = fields.split_whitespace().map(|f| f.parse().unwrap_or(0)).collect();
        fields[11] + fields[12]
    }

    /// Processor time of all vCPUs so far, in clock ticks.
    #[track_caller]
    pub fn vcpu_ticks(&self) -> u64 {
        self.vcpu_threads().iter().map(|t| self.ticks(*t)).sum()
    }

    /// Resident memory of the process in KiB.
    ///
    /// # Panics
    /// If it is gone.
    #[must_use]
    #[track_caller]
    pub fn rss_kib(&self) -> u64 {
        self.running.rss_kib()
    }

    /// A copy of guest memory from physical address 0 to the end of its first extent.
    ///
    /// # Panics
    /// If it cannot be read.
    #[must_use]
    #[track_caller]
    pub fn memory(&self) -> Vec<u8> {
        let extent = &self.status()["extents"][0];
        let (at, bytes) = (extent["hva"].as_u64().expect("hva"), extent["bytes"].as_u64().expect("bytes"));
        let mut copy = vec![0; bytes as usize];
        fs::File::open(format!("/proc/{}/mem", self.running.pid()))
            .and_then(|memory| memory.read_exact_at(&mut copy, at))
            .expect("guest memory");
        copy
    }
}

/// A connection that talks in lines.
pub struct Client(BufReader<UnixStream>);

impl Client {
    /// To the socket at `path`.
    ///
    /// # Panics
    /// If there is none.
    #[track_caller]
    pub fn connect(path: &Path) -> Self {
        // A socket is there a moment before it listens.
        let begin = Instant::now();
        let stream = loop {
            match UnixStream::connect(path) {
                Ok(stream) => break stream,
                Err(e) if begin.elapsed() > SOON => panic!("{}: {e}", path.display()),
                Err(_) => thread::sleep(Duration::from_millis(10)),
            }
        };
        for set in [UnixStream::set_read_timeout, UnixStream::set_write_timeout] {
            set(&stream, Some(SOON)).expect("a time limit of a socket");
        }
        Self(BufReader::new(stream))
    }

    #[must_use]
    pub fn stream(&self) -> &UnixStream {
        self.0.get_ref()
    }

    /// Sends bytes. The other end may have closed the connection: its answer tells.
    pub fn send(&mut self, bytes: &[u8]) {
        let _ = self.0.get_mut().write_all(bytes);
    }

    /// The next line without its end; None if the connection is closed.
    ///
    /// # Panics
    /// If neither comes in time.
    #[track_caller]
    pub fn line(&mut self) -> Option<String> {
        let mut line = Vec::new();
        match self.0.read_until(b'\n', &mut line) {
            Ok(0) => None,
            Ok(_) => Some(String::from_utf8_lossy(&line).trim_end().to_owned()),
            Err(e) if e.kind() == io::ErrorKind::ConnectionReset => None,
            Err(e) => panic!("no line: {e}"),
        }
    }

    /// Sends a line and gives the next one.
    #[track_caller]
    pub fn exchange(&mut self, line: &str) -> String {
        self.send(format!("{line}\n").as_bytes());
        self.line().unwrap_or_else(|| panic!("connection closed instead of an answer to {line:?}"))
    }

    /// Sends a command to a guest and gives the final answer, past any progress.
    #[track_caller]
    pub fn command(&mut self, line: &str) -> String {
        let mut answer = self.exchange(line);
        while answer.starts_with("progress ") {
            answer = self.line().expect("a final answer");
        }
        answer
    }

    /// Sends a request to a control socket and gives its answer.
    #[track_caller]
    pub fn ask(&mut self, request: &Value) -> Value {
        let answer = self.exchange(&request.to_string());
        serde_json::from_str(&answer).unwrap_or_else(|e| panic!("{e} in {answer:?}"))
    }

    /// Waits until the other end closes, whatever it sends before.
    ///
    /// # Panics
    /// If it does not in time.
    #[track_caller]
    pub fn assert_hung_up(&mut self) {
        let mut rest = Vec::new();
        match self.0.read_to_end(&mut rest) {
            Ok(_) => {}
            Err(e) => assert_eq!(e.kind(), io::ErrorKind::ConnectionReset, "{e}"),
        }
    }
}

/// The number after `key=` in a guest's answer.
///
/// # Panics
/// If there is none.
#[must_use]
#[track_caller]
pub fn field(answer: &str, key: &str) -> u64 {
    let value = answer.split(' ').find_map(|word| word.strip_prefix(key)?.strip_prefix('='));
    let parsed = value.and_then(|v| match v.strip_prefix("0x") {
        Some(hex) => u64::from_str_radix(hex, 16).ok(),
        None => v.parse().ok(),
    });
    parsed.unwrap_or_else(|| panic!("no number {key}= in {answer:?}"))
}

/// Looks until `count` is at least `enough`, however long it takes, as long as it grows.
///
/// # Panics
/// If it does not grow for [`SOON`].
#[track_caller]
pub fn counts_up_to(enough: u64, what: &str, mut count: impl FnMut() -> u64) {
    let mut last = count();
    while last < enough {
        eventually(what, || count() > last);
        last = count();
    }
}

/// Looks until `what` is so.
///
/// # Panics
/// If it is not within [`SOON`].
#[track_caller]
pub fn eventually(what: &str, mut so: impl FnMut() -> bool) {
    let until = Instant::now() + SOON;
    while !so() {
        assert!(Instant::now() < until, "not within {SOON:?}: {what}");
        thread::sleep(Duration::from_millis(20));
    }
}
