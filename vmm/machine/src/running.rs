//! What a VM can be asked to do while it runs, by its control socket or its API.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, Weak};
use std::time::{Duration, Instant};

use devices::rate_limiter::{Limiter, LimiterState, Limits};
use devices::virtio::balloon;
use devices::virtio::net::Limiters;
use kvm_ioctls::{Kvm, VmFd};
use vmm_sys_util::eventfd::EventFd;

use super::balloon::{BalloonError, BalloonStatus};
use super::board::Board;
use super::dirty::DirtyLog;
use super::drive::{Attached, Drive, DriveError};
use super::exit::{Ending, Outcome};
use super::last_words::LastWords;
use super::probe;
use super::shut_down::ShutDown;
use super::state::msrs::Savable;
use super::stats::KvmStats;
use super::status::Status;
use super::throttle::ThrottleError;
use super::tracking::Tracking;
use super::trouble::Trouble;
use super::vcpu::{Shared, Vcpus};
use super::working_set::{Sampler, WorkingSet, WorkingSetError};
use memory::PageSet;
use memory::page_out::{Clock, PageOutError, PagedOut};
use memory::ram::{Backing, Ram};
use memory::written::WriteLog;
use merge::slab::agent::FoundSlabs;

/// How long pages are paged out for one request: everything else on the main thread waits meanwhile.
const PAGE_OUT_LIMIT: Duration = Duration::from_millis(50);
/// How long devices may take to finish what is in flight before a VM counts as paused.
const QUIET_LIMIT: Duration = Duration::from_secs(2);

/// The way to a running VM. Clones share it; all of them are used on the main thread.
#[derive(Clone)]
pub struct Running {
    pub(super) name: String,
    pub(super) vcpu_count: u8,
    pub(super) ram: Ram,
    pub(super) write_log: DirtyLog,
    pub(super) tracking: Tracking,
    /// Its drives, in order.
    pub(super) drives: Arc<Mutex<Vec<Attached>>>,
    /// Its network interfaces, in order.
    pub(super) nets: Arc<Vec<NetHandle>>,
    /// How many random bytes it gets.
    pub(super) entropy: Limiter,
    /// Whether the process that fills its memory has ended, if there is one.
    pub(super) handler_ended: Option<Arc<AtomicBool>>,
    /// Whether its devices are to be woken before it runs.
    pub(super) wakes: Arc<AtomicBool>,
    pub(super) stats: Arc<KvmStats>,
    pub(super) vcpus: Arc<Mutex<Vcpus>>,
    pub(super) devices_paused: Arc<AtomicBool>,
    pub(super) devices_resumed: Arc<EventFd>,
    pub(super) balloon: Option<balloon::Handle>,
    pub(super) clock: Arc<Mutex<Clock>>,
    pub(super) sampler: Sampler,
    pub(super) shut_down: ShutDown,
    pub(super) last_words: LastWords,
    pub(super) shared: Arc<Shared>,
    pub(super) outcome: Outcome,
    pub(super) console_trouble: Trouble,
    /// Where the agent looks for slabs of images, if there is one.
    pub(super) found_slabs: Option<FoundSlabs>,
    /// What holds state of the guest, for [`Self::capture`].
    pub(super) board: Board,
    pub(super) vm: Weak<VmFd>,
    /// What other VMs are made by: the process opens no device once its guest runs.
    pub(super) kvm: Arc<Kvm>,
    pub(super) savable: Arc<OnceLock<Arc<Savable>>>,
    /// Why it cannot be captured, if it cannot.
    pub(super) not_captured: Option<&'static str>,
}

/// The way to a network interface.
pub(super) struct NetHandle {
    /// Which of the virtio devices it is.
    pub(super) device: usize,
    pub(super) limiters: Limiters,
}

impl Running {
    /// What the VM is.
    pub fn status(&self) -> Status {
        Status {
            name: self.name.clone(),
            pid: std::process::id(),
            paused: self.is_paused(),
            vcpus: self.vcpu_count,
            memory_bytes: self.ram.bytes(),
            backend: probe::backend_name().to_owned(),
            extents: self.ram.extents(),
            throttle: self.shared.throttle.status(),
            parked_pages: self.ram.parked_pages(),
            log_trouble: self.console_trouble.why(),
            frames: None,
            pmem: Vec::new(),
            panic: self.last_words.panic(),
        }
    }

