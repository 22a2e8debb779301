//! Reads a fleet's ledger off the host: page tables, the kernel's books, the balloons, the engine.

use os::process::thread_time;
use std::time::Duration;

use super::HostError;
use super::vm_handle::{self, Said, VmHandle};
use kernel_view::host::Host;
use kernel_view::ksm_stat::KsmStat;
use kernel_view::smaps::ProcessPages;
use measure::audit::{self, Audit};
use measure::by_kind;
use measure::frames::{Frames, GuestFrames};
use measure::rolling::{Recent, Rolling, Subject};
use measure::{MeasureError, Space};
use memory::PAGE_BYTES;
use os::process::is_running;
use overcommit::ledger::{Classes, GuestNumbers, GuestOverhead, HostNumbers, HostOverhead, Ledger};

/// What KSM keeps of each page it has seen (struct ksm_rmap_item), in bytes.
const RMAP_ITEM_BYTES: u64 = 64;

/// How long a VM that does not answer is given to end: this many looks, this far apart.
const ENDING_LOOKS: u32 = 50;
const ENDING_PAUSE: Duration = Duration::from_millis(20);

/// What the fleet may use, and what its engine keeps.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Budget {
    /// In pages.
    pub capacity: u64,
    /// Pages of slabs that no guest uses.
    pub dead_slabs: u64,
    /// Pages of slabs that images keep.
    pub image_pages: u64,
    /// Of those, pages of slabs that none keeps that has a name.
    pub unnamed_image_pages: u64,
    /// Pages of processes that stand by for clones.
    pub pool_pages: u64,
    /// Whether an engine merges.
    pub merging: bool,
    /// Pages of all slabs that no image has, in use or not, as they are now; None where the engine has no slabs, or was not asked.
    pub slab_pages: Option<u64>,
}

impl Budget {
    /// Frames of all slabs, those of images too; None where the engine has none, or was not asked.
    pub fn slab_frames(&self) -> Option<u64> {
        self.slab_pages.map(|pages| pages + self.image_pages)
    }
}

/// A ledger, and what it was made of.
#[derive(Clone, Debug)]
pub struct Reading {
    /// The ledger.
    pub ledger: Ledger,
    /// The frames it counts.
    pub frames: Frames,
    /// What each guest's VM said, in the order of `frames.guests`.
    pub said: Vec<Said>,
    /// Processor time that reading it took here, in seconds.
    pub seconds: f64,
    /// The audit, where one was asked for.
    pub audit: Option<Audit>,
}

/// A ledger that is read again and again.
#[derive(Clone, Debug)]
pub struct Look {
    /// The ledger.
    pub ledger: Ledger,
    /// Processor time that reading it took, in seconds.
    pub seconds: f64,
    /// The same without walks, which keep to their own limit.
    pub own_seconds: f64,
}

/// Reads the ledger as [`read_heard`] does, by `rolling` where that can tell: then walks that are due are waited for `patience` long.
pub fn look(
    handles: &[VmHandle],
    heard: &[Option<Said>],
    budget: Budget,
    rolling: &mut Rolling,
    patience: Duration,
) -> Result<Look, HostError> {
    let begin = thread_time();
    let running = handles.iter().zip(heard).filter(|(handle, _)| is_running(handle.pid));
    let asked: Vec<(&VmHandle, Said)> =
        running.filter_map(|(handle, said)| Some((handle, said.clone()?))).collect();
    let subject = |(_, said): &(&VmHandle, Said)| Subject {
        space: said.space(),
        parked_pages: said.status.parked_pages,
        given_back_pages: said.balloon.as_ref().map_or(0, |balloon| balloon.host.absent_pages),
    };
    let subjects: Vec<Subject> = asked.iter().map(subject).collect();
    // Those of images are slabs, too.
    let slab_pages = budget.slab_frames();
    let Some(reading) = rolling.read(&subjects, slab_pages, patience)? else {
        let Reading { ledger, seconds, .. } = read_heard(handles, heard, budget)?;
        return Ok(Look { ledger, seconds, own_seconds: seconds });
    };
    let estimated = reading.guests.iter().any(|guest| guest.estimated);
    let seen: Vec<Seen<'_>> = reading.guests.iter().map(Seen::recently).collect();
    let ledger = account(&asked, &seen, (reading.frames, reading.slab_frames), estimated, budget);
    let own = thread_time().saturating_sub(begin);
    Ok(Look { ledger, seconds: (own + reading.walks).as_secs_f64(), own_seconds: own.as_secs_f64() })
}

/// Reads the ledger of those of `handles` that run, all of which are asked. With `audited`, checks it by other means, too.
pub fn read(handles: &[VmHandle], budget: Budget, audited: bool) -> Result<Reading, HostError> {
    read_with(handles, budget, audited, &|| {
        vm_handle::each(handles, |_, handle| is_running(handle.pid).then(|| handle.ask()))
    })
}

/// Reads the ledger of those of `handles` that run by what their VMs said last, which need not answer for that: one that was never heard is
/// left out.
pub fn read_heard(
    handles: &[VmHandle],
    heard: &[Option<Said>],
    budget: Budget,
) -> Result<Reading, HostError> {
    let said =
        |(handle, said): (&VmHandle, &Option<Said>)| said.clone().filter(|_| is_running(handle.pid)).map(Ok);
    read_with(handles, budget, false, &|| handles.iter().zip(heard).map(said).collect())
}

