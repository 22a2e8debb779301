//! One guest of a fleet: its VM process, what it said when it was ready, what it was filled with.

mod cloned;
mod joined;
mod log;
mod start;

use std::fs;
use std::io;
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::{Child, ChildStdin, ExitStatus};
use std::sync::Arc;
use std::time::{Duration, Instant};

use guest::layout::Layout;
use guest::protocol::{Command, Done, Fill, Kind, Ready, Reply, Report, Target};
use rustix::process::Signal;

pub(crate) use self::start::Origin;
use super::HostError;
use super::client::{ANSWER_LIMIT, Com2, control_within};
use super::images::Image;
pub use super::lifetime::Lifetime;
use super::runtime::FleetDir;
use super::shutdown::{self, Ended, Shutdown};
use super::spec::{EngineName, GuestSpec};
use super::state::{Saved, Started};
use super::vm_handle::VmHandle;
use super::watch::{Stage, Watch};
use machine::control as vm;
use measure::Space;
use os::Process;
use os::limits;

/// How long the built-in guest may take until it is ready.
const BUILT_IN_LIMIT: Duration = Duration::from_secs(30);
/// How long a Linux guest may take.
const LINUX_LIMIT: Duration = Duration::from_secs(180);
/// How long a guest may be silent during a long command: progress comes more often than this.
const SILENCE_LIMIT: Duration = Duration::from_secs(60);
/// How long a command may take a guest that is throttled or suspended.
const HELD_LIMIT: Duration = Duration::from_secs(3600);
/// How long a VM may take to show that it answers at all.
const LOOK_LIMIT: Duration = Duration::from_secs(3);
/// How long a VM process may take to end.
const END_LIMIT: Duration = Duration::from_secs(5);
/// How often a VM that is to end is looked at.
const END_POLL: Duration = Duration::from_millis(20);
/// How a VM ends whose guest powered off, in words.
const CLEAN_EXIT: &str = "exit status 0";
/// How one ended that is no child of ours.
const GONE: &str = "its process is gone";

/// A guest.
pub struct Guest {
    /// What it is to be.
    pub spec: GuestSpec,
    /// Its number in the fleet.
    pub number: usize,
    dir: FleetDir,
    engine: EngineName,
    working_set_seconds: Option<f64>,
    process: Running,
    /// Of one that joined by itself: where its control socket is. It is managed and not ended, and is in no file.
    joined: Option<PathBuf>,
    pub(super) com2: Option<Com2>,
    ready: Option<Ready>,
    fill: Option<Fill>,
    image: Option<Arc<Image>>,
    generation: Option<u64>,
}

enum Running {
    /// Started by us. The pipe ends the VM when it is dropped (with [`Lifetime::WithUs`]).
    Child {
        child: Child,
        process: Process,
        lifeline: Option<ChildStdin>,
    },
    /// Started by an earlier daemon.
    Adopted(Process),
    Ended(String),
}

impl Guest {
    /// Takes over a VM that an earlier daemon started and filled, as `saved` says, and that is to be as `spec` says.
    pub fn adopt(
        spec: &GuestSpec,
        number: usize,
        dir: &FleetDir,
        saved: &Saved,
        vm: Process,
    ) -> Result<Self, HostError> {
        let guest = Self {
            spec: spec.clone(),
            number,
            dir: dir.clone(),
            engine: saved.started.engine,
            working_set_seconds: saved.started.working_set_seconds,
            com2: Com2::connect(&spec.name, &dir.com2(&spec.name)?, vm.pid()).ok(),
            process: Running::Adopted(vm),
            joined: None,
            ready: saved.ready(),
            fill: saved.fill(),
            image: None,
            generation: None,
        };
        // What may change under a running VM has.
        guest.save();
        Ok(guest)
    }