    /// Whether its vCPUs are paused.
    pub fn is_paused(&self) -> bool {
        self.devices_paused.load(Ordering::SeqCst)
    }

    /// Stops all vCPUs in place, and has devices finish what is in flight. False if a vCPU did not leave the guest in time, or a drive did
    /// not answer; then the VM runs on.
    pub fn pause(&self) -> bool {
        // A paused VM's memory is looked at from outside: all of it is to be where it belongs.
        self.ram.forbid_parking();
        let vcpus = self.vcpus();
        let still = vcpus.pause() && self.board.quiesce(Instant::now() + QUIET_LIMIT);
        match still {
            true => self.devices_paused.store(true, Ordering::SeqCst),
            false => {
                vcpus.resume();
                self.ram.allow_parking();
            }
        }
        still
    }

    /// Lets the vCPUs run again.
    pub fn resume(&self) {
        self.wake();
        self.devices_paused.store(false, Ordering::SeqCst);
        let _ = self.devices_resumed.write(1);
        self.vcpus().resume();
        self.ram.allow_parking();
    }

    /// Has the devices of one that goes on from elsewhere look at what is waiting, once.
    pub(super) fn wake(&self) {
        if self.wakes.swap(false, Ordering::SeqCst) {
            self.board.wake();
            self.shared.rouse(self.vcpu_count);
        }
    }

    /// Its name.
    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// The process that fills its memory has ended: stops it. False if a vCPU sleeps on a page, and stands so.
    pub(super) fn handler_has_ended(&self) -> bool {
        self.handler_ended.iter().for_each(|ended| ended.store(true, Ordering::SeqCst));
        self.is_paused() || self.pause()
    }

    /// Whether that is so.
    pub(super) fn handler_is_gone(&self) -> bool {
        self.handler_ended.as_ref().is_some_and(|ended| ended.load(Ordering::SeqCst))
    }

    /// Presses the power button. False if the guest has no driver for it.
    pub fn press_power_button(&self) -> bool {
        self.shut_down.press()
    }

    /// Puts the file of `drive` in the place of the one that the drive of its name has.
    pub fn replace_drive(&self, drive: &Drive) -> Result<(), DriveError> {
        let mut drives = os::lock(&self.drives);
        let known = || drives.iter().map(|known| known.id.as_str()).collect::<Vec<_>>().join(", ");
        let Some(at) = drives.iter().position(|known| known.id == drive.id) else {
            return Err(DriveError::Unknown { id: drive.id.clone(), known: known() });
        };
        let Some(attached) = drives.get_mut(at) else { return Ok(()) };
        let disk = Drive { read_only: attached.read_only, ..drive.clone() }.open_after(&attached.file)?;
        let failed = |source| DriveError::Open { path: drive.path.clone(), access: "reading", source };
        attached.file = disk.medium.file().try_clone().map_err(failed)?;
        attached.handle.replace(disk);
        self.shared.input_arrived();
        Ok(())
    }

    /// Asks the guest to power off, by its power button and, if there is one, by a line on COM2. When it has not after
    /// `limit`, the VM is stopped. A paused guest is resumed: as it is it can do nothing.
    pub fn shut_down(&self, limit: Duration, com2: Option<&str>) -> std::io::Result<()> {
        if limit.is_zero() {
            self.outcome.tell(Ending::Stopped);
            return Ok(());
        }
        self.shut_down.begin(limit, com2)?;
        if self.is_paused() {
            self.resume();
        }
        Ok(())
    }

    /// Guest RAM.
    pub fn ram(&self) -> &Ram {
        &self.ram
    }

    /// Which pages of guest RAM are written, by vCPUs and by devices, as merging sees it; only one thread may clear.
    pub fn write_log(&self) -> DirtyLog {
        self.write_log.clone()
    }

    /// The host's way to the balloon, if there is one.
    pub fn balloon(&self) -> Option<&balloon::Handle> {
        self.balloon.as_ref()
    }

    /// The balloon as it is now.
    pub fn balloon_status(&self) -> Result<BalloonStatus, BalloonError> {
        let balloon = self.balloon.as_ref().ok_or(BalloonError::None)?;
        Ok(BalloonStatus::of(balloon, &self.ram)?)
    }

