//! Commands in, replies out, over a workload.
//!
//! The caller owns the clock and the ports: it passes lines to [`Service::line`], calls
//! [`Service::step`] in between, and sleeps for as long as that says.

use crate::protocol::{Chase, Command, Done, ErrorCode, Fill, ParseError, Reply, Target, Text};
use crate::virtio::balloon::{Driver, Rest, Room};
use crate::virtio::{NoDevice, Transport};
use crate::workload::{Pages, Verify, Workload};
use balloon::Task;
use chase::Chasing;
use latency::TimedWrites;
use pace::Pace;

mod balloon;
mod chase;
mod latency;
mod pace;

/// Pages in a step, before the caller may look at its input again. On a host that has to find
/// memory for each, that is some 10 ms.
const STEP_PAGES: u64 = 256;

/// Least time between two `progress` lines.
const PROGRESS_MICROS: u64 = 1_000_000;

/// Churn rewrites in batches at least this far apart: waking for each page would cost more than the
/// page.
const CHURN_BATCH_MS: u64 = 10;

/// How long to sleep at most while the balloon's device has requests to answer. It wakes a sleeping
/// guest anyway.
const BALLOON_MILLIS: u32 = 1;

const MICROS: u64 = 1_000_000;

/// Where a command came from and its replies go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Port {
    Control,
    Console,
}

/// How the guest is to end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Power {
    /// Power off.
    Off,
    Reset,
}

/// How long there is nothing to do unless a line arrives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wait {
    /// No time at all.
    No,
    /// At most this many milliseconds.
    Millis(u32),
    /// For ever.
    Forever,
}

/// Takes a reply to its port.
pub trait Out {
    /// Sends `reply`, as a line.
    fn send(&mut self, port: Port, reply: &Reply);
}

/// A workload that carries out commands, and the driver of the balloon that its pages go into, if
/// there is one.
#[derive(Debug)]
pub struct Service<'t, P, T = NoDevice> {
    workload: Workload<'t, P>,
    balloon: Option<Driver<'t, T>>,
    job: Option<Job>,
    churn: Option<(Target, Pace)>,
    timed: TimedWrites,
}

#[derive(Clone, Copy, Debug)]
struct Job {
    kind: JobKind,
    port: Port,
    told_micros: u64,
}

#[derive(Clone, Copy, Debug)]
enum JobKind {
    /// Waits for pages that are in the balloon or in its requests.
    MakeRoom,
    Fill,
    Verify(Verify),
    Chase(Chasing),
    Balloon(Task),
}

impl JobKind {
    /// Whether only the balloon's device can advance it.
    fn waits_for_device(self) -> bool {
        matches!(self, Self::MakeRoom | Self::Balloon(Task::Off | Task::Hostile))
    }
}

impl<'t, P: Pages> Service<'t, P> {
    /// A service over `workload`, without a balloon.
    pub fn new(workload: Workload<'t, P>) -> Self {
        Service::with_balloon(workload, None)
    }
}

impl<'t, P: Pages, T: Transport> Service<'t, P, T> {
    /// A service over `workload`, whose pages `balloon` gives away.
    pub fn with_balloon(workload: Workload<'t, P>, balloon: Option<Driver<'t, T>>) -> Self {
        Self { workload, balloon, job: None, churn: None, timed: TimedWrites::new() }
    }

    /// This guest is a copy from now on: what it does at random differs from its origin and from
    /// other copies.
    pub fn reseed(&mut self, number: u64) {
        self.timed.reseed(number);
    }

