//! A pool of processes that stand by to become clones ([`machine::standby`]), so that a clone need not wait for its process and for KVM.
//!
//! One thread of the daemon starts them, one at a time and with rests in between: what is done for later does not slow down what is done
//! now. They are no guests. They end with the daemon, whose end of their socket is closed then.

use std::collections::VecDeque;
use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::{Child, ChildStdin, Stdio};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use kernel_view::smaps::ProcessPages;
use machine::VmConfig;
use machine::standby::{COMMAND, STANDS_BY, hand_over};
use memory::PAGE_BYTES;
use os::{Process, executable, handed, lock, one_line, unpoisoned};
use serde::{Deserialize, Serialize};
use wire::packets;

use super::images::Image;
use super::lifetime::{Lifetime, OOM_SCORE_ADJ};

/// How long a process may take until it stands by.
const START_LIMIT: Duration = Duration::from_secs(10);
/// How long it may keep its daemon waiting that hands something over.
const HAND_OVER_LIMIT: Duration = Duration::from_secs(1);
/// How often it is looked whether all of them live.
const LOOK: Duration = Duration::from_millis(500);
/// The rest after one was started, measured by how long that took.
const REST: u32 = 3;
/// The first rest after one did not start; each one that follows is twice as long.
const RETRY: Duration = Duration::from_millis(200);
/// And the longest one, which is also the rest after memory was short.
const LONG_REST: Duration = Duration::from_secs(60);
/// Room for the arguments that a VM's process shows: more than a guest's name and the path of its socket have together.
const ROOM_BYTES: usize = 256;

/// How a pool is.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct PoolStatus {
    /// How many are to stand by.
    pub wanted: usize,
    /// How many do.
    pub standing_by: usize,
    /// What they take, in bytes.
    pub bytes: u64,
    /// How many have become clones so far.
    pub taken: u64,
    /// How many have ended without that.
    pub ended: u64,
    /// Why there are not more of them, where one did not start.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub trouble: Option<String>,
}

/// Processes that stand by, and the thread that starts them. Dropped, all of them end.
pub struct Pool {
    shared: Arc<Shared>,
    filler: Option<JoinHandle<()>>,
}

struct Shared {
    wanted: usize,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    standing_by: VecDeque<Standby>,
    taken: u64,
    ended: u64,
    trouble: Option<String>,
    /// How many want nothing to be started now.
    holds: usize,
    /// Nothing is started before.
    rests_until: Option<Instant>,
    is_over: bool,
}

impl State {
    /// Forgets those that have ended: none of that is an error.
    fn bury(&mut self) {
        let before = self.standing_by.len();
        self.standing_by.retain(|standby| !standby.has_ended());
        self.ended += (before - self.standing_by.len()) as u64;
    }

    fn pages(&self) -> u64 {
        self.standing_by.iter().map(|standby| standby.pages).sum()
    }
}

impl Pool {
    /// One of `wanted` processes, whose VMs are to live as `lifetime` says. They come one after the other.
    pub fn start(wanted: usize, lifetime: Lifetime) -> io::Result<Self> {
        let shared = Arc::new(Shared { wanted, state: Mutex::default(), changed: Condvar::new() });
        let fills = shared.clone();
        // It lives as long as the pool: a process that its daemon started may be bound to the thread that did.
        let filler = thread::Builder::new().name("pool".into()).spawn(move || fills.fill(lifetime))?;
        Ok(Self { shared, filler: Some(filler) })
    }

    /// One that stands by, if there is one.
    pub fn take(&self) -> Option<Standby> {
        let mut state = self.shared.lock();
        state.bury();
        let standby = state.standing_by.pop_front()?;
        state.taken += 1;
        Some(standby)
    }

    /// Has none started until that is dropped.
    pub fn hold(&self) -> Hold {
        self.shared.lock().holds += 1;
        Hold(self.shared.clone())
    }

    /// Ends all of them for want of memory, and starts none for a while.
    pub fn shed(&self) {
        let mut state = self.shared.lock();
        state.rests_until = Some(Instant::now() + LONG_REST);
        let all = std::mem::take(&mut state.standing_by);
        drop(state);
        end_all(all);
    }

    /// What they take, in pages.
    pub fn pages(&self) -> u64 {
        self.shared.lock().pages()
    }