    /// Waits until the guest says that it is ready.
    pub fn wait_ready(&mut self, watch: &Watch) -> Result<(), HostError> {
        if self.has_joined() {
            return Ok(());
        }
        let usual = if self.spec.vm.kernel.is_some() { LINUX_LIMIT } else { BUILT_IN_LIMIT };
        let limit = self.spec.ready_seconds.map_or(usual, |s| Duration::from_secs(s.into()));
        let path = self.dir.com2(&self.spec.name)?;
        let begin = Instant::now();
        while self.ready.is_none() {
            watch.check()?;
            self.check_alive()?;
            if begin.elapsed() > limit {
                let log = match self.log_tail() {
                    empty if empty.is_empty() => " is empty".into(),
                    tail => format!(" ends with{tail}"),
                };
                return Err(HostError::Silent { guest: self.spec.name.clone(), limit, log });
            }
            match &mut self.com2 {
                None => match Com2::connect(&self.spec.name, &path, self.pid().unwrap_or(0)) {
                    Ok(com2) => self.com2 = Some(com2),
                    Err(source) if limits::is_shortage(&source) => {
                        let peer = format!("COM2 of guest {}", self.spec.name);
                        return Err(HostError::socket(peer, limits::explained(source)));
                    }
                    Err(_) => std::thread::sleep(Duration::from_millis(5)),
                },
                Some(com2) => match com2.poll() {
                    Ok(Some(Reply::Ready(ready))) => self.ready = Some(ready),
                    Ok(_) => {}
                    // Its VM ended: say how, for that is the cause.
                    Err(e) => {
                        self.is_ending();
                        self.check_alive()?;
                        return Err(e);
                    }
                },
            }
        }
        self.save();
        watch.tell(Stage::Ready, self.number, 1, 1);
        Ok(())
    }

    /// Fills its memory as the fleet file says; without `fill` there, not at all.
    pub fn fill(&mut self, watch: &Watch) -> Result<(), HostError> {
        if self.fill.is_some() {
            return Ok(());
        }
        match self.spec.fill.and_then(|f| f.command(self.number)) {
            Some(fill) => self.fill_by(fill, watch),
            None => Ok(()),
        }
    }

    /// Fills its memory in this way, whatever the fleet file says.
    pub fn fill_by(&mut self, fill: Fill, watch: &Watch) -> Result<(), HostError> {
        // Where the fleet file says no number, the guest fills what is not in its balloon, and says how much that is.
        let pages = match self.command(&Command::Fill(fill), Stage::Fill, watch)? {
            Reply::Ok(Done::Fill { pages }) => Some(pages),
            _ => fill.pages,
        };
        self.fill = Some(Fill { pages, ..fill });
        self.save();
        Ok(())
    }

    /// Fills `pages` pages, whatever the fleet file says of their number; of its mix, or nothing where it says none.
    pub fn fill_pages(&mut self, pages: u64, watch: &Watch) -> Result<(), HostError> {
        let Some(mut fill) = self.spec.fill else { return Ok(()) };
        fill.pages = Some(pages);
        let Some(command) = fill.command(self.number) else { return Ok(()) };
        self.command(&Command::Fill(command), Stage::Fill, watch)?;
        self.fill = Some(command);
        self.save();
        Ok(())
    }

    /// Has the guest check every page it filled. Returns pages checked and pages wrong.
    pub fn verify(&mut self, watch: &Watch) -> Result<(u64, u64), HostError> {
        match self.command(&Command::Verify, Stage::Verify, watch)? {
            Reply::Ok(Done::Verify { checked, mismatched, .. }) => Ok((checked, mismatched)),
            _ => Ok((0, 0)),
        }
    }

    /// What the guest says of its pages.
    pub fn report(&mut self, watch: &Watch) -> Result<Option<Report>, HostError> {
        match self.command(&Command::Report, Stage::Verify, watch)? {
            Reply::Ok(Done::Report(report)) => Ok(Some(report)),
            _ => Ok(None),
        }
    }

    /// Sends the guest any other command. Pages that `fill` writes this way are not known here.
    pub fn obey(&mut self, command: &Command, watch: &Watch) -> Result<Reply, HostError> {
        self.command(command, Stage::Merge, watch)
    }

    fn command(&mut self, command: &Command, stage: Stage, watch: &Watch) -> Result<Reply, HostError> {
        let number = self.number;
        let handle = self.handle()?;
        let Some(com2) = &mut self.com2 else {
            let peer = format!("COM2 of guest {}", self.spec.name);
            return Err(HostError::socket(peer, io::Error::from(io::ErrorKind::NotConnected)));
        };
        let began = Instant::now();
        let mut stands = false;
        let result = com2.command(command, SILENCE_LIMIT, &mut |progress| {
            watch.check()?;
            if let Some((done, total)) = progress {
                if std::mem::take(&mut stands) {
                    watch.tell(Stage::Wait, number, 1, 1);
                }
                watch.tell(stage, number, done, total);
                return Ok(false);
            }
            // One that is held back says nothing, and is not to blame.
            let status = handle.as_ref().and_then(|handle| handle.status().ok());
            let paused = status.as_ref().is_some_and(|status| status.paused);
            if paused && !stands {
                stands = true;
                watch.tell(Stage::Wait, number, 0, 1);
            }
            let held = paused || status.is_some_and(|status| status.throttle.pages_per_second.is_some());
            Ok(held && began.elapsed() < HELD_LIMIT)
        });
        if stands {
            watch.tell(Stage::Wait, number, 1, 1);
        }
        if result.is_err() {
            self.check_alive()?;
        } else {
            watch.tell(stage, number, 1, 1);
        }
        result
    }