    /// Asks the guest for another balloon size.
    pub fn set_balloon(&self, pages: u32) -> Result<(), BalloonError> {
        let balloon = self.balloon.as_ref().ok_or(BalloonError::None)?;
        let ram_pages = self.ram.pages().pages();
        if u64::from(pages) > ram_pages {
            return Err(BalloonError::TooLarge { pages, ram_pages });
        }
        balloon.set_target(pages);
        self.shared.input_arrived();
        Ok(())
    }

    /// Asks the guest for fresh balloon statistics, unless it is paused. False if it has left no buffer to ask with.
    pub fn request_balloon_statistics(&self) -> bool {
        let asked =
            !self.is_paused() && self.balloon.as_ref().is_some_and(balloon::Handle::request_statistics);
        self.shared.input_arrived();
        asked
    }

    /// Starts a run of free page hinting; see [`balloon::Handle::start_hinting`].
    pub fn start_hinting(&self, acknowledge_on_stop: bool) -> Result<(), BalloonError> {
        let balloon = self.balloon.as_ref().ok_or(BalloonError::None)?;
        balloon.start_hinting(acknowledge_on_stop)?;
        self.shared.input_arrived();
        Ok(())
    }

    /// Ends the run of free page hinting.
    pub fn stop_hinting(&self) -> Result<(), BalloonError> {
        let balloon = self.balloon.as_ref().ok_or(BalloonError::None)?;
        balloon.stop_hinting()?;
        self.shared.input_arrived();
        Ok(())
    }

    /// Paces how fast the guest takes frames: at most `pages_per_second`, at least 1; None lifts the limit at once.
    pub fn set_throttle(&self, pages_per_second: Option<u64>) -> Result<(), ThrottleError> {
        if self.ram.backing() != Backing::Anonymous && pages_per_second.is_some() {
            return Err(ThrottleError::NotAnonymous);
        }
        self.vcpus().throttle(pages_per_second)?;
        // Devices that wait for the old rate look again.
        let _ = self.devices_resumed.write(1);
        Ok(())
    }

    /// Pages up to `pages` pages out to the host's swap, of those that are the guest's own and, where the log of writes is on, were not
    /// written since it was cleared. For some milliseconds: ask again for more.
    pub fn page_out(&self, pages: u64) -> Result<PagedOut, PageOutError> {
        let until = Instant::now() + PAGE_OUT_LIMIT;
        let ram_pages = self.ram.pages().pages();
        let mut keep = self.written().unwrap_or_else(|| PageSet::none(ram_pages));
        if let Some(balloon) = &self.balloon {
            let held = balloon.held();
            let pages = held.iter().flat_map(|held| self.ram.pages_at(held.clone()));
            pages.for_each(|pages| keep.insert_range(pages));
        }
        os::lock(&self.clock).page_out(&self.ram, pages, &keep, until)
    }

    /// How much of its memory the guest uses.
    pub fn working_set(&self) -> Result<WorkingSet, WorkingSetError> {
        let written_pages = self.written().map(|log| log.count());
        Ok(WorkingSet { written_pages, ..self.sampler.last()? })
    }

    /// Which pages may have been written since the log was last cleared, whatever it is on for; None if it is off. Clears nothing.
    fn written(&self) -> Option<PageSet> {
        let mut written = PageSet::default();
        self.write_log().read(&mut written).ok().map(|()| written)
    }

    /// Puts other buckets in the place of those that are given, at network interface `number`. False if there is none.
    pub fn set_net_limits(&self, number: usize, receive: Limits, transmit: Limits) -> bool {
        let Some(net) = self.nets.get(number) else { return false };
        net.limiters.receive.set(receive);
        net.limiters.transmit.set(transmit);
        // What waited for the old ones looks again.
        self.board.virtio.iter().skip(net.device).take(1).for_each(|device| os::lock(device).wake());
        true
    }

    /// The limits of network interface `number` and how full their buckets are: to the guest, and from it.
    pub fn net_limits(&self, number: usize) -> [Option<LimiterState>; 2] {
        let net = self.nets.get(number);
        net.map(|net| [net.limiters.receive.save(), net.limiters.transmit.save()]).unwrap_or_default()
    }

    /// The limits of the entropy device.
    pub fn entropy_limits(&self) -> Option<LimiterState> {
        self.entropy.save()
    }

    /// KVM's own statistics.
    pub fn kvm_stats(&self) -> &KvmStats {
        &self.stats
    }

    pub(super) fn vcpus(&self) -> MutexGuard<'_, Vcpus> {
        os::lock(&self.vcpus)
    }
}
