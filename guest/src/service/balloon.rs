//! The balloon's commands, and the part of a fill that involves the balloon.

use super::{Job, JobKind, Port, STEP_PAGES, Service, refusal};
use crate::protocol::{Balloon, BalloonDone, Done, Drive, ErrorCode, Reply};
use crate::virtio::Transport;
use crate::virtio::balloon::{FillLimits, Rest, Room};
use crate::workload::Pages;

/// A command that takes its time.
#[derive(Clone, Copy, Debug)]
pub(super) enum Task {
    /// Reading pages that should be empty.
    Check { next: u64, checked: u64, nonzero: u64 },
    /// Writing pages that are in the balloon.
    Touch { next: u64, left: u64, touched: u64 },
    /// Emptying the balloon before the device is released.
    Off,
    /// A request that no driver should send.
    Hostile,
}

/// No page is all zeros after this.
const SCRIBBLE: u64 = 0x5ca1_ab1e_5ca1_ab1e;

impl<P: Pages, T: Transport> Service<'_, P, T> {
    /// Polls the balloon's device. Costs an exit to the VMM: to be called when the guest
    /// wakes, and every few milliseconds while it works.
    pub fn poll_balloon(&mut self) {
        if let Some(balloon) = &mut self.balloon {
            balloon.poll();
        }
    }

    /// Goes on with the balloon. `patient` if there is nothing else to do.
    pub(super) fn step_balloon(&mut self, now_micros: u64, patient: bool) -> Rest {
        let Some(balloon) = &mut self.balloon else { return Rest::Idle };
        balloon.step(&self.workload.in_use(), now_micros, patient)
    }

    /// How many pages a fill may have.
    pub(super) fn fill_limits(&self) -> FillLimits {
        let all = self.workload.capacity();
        match &self.balloon {
            Some(balloon) => {
                let limits = balloon.fill_limits();
                FillLimits { default: limits.default.min(all), most: limits.most.min(all) }
            }
            None => FillLimits { default: all, most: all },
        }
    }

    /// Whether the fill may begin. Once it may, the balloon counts its pages as written.
    pub(super) fn room_for_fill(&mut self) -> Room {
        let pages = self.workload.total();
        let Some(balloon) = &mut self.balloon else { return Room::Ready };
        let room = balloon.room(pages);
        match room {
            Room::Ready => balloon.filling(pages),
            Room::Never => balloon.fill_cancelled(),
            Room::Soon => {}
        }
        room
    }

    /// The reply, or nothing if the command became a job.
    pub(super) fn obey_balloon(&mut self, port: Port, action: Balloon, now_micros: u64) -> Option<Reply> {
        let in_use = self.workload.in_use();
        let Some(balloon) = &mut self.balloon else {
            let message = format_args!("this guest drives no balloon device");
            return Some(refusal(ErrorCode::Unsupported, message));
        };
        let task = match action {
            Balloon::Report => return Some(done(BalloonDone::Report(balloon.report(&in_use)))),
            Balloon::On => {
                return Some(match balloon.on() {
                    Ok(features) => done(BalloonDone::On { features }),
                    Err(error) => refusal(ErrorCode::Failed, format_args!("{error}")),
                });
            }
            Balloon::Off => {
                balloon.off(now_micros);
                Task::Off
            }
            Balloon::Hostile(kind) => match balloon.attempt(kind, now_micros) {
                Ok(()) => Task::Hostile,
                Err(error) => return Some(refusal(ErrorCode::Failed, format_args!("{error}"))),
            },
            Balloon::Check => Task::Check { next: 0, checked: 0, nonzero: 0 },
            Balloon::Touch { pages } => Task::Touch { next: 0, left: pages, touched: 0 },
        };
        self.job = Some(Job { kind: JobKind::Balloon(task), port, told_micros: now_micros });
        None
    }

    /// Goes on with a task. The answer when it is done.
    pub(super) fn step_task(&mut self, task: &mut Task, now_micros: u64) -> Option<BalloonDone> {
        let balloon = self.balloon.as_mut()?;
        match task {
            Task::Check { next, checked, nonzero } => {
                let in_use = self.workload.in_use();
                let Some(pages) = balloon.next_emptied(*next, STEP_PAGES, &in_use) else {
                    return Some(BalloonDone::Check { checked: *checked, nonzero: *nonzero });
                };
                *next = pages.end;
                for page in pages {
                    let Some(page) = self.workload.idle_page(page) else { continue };
                    *checked += 1;
                    *nonzero += u64::from(page.iter().any(|word| *word != 0));
                }
                None
            }
            Task::Touch { next, left, touched } => {
                for _ in 0..STEP_PAGES.min(*left) {
                    let Some(page) = balloon.next_given(*next) else {
                        *left = 0;
                        break;
                    };
                    balloon.misuse(page);
                    if let Some(page) = self.workload.idle_page(page) {
                        page[0] = SCRIBBLE;
                    }
                    *next = page + 1;
                    *left -= 1;
                    *touched += 1;
                }
                (*left == 0).then_some(BalloonDone::Touch { touched: *touched })
            }
            Task::Off => {
                // One that broke on the way is reset without further ado.
                if balloon.drive() == Drive::Broken {
                    balloon.off(now_micros);
                }
                (balloon.drive() == Drive::Off).then_some(BalloonDone::Off)
            }
            Task::Hostile => balloon.attempted().map(|(kind, completed, status)| BalloonDone::Hostile {
                kind,
                completed,
                status,
            }),
        }
    }
}

pub(super) fn done(done: BalloonDone) -> Reply {
    Reply::Ok(Done::Balloon(done))
}