fn read_with(
    handles: &[VmHandle],
    budget: Budget,
    audited: bool,
    ask: &dyn Fn() -> Vec<Option<Result<Said, HostError>>>,
) -> Result<Reading, HostError> {
    let begin = thread_time();
    // One that ends between two questions is left out the next time.
    for _ in 0..=handles.len() {
        let mut asked = Vec::new();
        for (handle, said) in handles.iter().zip(ask()) {
            match said {
                Some(Ok(said)) => asked.push((handle, said)),
                // Its sockets are gone before its process is.
                Some(Err(error)) if !ends_soon(handle.pid) => return Err(error),
                _ => {}
            }
        }
        let spaces: Vec<Space> = asked.iter().map(|(_, said)| said.space()).collect();
        let counted = match audited {
            true => audit::audit(&spaces).map(|(frames, audit)| (frames, Some(audit))),
            false => by_kind::measure(&spaces).map(|frames| (frames, None)),
        };
        let (frames, audit) = match counted {
            Ok(counted) => counted,
            Err(_) if asked.iter().any(|(handle, _)| ends_soon(handle.pid)) => continue,
            Err(error) => return Err(error.into()),
        };
        let seen: Vec<Seen<'_>> = frames.guests.iter().map(Seen::now).collect();
        let ledger = account(&asked, &seen, (frames.frames, frames.slab_frames), frames.estimated, budget);
        let said = asked.into_iter().map(|(_, said)| said).collect();
        return Ok(Reading {
            ledger,
            frames,
            said,
            seconds: thread_time().saturating_sub(begin).as_secs_f64(),
            audit,
        });
    }
    Err(HostError::Measure(MeasureError::TooMany { guests: handles.len() }))
}

/// Whether this process has ended, or does so within a moment.
fn ends_soon(pid: u32) -> bool {
    (0..ENDING_LOOKS).any(|_| {
        let ended = !is_running(pid);
        if !ended {
            std::thread::sleep(ENDING_PAUSE);
        }
        ended
    })
}

/// What was seen of a guest and its process.
struct Seen<'a> {
    frames: &'a GuestFrames,
    process: ProcessPages,
    ksm: KsmStat,
    walk_age: Option<Duration>,
    by_counters: bool,
}

impl<'a> Seen<'a> {
    /// Just now.
    fn now(frames: &'a GuestFrames) -> Self {
        Self {
            frames,
            process: ProcessPages::of(frames.pid).unwrap_or_default(),
            ksm: KsmStat::of(frames.pid).unwrap_or_default(),
            walk_age: None,
            by_counters: false,
        }
    }

    fn recently(recent: &'a Recent) -> Self {
        let Recent { frames, process, ksm, walk_age, by_counters, .. } = recent;
        let walk_age = (*walk_age > Duration::ZERO).then_some(*walk_age);
        Self { frames, process: *process, ksm: *ksm, walk_age, by_counters: *by_counters }
    }
}

fn account(
    asked: &[(&VmHandle, Said)],
    seen: &[Seen<'_>],
    (frames, slab_frames): (u64, u64),
    estimated: bool,
    budget: Budget,
) -> Ledger {
    let readings = Host::default().read().ok();
    let mut overhead = HostOverhead {
        dead_slabs: budget.dead_slabs,
        held_by_images: match budget.image_pages {
            0 => 0,
            // All that slabs have, and that is neither in a page table nor the engine's to drop.
            pages => (pages + budget.slab_pages.unwrap_or(0)).saturating_sub(slab_frames + budget.dead_slabs),
        },
        pool: budget.pool_pages,
        second_level_of_host: readings.as_ref().map_or(0, |r| r.second_level_pages),
        ..HostOverhead::default()
    };
    if let Ok(own) = ProcessPages::of(std::process::id()) {
        // The program is the same file in all VM processes: its pages are counted once, here.
        overhead.daemon = own.anonymous + own.file + own.page_tables;
    }
    let (mut guests, mut parked_frames) = (Vec::new(), 0);
    for ((handle, said), Seen { frames: seen, process, ksm, walk_age, by_counters }) in asked.iter().zip(seen)
    {
        // Pages that are parked to see whether the guest touches them have frames, elsewhere.
        let parked = said.status.parked_pages.min(seen.pages.absent);
        parked_frames += parked;
        let of_guest = seen.anonymous.saturating_sub(seen.pages.zero) + parked;
        overhead.ksm_metadata += (ksm.rmap_items * RMAP_ITEM_BYTES).div_ceil(PAGE_BYTES);
        guests.push(GuestNumbers {
            name: handle.guest.clone(),
            classes: Classes {
                absent: seen.pages.absent - parked,
                image: seen.pages.image,
                ballooned: 0,
                zero: seen.pages.zero,
                private: seen.pages.private + parked,
                shared: seen.pages.shared,
                swapped: seen.pages.swapped,
            },
            balloon_absent: said.balloon.as_ref().map_or(0, |balloon| balloon.host.absent_pages),
            frames: seen.frames + parked as f64,
            to_give: said.to_give_pages(),
            minimum: handle.reservation.min_bytes / PAGE_BYTES,
            overhead: GuestOverhead {
                vmm: process.anonymous.saturating_sub(of_guest),
                page_tables: process.page_tables,
            },
            walk_age_seconds: walk_age.map(|age| age.as_secs_f64()),
            by_counters: *by_counters,
        });
    }
    let host = HostNumbers {
        capacity: budget.capacity,
        available: readings.as_ref().map_or(budget.capacity, |r| r.free_pages()),
        swap_free: readings.as_ref().map_or(0, |r| r.swap_free_pages),
        frames: frames + parked_frames,
        overhead,
    };
    Ledger::of(&guests, &host, estimated)
}