    /// How it is.
    pub fn status(&self) -> PoolStatus {
        let mut state = self.shared.lock();
        state.bury();
        PoolStatus {
            wanted: self.shared.wanted,
            standing_by: state.standing_by.len(),
            bytes: state.pages() * PAGE_BYTES,
            taken: state.taken,
            ended: state.ended,
            trouble: state.trouble.clone(),
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.lock().is_over = true;
        self.shared.changed.notify_all();
        _ = self.filler.take().map(JoinHandle::join);
        let all = std::mem::take(&mut self.shared.lock().standing_by);
        end_all(all);
    }
}

/// While there is one, a pool starts nothing.
pub struct Hold(Arc<Shared>);

impl Drop for Hold {
    fn drop(&mut self) {
        self.0.lock().holds -= 1;
        self.0.changed.notify_all();
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    /// Starts one whenever there are too few, until the pool is over.
    fn fill(&self, lifetime: Lifetime) {
        let mut retry = RETRY;
        while self.awaits_need() {
            let began = Instant::now();
            let started = Standby::start(lifetime);
            let mut state = self.lock();
            let rest = match started {
                Ok(standby) => {
                    state.standing_by.push_back(standby);
                    (state.trouble, retry) = (None, RETRY);
                    began.elapsed() * REST
                }
                Err(error) => {
                    let why = one_line(&error);
                    if state.trouble.is_none() {
                        tracing::warn!("a process that is to stand by for clones did not start: {why}");
                    }
                    state.trouble = Some(why);
                    let rest = retry;
                    retry = (retry * 2).min(LONG_REST);
                    rest
                }
            };
            state.rests_until = state.rests_until.max(Some(Instant::now() + rest));
        }
    }

    /// Waits until one is to be started. False if the pool is over.
    fn awaits_need(&self) -> bool {
        let mut state = self.lock();
        loop {
            state.bury();
            let rest = state
                .rests_until
                .map_or(Duration::ZERO, |until| until.saturating_duration_since(Instant::now()));
            let wait = match () {
                () if state.is_over => return false,
                () if state.holds > 0 || state.standing_by.len() >= self.wanted => LOOK,
                () if rest.is_zero() => return true,
                () => rest.min(LOOK),
            };
            state = unpoisoned(self.changed.wait_timeout(state, wait)).0;
        }
    }
}

/// A process that stands by. Dropped, it ends.
pub struct Standby {
    /// None once it is a VM's.
    process: Option<VmProcess>,
    link: UnixStream,
    /// What it takes, by itself.
    pages: u64,
}

/// A VM's process.
pub struct VmProcess {
    pub child: Child,
    pub process: Process,
    pub lifeline: Option<ChildStdin>,
}

impl Standby {
    /// Starts one, and waits until it stands by.
    fn start(lifetime: Lifetime) -> io::Result<Self> {
        let (ours, theirs) = packets::pair()?;
        let mut program = executable::command();
        let number = handed::give(&mut program, theirs).to_string();
        program
            .args([COMMAND, "--link-fd", &number, "--oom-score-adj", &OOM_SCORE_ADJ.to_string()])
            .arg("_".repeat(ROOM_BYTES))
            .stdin(if lifetime == Lifetime::WithUs { Stdio::piped() } else { Stdio::null() })
            .stdout(Stdio::null())
            .process_group(0);
        let mut child = program.spawn()?;
        // Its end of the socket, too.
        drop(program);
        let lifeline = child.stdin.take();
        let process = Process::of_child(&child).inspect_err(|_| end(&mut child))?;
        let pid = process.pid();
        let process = Some(VmProcess { child, process, lifeline });
        let mut standby = Self { process, link: ours.into(), pages: 0 };
        standby.link.set_read_timeout(Some(START_LIMIT))?;
        standby.link.set_write_timeout(Some(HAND_OVER_LIMIT))?;
        if packets::receive_all(&standby.link, &mut [0; 64])?.0 != STANDS_BY {
            return Err(io::ErrorKind::InvalidData.into());
        }
        // It does nothing from here on: this stays so.
        let pages = ProcessPages::of(pid)?;
        standby.pages = pages.anonymous + pages.page_tables;
        Ok(standby)
    }

    fn has_ended(&self) -> bool {
        self.process.as_ref().is_none_or(|vm| vm.process.has_ended())
    }

    /// Makes it the VM of `config`, which goes on from `image`. On an error it has ended.
    pub fn become_vm(
        mut self,
        arguments: &[OsString],
        config: &VmConfig,
        messages: &File,
        image: &Image,
    ) -> io::Result<VmProcess> {
        image.with_files(|files| hand_over(&self.link, arguments, config, messages, files))?;
        Ok(self.process.take().ok_or(io::ErrorKind::NotFound)?)
    }
}

impl Drop for Standby {
    fn drop(&mut self) {
        if let Some(vm) = &mut self.process {
            end(&mut vm.child);
        }
    }
}

fn end(child: &mut Child) {
    let _ = child.kill();
    let _ = child.wait();
}

/// Ends them all at the same time.
fn end_all(mut standbys: VecDeque<Standby>) {
    for vm in standbys.iter_mut().filter_map(|standby| standby.process.as_mut()) {
        let _ = vm.child.kill();
    }
    // Each is waited for.
    drop(standbys);
}
