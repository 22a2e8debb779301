//! Captures a VM at one instant: state and memory. The guest is paused meanwhile, and goes on as if nothing had been.
//!
//! In two parts. The first copies memory while the guest runs, and takes as long as that takes: it is done on a thread of its own, and the VM is
//! served meanwhile. The second pauses the guest, takes its state, and what it has written since.

pub mod link;
mod since;

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use kvm_ioctls::VmFd;
use memory::image::{Ahead, ImageError, Slabs, Taken, most_pages};
use memory::slab::{Draft, Slab};
use serde::{Deserialize, Serialize};
use thiserror::Error;

use self::link::{Answer, Ask, Link};
use self::since::Since;
use super::create::create_vcpus;
use super::error::VmError;
use super::handover::sealed;
use super::probe;
use super::running::Running;
use super::state::StateError;
use super::state::chips::ChipsV1;
use super::state::counters::{self, Reading};
use super::state::msrs::Savable;
use super::state::saved::{Around, DevicesV1, MachineV1, MemoryV1, VmState};
use super::state::vcpu::{VcpuV1, xsave_bytes};

/// How long the keeper of the image may take for an answer, and the guest be kept waiting for it.
const KEEPER_LIMIT: Duration = Duration::from_secs(5);

/// Why a VM was not captured. It runs on as before.
#[derive(Debug, Error)]
pub enum CaptureError {
    /// It has something that no copy may have.
    #[error("this VM cannot be captured: {0}")]
    Unsuited(&'static str),
    /// It did not stop.
    #[error("a vCPU did not leave the guest in time, or a drive did not answer; the VM runs on")]
    Pause,
    /// A vCPU has ended.
    #[error("a vCPU does not answer, or has ended")]
    Vcpu,
    /// The VM has.
    #[error("the VM has ended")]
    Ended,
    /// Its state cannot be taken.
    #[error("its state cannot be taken")]
    State(#[from] StateError),
    /// Its memory cannot.
    #[error("its memory cannot be taken")]
    Memory(#[from] ImageError),
    /// What it wrote to a drive cannot be copied.
    #[error("what the guest has written to drive {id:?} cannot be copied")]
    Disk {
        /// Which.
        id: String,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// What a fresh vCPU of this host can be given cannot be found out.
    #[error("a VM to compare with cannot be made")]
    Vm(#[from] VmError),
    /// The keeper of the image went away, or does not answer.
    #[error("the keeper of the image does not answer")]
    Keeper(#[source] io::Error),
    /// The keeper did not keep it.
    #[error("the keeper of the image refuses: {0}")]
    Refused(String),
    /// It does not fit its form.
    #[error("its state cannot be written")]
    Encode(#[source] io::Error),
}

/// What a capture took.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Captured {
    /// Bytes of the state.
    pub state_bytes: u64,
    /// Runs of pages in slabs.
    pub runs: u64,
    /// Pages that were copied.
    pub copied_pages: u64,
    /// Of those, pages that were copied while the guest ran, and not written since.
    #[serde(default)]
    pub ahead_pages: u64,
    /// Pages that were referenced in slabs where they lay.
    pub referenced_pages: u64,
    /// For how long the guest was paused, in microseconds.
    pub pause_us: u64,
}

/// A capture of which the first part is done. The guest may run.
pub(super) struct Begun {
    savable: Arc<Savable>,
    slabs: Kept,
    ahead: Ahead,
    /// None where there is no log.
    since: Option<Since>,
}

impl Running {
    /// Begins to take what it is, and to give it to the keeper that listens at `socket`. May be done on any thread.
    pub(super) fn begin_capture(&self, socket: &Path) -> Result<Begun, CaptureError> {
        if let Some(why) = self.not_captured {
            return Err(CaptureError::Unsuited(why));
        }
        let savable = self.savable()?;
        let keeper = Link::connect(socket, KEEPER_LIMIT).map_err(CaptureError::Keeper)?;
        let left = most_pages(self.ram.pages().pages());
        let mut slabs = Kept { keeper, pages: Vec::new(), made: Vec::new(), left, is_full: false };
        // Before the first page is copied. Where it cannot be had, all pages are compared.
        let since = Since::begin(&self.write_log, &self.ram).ok();
        let ahead = self.ram.copy_ahead(&mut slabs)?;
        Ok(Begun { savable, slabs, ahead, since })
    }

    /// Takes what is left. If it runs, it is stopped for that time; on an error it has lost no more.
    pub(super) fn end_capture(&self, mut begun: Begun) -> Result<Captured, CaptureError> {
        let was_paused = self.is_paused();
        let began = Instant::now();
        if !was_paused && !self.pause() {
            return Err(CaptureError::Pause);
        }
        let taken = self.take(&mut begun);
        if !was_paused {
            self.resume();
        }
        let pause_us = u64::try_from(began.elapsed().as_micros()).unwrap_or(u64::MAX);
        Ok(Captured { pause_us, ..taken? })
    }

    /// Which model-specific registers there are to save: found out once, by a VM that is made for that.
    pub(super) fn savable(&self) -> Result<Arc<Savable>, CaptureError> {
        if let Some(known) = self.savable.get() {
            return Ok(known.clone());
        }
        let kvm = &*self.kvm;
        let vm = kvm.create_vm().map_err(VmError::kvm("create a VM"))?;
        vm.create_irq_chip().map_err(VmError::kvm("create the interrupt controllers"))?;
        let vcpus = create_vcpus(kvm, &vm, 1)?;
        let fresh = vcpus.first().ok_or(CaptureError::Vcpu)?;
        let found = Arc::new(Savable::find(kvm, fresh)?);
        Ok(self.savable.get_or_init(|| found).clone())
    }

    /// What was copied ahead is unmapped later: that would keep the guest waiting.
    fn take(&self, begun: &mut Begun) -> Result<Captured, CaptureError> {
        let Begun { savable, slabs, ahead, since } = begun;
        let still = self.take_still(savable)?;
        self.take_disks(slabs)?;
        let taken = self.take_memory(slabs, ahead, since.as_mut())?;
        let run = |run: &memory::image::ImageRun| {
            // A run lies in one slab.
            (run.page.0, u32::try_from(run.pages).unwrap_or(u32::MAX), run.slab, run.slab_page.0)
        };
        let memory =
            MemoryV1 { slabs: std::mem::take(&mut slabs.pages), runs: taken.runs.iter().map(run).collect() };
        let state = still.with(Around::Image(memory));
        let bytes = state.encode().map_err(|error| CaptureError::Encode(io::Error::other(error)))?;
        let file = sealed("samepage-state", &bytes).map_err(CaptureError::Encode)?;
        match ask(&slabs.keeper, &Ask::State, Some(file.as_fd())).map_err(CaptureError::Keeper)?.0 {
            Answer::Kept => {
                if let Some(found) = &self.found_slabs {
                    os::lock(found).extend(slabs.made.drain(..));
                }
            }
            Answer::Refused(why) => return Err(CaptureError::Refused(why)),
            _ => return Err(CaptureError::Keeper(io::ErrorKind::InvalidData.into())),
        }
        Ok(Captured {
            state_bytes: bytes.len() as u64,
            runs: taken.runs.len() as u64,
            copied_pages: taken.copied + taken.ahead,
            ahead_pages: taken.ahead,
            referenced_pages: taken.referenced,
            pause_us: 0,
        })
    }

    /// Has the keeper copy what the guest has written to drives with overlays. No request is in flight.
    fn take_disks(&self, slabs: &mut Kept) -> Result<(), CaptureError> {
        let drives = os::lock(&self.drives);
        for (drive, attached) in (0..).zip(&*drives) {
            let Some((top, start)) = &attached.top else { continue };
            let failed = |source| CaptureError::Disk { id: attached.id.clone(), source };
            if let Some(map) = attached.handle.written(KEEPER_LIMIT).map_err(failed)? {
                let map = sealed("samepage-map", &map).map_err(failed)?;
                slabs.give(&Ask::Map, map.as_fd()).map_err(failed)?;
            }
            let disk = Ask::Disk { drive, start: *start, bytes: attached.bytes };
            slabs.give(&disk, top.as_fd()).map_err(failed)?;
        }
        Ok(())
    }

    fn take_memory(
        &self,
        slabs: &mut Kept,
        ahead: &Ahead,
        since: Option<&mut Since>,
    ) -> Result<Taken, CaptureError> {
        let written = since.and_then(Since::written);
        let taken = match &written {
            Some(written) => self.ram.capture_written(slabs, ahead, written),
            None => self.ram.capture(slabs, ahead),
        };
        let taken = match taken {
            // It has written here and there: where all is compared the pieces are fewer.
            Err(ImageError::Runs) if written.is_some() && !slabs.is_full => self.ram.capture(slabs, ahead),
            taken => taken,
        };
        match taken {
            // It has written so much since that both copies are more than the keeper takes.
            Err(_) if slabs.is_full => {
                slabs.restart(most_pages(self.ram.pages().pages())).map_err(CaptureError::Keeper)?;
                Ok(self.ram.capture(slabs, &Ahead::default())?)
            }
            taken => Ok(taken?),
        }
    }

    /// Takes all but its memory. It stands still.
    pub(super) fn take_still(&self, savable: &Arc<Savable>) -> Result<Still, CaptureError> {
        let vm = self.vm.upgrade().ok_or(CaptureError::Ended)?;
        // Before the vCPUs: a device may interrupt.
        let devices = self.board.save();
        let (mut vcpus, readings) = self.take_vcpus(savable, &vm)?;
        let chips = ChipsV1::save(&vm)?;
        counters::pin(&mut vcpus, &readings, chips.clock);
        let machine = MachineV1 {
            backend: probe::backend_name().to_owned(),
            memory_bytes: self.ram.bytes(),
            vcpus: self.vcpu_count,
        };
        Ok(Still { machine, chips, vcpus, devices })
    }

    fn take_vcpus(
        &self,
        savable: &Arc<Savable>,
        vm: &Arc<VmFd>,
    ) -> Result<(Vec<VcpuV1>, Vec<Reading>), CaptureError> {
        type Saved = Result<(VcpuV1, Reading), StateError>;
        type Slots = Mutex<Vec<Option<Saved>>>;
        let slots: Arc<Slots> = Arc::new(Mutex::new((0..self.vcpu_count).map(|_| None).collect()));
        let (filled, savable, weak) = (slots.clone(), savable.clone(), Arc::downgrade(vm));
        let sent = self.vcpus().send(Arc::new(move |n, vcpu| {
            // The VM is its owner's, to end it.
            let Some(vm) = weak.upgrade() else { return };
            let saved = VcpuV1::save(vcpu, &savable, xsave_bytes(&vm));
            let saved = saved.and_then(|saved| Ok((saved, Reading::take(&vm, vcpu)?)));
            if let Some(slot) = os::lock(&filled).get_mut(n) {
                *slot = Some(saved);
            }
        }));
        if !sent {
            return Err(CaptureError::Vcpu);
        }
        let saved = std::mem::take(&mut *os::lock(&slots));
        let each =
            saved.into_iter().map(|saved| saved.ok_or(CaptureError::Vcpu)?.map_err(CaptureError::from));
        Ok(each.collect::<Result<Vec<_>, _>>()?.into_iter().unzip())
    }
}

/// What a VM that stands still is, without its memory.
pub(super) struct Still {
    machine: MachineV1,
    chips: ChipsV1,
    vcpus: Vec<VcpuV1>,
    devices: DevicesV1,
}

impl Still {
    /// All of it.
    pub(super) fn with(self, around: Around) -> VmState {
        let Self { machine, chips, vcpus, devices } = self;
        VmState { machine, chips, vcpus, devices, around, pair: None, mmds: None }
    }
}

fn ask(
    keeper: &Link,
    question: &Ask,
    file: Option<std::os::fd::BorrowedFd<'_>>,
) -> io::Result<(Answer, Option<std::fs::File>)> {
    keeper.send(question, file)?;
    keeper.receive()
}

/// Slabs that the keeper has.
struct Kept {
    keeper: Link,
    /// Pages of each, by number.
    pages: Vec<u32>,
    /// Those that were filled here.
    made: Vec<Slab>,
    /// Pages that the keeper takes yet.
    left: u64,
    /// There was a slab of more.
    is_full: bool,
}

impl Kept {
    fn ask(&self, question: &Ask) -> io::Result<(Answer, Option<std::fs::File>)> {
        match ask(&self.keeper, question, None)? {
            (Answer::Refused(why), _) => Err(io::Error::other(why)),
            answered => Ok(answered),
        }
    }

    /// Gives the keeper something that it keeps, or copies.
    fn give(&self, what: &Ask, file: BorrowedFd<'_>) -> io::Result<()> {
        match ask(&self.keeper, what, Some(file))?.0 {
            Answer::Kept => Ok(()),
            Answer::Refused(why) => Err(io::Error::other(why)),
            _ => Err(io::ErrorKind::InvalidData.into()),
        }
    }

    /// Has the keeper forget what it has, and take `left` pages.
    fn restart(&mut self, left: u64) -> io::Result<()> {
        match self.ask(&Ask::Restart)?.0 {
            Answer::Restarted => {
                (self.pages, self.made) = (Vec::new(), Vec::new());
                (self.left, self.is_full) = (left, false);
                Ok(())
            }
            _ => Err(io::ErrorKind::InvalidData.into()),
        }
    }

    fn number(&mut self, number: u32, pages: u64) -> io::Result<u32> {
        let invalid = io::Error::from(io::ErrorKind::InvalidData);
        let (at, pages) = (number as usize, u32::try_from(pages).map_err(|_| io::ErrorKind::InvalidData)?);
        match self.pages.get(at) {
            None if at == self.pages.len() => self.pages.push(pages),
            Some(known) if *known == pages => {}
            _ => return Err(invalid),
        }
        Ok(number)
    }
}

impl Slabs for Kept {
    fn draft(&mut self, pages: u64) -> io::Result<Draft> {
        match self.ask(&Ask::Draft(pages))? {
            (Answer::Draft, Some(file)) => Draft::receive(file.into(), pages).map_err(io::Error::other),
            _ => Err(io::ErrorKind::InvalidData.into()),
        }
    }

    fn filled(&mut self, slab: &Slab) -> io::Result<u32> {
        // The keeper would refuse it, and end.
        let Some(left) = self.left.checked_sub(slab.pages()) else {
            self.is_full = true;
            return Err(io::Error::other("more is given than the keeper takes"));
        };
        self.left = left;
        match self.ask(&Ask::Filled(slab.pages()))?.0 {
            Answer::Number(number) => {
                // Without it the agent offers its domain less.
                self.made.extend(slab.try_clone());
                self.number(number, slab.pages())
            }
            _ => Err(io::ErrorKind::InvalidData.into()),
        }
    }

    fn known(&mut self, inode: u64, used: u64) -> io::Result<Option<(u32, u64)>> {
        match self.ask(&Ask::Known { inode, used })?.0 {
            Answer::Known(None) => Ok(None),
            Answer::Known(Some((number, pages))) => Ok(Some((self.number(number, pages)?, pages))),
            _ => Err(io::ErrorKind::InvalidData.into()),
        }
    }
}