    /// Asks the VM process.
    pub fn control(&self, request: &vm::Request) -> Result<vm::Reply, HostError> {
        self.control_within(request, ANSWER_LIMIT)
    }

    fn control_within(&self, request: &vm::Request, limit: Duration) -> Result<vm::Reply, HostError> {
        let socket = self.control_socket()?;
        // Of one that has ended no process is meant, and none answers.
        control_within(&self.spec.name, &socket, Some(self.pid().unwrap_or(0)), request, limit)
    }

    /// Its handle, while it has a process, to manage its memory.
    pub fn handle(&self) -> Result<Option<VmHandle>, HostError> {
        let socket = self.control_socket()?;
        Ok(self.pid().map(|pid| VmHandle {
            guest: self.spec.name.clone(),
            pid,
            socket,
            memory_bytes: self.spec.vm.memory_bytes,
            reservation: self.spec.reservation,
        }))
    }

    /// Whether its VM does not answer. Asked for a short time only.
    pub(crate) fn is_silent(&self) -> bool {
        matches!(self.control_within(&vm::Request::Status, LOOK_LIMIT), Err(HostError::Unanswered { .. }))
    }

    /// What the VM process says of itself.
    pub fn vm_status(&self) -> Result<vm::Status, HostError> {
        match self.control(&vm::Request::Status)? {
            vm::Reply::Status(status) => Ok(vm::Status { name: self.spec.name.clone(), ..status }),
            other => Err(HostError::unexpected_of_vm(&self.spec.name, &other)),
        }
    }

    /// Where its memory lies, for measuring.
    pub fn space(&self) -> Result<Space, HostError> {
        let status = self.vm_status()?;
        Ok(Space { name: self.spec.name.clone(), pid: status.pid, extents: status.extents })
    }

    /// What it said when it was ready.
    pub fn ready(&self) -> Option<Ready> {
        self.ready
    }

    /// Whether it is the built-in guest, whose pages lie where it says.
    pub fn is_built_in(&self) -> bool {
        self.ready.is_some_and(|r| r.kind == Kind::Builtin)
    }

    /// How many pages of one kind it was filled with; None if it was not, or that is not known.
    pub fn pages_of(&self, target: Target) -> Option<u64> {
        let fill = self.fill?;
        let pages = fill.pages?;
        let layout = Layout::new(fill.mix, pages);
        Some(match target {
            Target::All => pages,
            Target::Only(class) => {
                let segment = layout.segment(class);
                segment.end - segment.start
            }
        })
    }

    /// What it was filled with.
    pub fn filled(&self) -> Option<&Fill> {
        self.fill.as_ref()
    }

    /// Its process, while it has one.
    pub fn pid(&self) -> Option<u32> {
        self.process().map(Process::pid)
    }

    fn process(&self) -> Option<&Process> {
        match &self.process {
            Running::Child { process, .. } | Running::Adopted(process) => Some(process),
            Running::Ended(_) => None,
        }
    }

    /// Whether it was started here; else an earlier daemon did that.
    pub fn is_child(&self) -> bool {
        matches!(self.process, Running::Child { .. })
    }

    /// Kills its VM at once, as the out-of-memory killer does.
    pub fn kill(&self) {
        if let Some(process) = self.process() {
            let _ = process.signal(Signal::KILL);
        }
    }

    /// None while its VM runs, else how it ended.
    pub fn ended(&mut self) -> Option<&str> {
        let how = match &mut self.process {
            Running::Child { child, .. } => match child.try_wait() {
                Ok(Some(status)) => Some(describe(status)),
                _ => None,
            },
            Running::Adopted(process) => process.has_ended().then(|| GONE.into()),
            Running::Ended(_) => None,
        };
        if let Some(how) = how {
            let how = match self.last_error() {
                Some(why) if how != CLEAN_EXIT => format!("{how}: {why}"),
                _ => how,
            };
            self.process = Running::Ended(how);
        }
        match &self.process {
            Running::Ended(how) => Some(how),
            _ => None,
        }
    }