    pub fn workload(&self) -> &Workload<'t, P> {
        &self.workload
    }

    /// Carries out a line. Returns how the guest is to end, if it asks for that.
    pub fn line(
        &mut self,
        port: Port,
        line: Result<&str, ParseError>,
        now_micros: u64,
        out: &mut impl Out,
    ) -> Option<Power> {
        match line.and_then(Command::parse) {
            Ok(command) => self.command(port, command, now_micros, out),
            // An empty line typed on the console, or the end of `\r\n\r\n`, is no command.
            Err(ParseError::Empty) => None,
            Err(error) => {
                out.send(port, &Reply::not_understood(error));
                None
            }
        }
    }

    fn command(
        &mut self,
        port: Port,
        command: Command,
        now_micros: u64,
        out: &mut impl Out,
    ) -> Option<Power> {
        let power = match command {
            Command::Poweroff => Some((Power::Off, Done::Poweroff)),
            Command::Reboot => Some((Power::Reset, Done::Reboot)),
            _ => None,
        };
        if let Some((power, done)) = power {
            out.send(port, &Reply::Ok(done));
            return Some(power);
        }
        if command == Command::Idle {
            self.churn = None;
            self.timed.stop();
            if let Some(job) = self.job.take() {
                self.workload.stop_fill();
                if let Some(balloon) = &mut self.balloon {
                    balloon.fill_cancelled();
                }
                out.send(job.port, &refusal(ErrorCode::Cancelled, format_args!("idle came before the end")));
            }
            out.send(port, &Reply::Ok(Done::Idle));
            return None;
        }
        if self.job.is_some() {
            out.send(
                port,
                &refusal(ErrorCode::Busy, format_args!("wait for the last command, or send idle")),
            );
            return None;
        }
        if let Some(reply) = self.obey(port, command, now_micros) {
            out.send(port, &reply);
        }
        None
    }

    /// The reply, or nothing if the command became a job.
    fn obey(&mut self, port: Port, command: Command, now_micros: u64) -> Option<Reply> {
        match command {
            Command::Fill(fill) => {
                let limits = self.fill_limits();
                let (asked, have) = (fill.pages.unwrap_or(limits.default), limits.most);
                let fill = Fill { pages: Some(asked), ..fill };
                if asked > have || !self.workload.begin_fill(fill) {
                    let message = format_args!("pages={asked}, expected at most {have}");
                    return Some(refusal(ErrorCode::Memory, message));
                }
                self.churn = None;
                self.timed.stop();
                self.job = Some(Job { kind: JobKind::MakeRoom, port, told_micros: now_micros });
                None
            }
            Command::Verify => {
                let kind = JobKind::Verify(Verify::default());
                self.job = Some(Job { kind, port, told_micros: now_micros });
                None
            }
            Command::Churn { target, rate, seconds } => {
                if rate > 0 && self.workload.held(target) == 0 {
                    return Some(refusal(
                        ErrorCode::Empty,
                        format_args!("no pages of class {target} are held"),
                    ));
                }
                self.churn =
                    (rate > 0).then(|| (target, Pace::new(rate, seconds, CHURN_BATCH_MS, now_micros)));
                Some(Reply::Ok(Done::Churn { rate }))
            }
            Command::Latency { target, rate, seconds } => {
                Some(self.obey_latency(target, rate, seconds, now_micros))
            }
            Command::Free { percent } => {
                let freed = self.workload.free(percent);
                if let Some(balloon) = &mut self.balloon {
                    balloon.freed();
                }
                Some(Reply::Ok(Done::Free { freed, filled: self.workload.held(Target::All) }))
            }
            Command::Report => Some(Reply::Ok(Done::Report(self.workload.report()))),
            Command::Balloon(action) => self.obey_balloon(port, action, now_micros),
            Command::Frames { .. } => Some(refusal(
                ErrorCode::Unsupported,
                format_args!("this guest has no map of what its frames are used for; a Linux guest has"),
            )),
            Command::Random => Some(Reply::Ok(Done::Random { number: self.timed.number() })),
            // The agent reads its clocks before this service sees the line.
            Command::Clock { .. } => Some(refusal(
                ErrorCode::Unsupported,
                format_args!("this guest has one processor and no timer; a Linux guest has"),
            )),
            Command::Mac { .. } => Some(refusal(
                ErrorCode::Unsupported,
                format_args!("this guest has no driver for a network; a Linux guest has"),
            )),
            Command::Chase(chase) => self.begin_chase(port, chase, now_micros),
            // A guest with other processors handles them before this service sees the line.
            Command::Touch(_) => Some(refusal(
                ErrorCode::Unsupported,
                format_args!("this guest has no processors of its own to read with; the built-in guest has"),
            )),
            // The agent handles a disk before this service sees the line.
            Command::Disk(_) => Some(refusal(ErrorCode::Unsupported, format_args!("this guest has no disk"))),
            // Dealt with by the caller.
            Command::Idle | Command::Poweroff | Command::Reboot => None,
        }
    }

    /// The reply, or nothing if the chase has begun.
    fn begin_chase(&mut self, port: Port, chase: Chase, now_micros: u64) -> Option<Reply> {
        let held = self.workload.held_range(chase.class);
        let Some(chasing) = Chasing::new(chase, &held) else {
            let have = held.end - held.start;
            let message = format_args!(
                "nodes={} of class {}, of which {have} pages are held",
                chase.nodes, chase.class
            );
            return Some(refusal(ErrorCode::Empty, message));
        };
        self.job = Some(Job { kind: JobKind::Chase(chasing), port, told_micros: now_micros });
        None
    }

    /// Goes on with whatever is running. Returns how long to wait before the next step.
    pub fn step(&mut self, now_micros: u64, out: &mut impl Out) -> Wait {
        let churn = self.step_churn(now_micros).or(self.step_latency(now_micros));
        let patient = self.job.map_or(churn != Wait::No, |job| job.kind.waits_for_device());
        let rest = self.step_balloon(now_micros, patient);
        if self.job.is_some() {
            self.step_job(now_micros, out);
            return match self.job {
                Some(job) if job.kind.waits_for_device() => Wait::Millis(BALLOON_MILLIS),
                // Even after its last step: what was waiting for it may have arrived.
                _ => Wait::No,
            };
        }
        match (rest, churn) {
            (Rest::Waiting, Wait::Millis(_) | Wait::Forever) => Wait::Millis(BALLOON_MILLIS),
            _ => churn,
        }
    }

    fn step_job(&mut self, now_micros: u64, out: &mut impl Out) {
        let Some(mut job) = self.job.take() else { return };
        if let JobKind::MakeRoom = job.kind {
            match self.room_for_fill() {
                Room::Ready => job.kind = JobKind::Fill,
                Room::Soon => {}
                Room::Never => {
                    self.workload.stop_fill();
                    let message = format_args!("the balloon has those pages and its device is broken");
                    return out.send(job.port, &refusal(ErrorCode::Failed, message));
                }
            }
        }
        let (done, total) = match &mut job.kind {
            JobKind::MakeRoom => (0, self.workload.total()),
            JobKind::Fill => {
                let (done, total) = (self.workload.fill_step(STEP_PAGES), self.workload.total());
                if done == total {
                    return out.send(job.port, &Reply::Ok(Done::Fill { pages: total }));
                }
                (done, total)
            }
            JobKind::Verify(verify) => {
                if self.workload.verify_step(verify, STEP_PAGES) {
                    let Verify { checked, mismatched, first, .. } = *verify;
                    return out.send(job.port, &Reply::Ok(Done::Verify { checked, mismatched, first }));
                }
                (verify.checked, self.workload.held(Target::All))
            }
            JobKind::Chase(chasing) => {
                if let Some(chased) = chasing.step(&mut self.workload) {
                    return out.send(job.port, &Reply::Ok(Done::Chase(chased)));
                }
                chasing.progress()
            }
            JobKind::Balloon(task) => {
                if let Some(done) = self.step_task(task, now_micros) {
                    return out.send(job.port, &balloon::done(done));
                }
                self.job = Some(job);
                return;
            }
        };
        if now_micros.saturating_sub(job.told_micros) >= PROGRESS_MICROS {
            job.told_micros = now_micros;
            out.send(job.port, &Reply::Progress { done, total });
        }
        self.job = Some(job);
    }

    fn step_churn(&mut self, now_micros: u64) -> Wait {
        let Some((target, pace)) = &mut self.churn else { return Wait::Forever };
        let (target, due) = (*target, pace.due(now_micros));
        self.workload.churn_step(target, due.times);
        if due.wait == Wait::Forever || self.workload.held(target) == 0 {
            self.churn = None;
            return Wait::Forever;
        }
        due.wait
    }
}

fn refusal(code: ErrorCode, message: core::fmt::Arguments<'_>) -> Reply {
    Reply::Err { code, message: Text::of(message) }
}

#[cfg(test)]
mod tests;

#[cfg(test)]
mod balloon_tests;