    /// Whether its VM is ending, which is seen on its sockets before its process is gone.
    pub fn is_ending(&mut self) -> bool {
        let begin = Instant::now();
        while self.ended().is_none() && begin.elapsed() < END_LIMIT {
            std::thread::sleep(Duration::from_millis(5));
        }
        self.ended().is_some()
    }

    fn check_alive(&mut self) -> Result<(), HostError> {
        let Some(how) = self.ended().map(str::to_owned) else { return Ok(()) };
        Err(HostError::Ended { guest: self.spec.name.clone(), how, log: self.log_tail() })
    }

    /// What its VM was started with.
    pub(super) fn started(&self) -> Started {
        let working_set_seconds = self.working_set_seconds;
        Started { guest: self.spec.clone(), engine: self.engine, working_set_seconds }
    }

    /// Writes down what a later daemon needs to know of it.
    pub(super) fn save(&self) {
        if self.has_joined() {
            return;
        }
        let process = self.process().map(Process::identity);
        // Without it a later daemon does not take this guest over, and says so.
        if let Err(error) = Saved::new(self.started(), process, self.ready, self.fill).write(&self.dir) {
            tracing::warn!("guest {}: {}", self.spec.name, os::one_line(&error));
        }
    }

    /// Has the guest power off as long as `shutdown` lets it, and ends its VM. The built-in guest has nothing to lose, and ends at once.
    pub(super) fn shut_down(&mut self, shutdown: &Shutdown) -> Ended {
        if self.has_joined() {
            self.stop();
            return Ended::Orderly;
        }
        let mut unasked = None;
        if !self.is_built_in() && self.ended().is_none() {
            // At the pace of one that is held back it could not.
            let lift = vm::Request::Throttle { pages_per_second: None };
            let _ = self.control_within(&lift, END_LIMIT);
            unasked = match self.control_within(&shutdown::request(shutdown.vm_limit()), END_LIMIT) {
                Ok(_) => None,
                // It is on its way out by itself.
                Err(HostError::Socket { .. }) if self.is_ending() => None,
                Err(error) => Some(os::one_line(&error)),
            };
            while unasked.is_none() && self.ended().is_none() && !shutdown.time_left().is_zero() {
                std::thread::sleep(END_POLL);
            }
        }
        let has_nothing_to_lose = self.is_built_in();
        let ended = match self.ended() {
            None if has_nothing_to_lose => Ended::Orderly,
            None => unasked.map_or(Ended::CutOff, Ended::Unasked),
            // Of one that is no child of ours it is not known, unless it has said so.
            Some(how) if how == CLEAN_EXIT || how == GONE => Ended::Orderly,
            Some(how) => Ended::Otherwise(how.into()),
        };
        self.stop();
        ended
    }

    /// Ends its VM, by force if it does not end when asked, and removes what it left. One that joined by itself runs on, unmanaged.
    pub fn stop(&mut self) {
        if self.has_joined() {
            return self.leave();
        }
        if self.ended().is_none()
            && let Some(process) = self.process()
        {
            process.end(|| self.control_within(&vm::Request::Stop, END_LIMIT).is_ok());
        }
        if let Running::Child { child, .. } = &mut self.process {
            let _ = child.wait();
        }
        self.process = Running::Ended("stopped".into());
        let sockets = [self.dir.control(&self.spec.name), self.dir.com2(&self.spec.name)];
        for path in sockets.into_iter().flatten().chain([self.dir.state(&self.spec.name)]) {
            let _ = fs::remove_file(path);
        }
    }
}

/// Has all of `guests` that live power off at the same time, as long as `shutdown` lets them, and ends them.
pub(super) fn shut_down_all(guests: &mut [Guest], shutdown: &Shutdown) {
    let living = guests.iter_mut().filter_map(|guest| guest.ended().is_none().then_some(guest));
    let living: Vec<_> = living.collect();
    shutdown.awaits(living.iter().map(|guest| guest.spec.name.clone()));
    std::thread::scope(|scope| {
        for guest in living {
            scope.spawn(|| {
                let ended = guest.shut_down(shutdown);
                shutdown.has_ended(&guest.spec.name, ended);
            });
        }
    });
    // What had ended before has left its files.
    guests.iter_mut().for_each(Guest::stop);
}

impl Drop for Guest {
    fn drop(&mut self) {
        if let Running::Child { child, lifeline: Some(_), .. } = &mut self.process {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

fn describe(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exit status {code}"),
        (None, Some(signal)) => format!("signal {signal}"),
        _ => "unknown".into(),
    }
}
