//! vCPU threads: run, pause, resume, stop, and what each KVM exit does.

use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use devices::bus::Bus;
use kvm_bindings::{KVM_SYSTEM_EVENT_CRASH, KVM_SYSTEM_EVENT_RESET, KVM_SYSTEM_EVENT_SHUTDOWN};
use kvm_ioctls::{VcpuExit, VcpuFd};
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

use super::coalesced::Ring;
use super::error::VmError;
use super::exit::{Ending, Fault, Outcome};
use super::platform::IDLE_PORT;
use super::pmem::Regions;
use super::run_page::RunPage;
use super::slice::{self, Interruptible, Slices};
use super::throttle::{Throttle, ThrottleError};
use memory::merge_log::MergeLog;

/// How long `pause` waits for vCPUs to leave the guest before it gives up.
const PAUSE_LIMIT: Duration = Duration::from_secs(5);

/// What the vCPU threads are to do.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Wanted {
    Run,
    Pause,
    Stop,
}

struct Gate {
    wanted: Wanted,
    /// vCPUs that are paused or held.
    still: usize,
    /// Threads that have not ended.
    alive: usize,
    /// What each vCPU is to do where it stands, the number of that, and how many have done it.
    errand: Option<Errand>,
    errands: u64,
    done: usize,
    /// Times that a vCPU is to come back from its wait for input at once.
    roused: usize,
}

/// Something that is done to a paused vCPU, by its own thread: KVM takes most calls from no other.
/// It has completed what it exited for.
pub type Errand = Arc<dyn Fn(usize, &VcpuFd) + Send + Sync>;

/// What a vCPU's thread does next.
enum Next {
    Run,
    End,
    Errand(Errand),
}

/// What the threads of one VM share.
pub struct Shared {
    gate: Mutex<Gate>,
    changed: Condvar,
    /// Devices on ports.
    pub pio: Bus,
    /// Devices in memory.
    pub mmio: Bus,
    /// Is there console or control input, or a device's interrupt, that the guest has not looked
    /// at?
    pub input_waits: Box<dyn Fn() -> bool + Send + Sync>,
    /// Sets the ending that the guest has asked for, if it is not set yet. Whether there was one.
    pub has_ended: Box<dyn Fn() -> bool + Send + Sync>,
    /// Where a vCPU says that the VM has ended.
    pub outcome: Outcome,
    /// What was done to guest RAM, for a fault's report.
    merges: MergeLog,
    /// The files that the guest has as memory.
    pub(super) regions: Arc<Regions>,
    /// How fast the guest may take memory. A VM that is held while it is paused is still paused after, and the other way round.
    pub(super) throttle: Throttle,
}

impl Shared {
    /// For `vcpus` vCPUs.
    pub fn new(
        vcpus: u8,
        (pio, mmio): (Bus, Bus),
        input_waits: Box<dyn Fn() -> bool + Send + Sync>,
        has_ended: Box<dyn Fn() -> bool + Send + Sync>,
        outcome: Outcome,
        merges: MergeLog,
        regions: Arc<Regions>,
    ) -> Arc<Self> {
        let gate = Mutex::new(Gate {
            wanted: Wanted::Run,
            still: 0,
            alive: 0,
            errand: None,
            errands: 0,
            done: 0,
            roused: 0,
        });
        let (changed, throttle) = (Condvar::new(), Throttle::new(vcpus));
        Arc::new(Self {
            gate,
            changed,
            pio,
            mmio,
            input_waits,
            has_ended,
            outcome,
            merges,
            regions,
            throttle,
        })
    }

    /// Has each of these vCPUs return once from its wait for input. A guest that goes on from
    /// elsewhere may have been saved after it looked for what is new and before it waits, and
    /// nothing else would wake it.
    pub fn rouse(&self, vcpus: u8) {
        self.gate().roused = vcpus.into();
        self.changed.notify_all();
    }

    /// Has vCPUs that are started later stand still before their first instruction.
    pub fn start_paused(&self) {
        self.gate().wanted = Wanted::Pause;
    }

    /// Wakes a vCPU that waits for input; to be called after the input is in the device.
    pub fn input_arrived(&self) {
        let _gate = self.gate();
        self.changed.notify_all();
    }

    fn gate(&self) -> MutexGuard<'_, Gate> {
        os::lock(&self.gate)
    }

    /// Waits while the VM is paused, or held by its throttle, and begins the vCPU's slice if it
    /// needs one. Comes back meanwhile with an errand that is not the one it has `done`.
    fn next(&self, slices: &mut Slices, done: u64) -> Next {
        let (mut gate, mut still) = (self.gate(), false);
        let errand = loop {
            let hold = match gate.wanted {
                Wanted::Pause => match &gate.errand {
                    Some(errand) if gate.errands != done => break Some(errand.clone()),
                    _ => None,
                },
                // A vCPU that is to end is not held.
                Wanted::Stop => break None,
                Wanted::Run => match slices.begin(&self.throttle) {
                    Some(hold) => Some(hold),
                    None => break None,
                },
            };
            if !still {
                still = true;
                gate.still += 1;
                self.changed.notify_all();
            }
            gate = match hold {
                None => os::unpoisoned(self.changed.wait(gate)),
                Some(hold) => os::unpoisoned(self.changed.wait_timeout(gate, hold)).0,
            };
        };
        gate.still -= usize::from(still);
        match (errand, gate.wanted) {
            (Some(errand), _) => Next::Errand(errand),
            (None, Wanted::Run) => Next::Run,
            (None, _) => Next::End,
        }
    }

    /// A vCPU has done its errand. Its number.
    fn has_done_errand(&self) -> u64 {
        let mut gate = self.gate();
        gate.done += 1;
        self.changed.notify_all();
        gate.errands
    }

    /// Parks a vCPU until input waits, the time is over (`u32::MAX`: never), or the VM is to stop
    /// or pause.
    fn idle(&self, ms: u32) {
        let until = (ms != u32::MAX).then(|| Instant::now() + Duration::from_millis(ms.into()));
        let mut gate = self.gate();
        while gate.wanted == Wanted::Run && gate.roused == 0 && !(self.input_waits)() {
            gate = match until {
                None => os::unpoisoned(self.changed.wait(gate)),
                Some(until) => {
                    let left = until.saturating_duration_since(Instant::now());
                    if left.is_zero() {
                        return;
                    }
                    os::unpoisoned(self.changed.wait_timeout(gate, left)).0
                }
            };
        }
        gate.roused = gate.roused.saturating_sub(1);
    }
}

/// All vCPUs of a VM, each on a thread of its own.
pub struct Vcpus {
    shared: Arc<Shared>,
    threads: Vec<(JoinHandle<()>, Arc<RunPage>)>,
}

impl Vcpus {
    /// Starts a thread for each vCPU. A VM that has a ring has it with its first one, which alone
    /// writes to its ports.
    pub(super) fn start(
        shared: Arc<Shared>,
        vcpus: Vec<VcpuFd>,
        mut ring: Option<Ring>,
    ) -> Result<Self, VmError> {
        register_signal_handler(SIGRTMIN(), slice::interrupt).map_err(|e| VmError::Host {
            what: "install the signal that interrupts vCPUs",
            source: e.into(),
        })?;
        shared.gate().alive = vcpus.len();
        let mut all = Self { shared, threads: Vec::new() };
        for (n, vcpu) in vcpus.into_iter().enumerate() {
            let shared = all.shared.clone();
            let ring = ring.take();
            let started = RunPage::of(&vcpu).and_then(|page| {
                let its_page = page.clone();
                let thread = std::thread::Builder::new()
                    .name(format!("vcpu{n}"))
                    .stack_size(256 << 10)
                    .spawn(move || run(n, vcpu, ring, &shared, &its_page))?;
                Ok((thread, page))
            });
            match started {
                Ok(started) => all.threads.push(started),
                Err(e) => {
                    // The others must not run on without it: the program may, and tries again.
                    all.stop();
                    return Err(VmError::host("start a vCPU thread")(e));
                }
            }
        }
        Ok(all)
    }

    /// Pauses all vCPUs. False when one did not leave the guest within the limit.
    pub fn pause(&self) -> bool {
        self.want(Wanted::Pause);
        let until = Instant::now() + PAUSE_LIMIT;
        let mut gate = self.shared.gate();
        while gate.still < gate.alive {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            gate = os::unpoisoned(self.shared.changed.wait_timeout(gate, left)).0;
        }
        true
    }

    /// Has every vCPU do `errand` where it stands: they are paused. True when all have, false if
    /// one did not within the limit, or has ended.
    pub fn send(&self, errand: Errand) -> bool {
        let mut gate = self.shared.gate();
        (gate.errand, gate.errands, gate.done) = (Some(errand), gate.errands + 1, 0);
        self.shared.changed.notify_all();
        let until = Instant::now() + PAUSE_LIMIT;
        while gate.done < self.threads.len() && gate.alive == self.threads.len() {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            gate = os::unpoisoned(self.shared.changed.wait_timeout(gate, left)).0;
        }
        gate.errand = None;
        gate.done == self.threads.len()
    }

    /// Lets paused vCPUs run again.
    pub fn resume(&self) {
        self.want(Wanted::Run);
    }

    /// Sets how fast the guest may take memory, or lifts that, which releases held vCPUs at once.
    pub(super) fn throttle(&self, pages_per_second: Option<u64>) -> Result<(), ThrottleError> {
        self.shared.throttle.set(pages_per_second)?;
        // A vCPU that is about to wait has either seen this or is woken.
        drop(self.shared.gate());
        self.shared.changed.notify_all();
        self.kick();
        Ok(())
    }

    /// Ends all threads and waits for them.
    pub fn stop(&mut self) {
        self.want(Wanted::Stop);
        for (thread, _) in self.threads.drain(..) {
            let _ = thread.join();
        }
    }

    fn want(&self, wanted: Wanted) {
        self.shared.gate().wanted = wanted;
        self.shared.changed.notify_all();
        if wanted != Wanted::Run {
            self.kick();
        }
    }

    /// Makes every vCPU leave the guest and look at the gate.
    fn kick(&self) {
        for (thread, page) in &self.threads {
            page.interrupt();
            let _ = thread.kill(SIGRTMIN());
        }
    }
}

fn run(n: usize, mut vcpu: VcpuFd, mut ring: Option<Ring>, shared: &Shared, page: &Arc<RunPage>) {
    jail::enter(jail::Thread::Vcpu);
    let ending = {
        let _interruptible = Interruptible::new(page.clone());
        run_until_end(n, &mut vcpu, ring.as_mut(), page, shared)
    };
    {
        let mut gate = shared.gate();
        gate.alive -= 1;
        shared.changed.notify_all();
    }
    if let Some(ending) = ending {
        tracing::debug!(vcpu = n, ?ending, "vCPU ended");
        shared.outcome.tell(ending);
    }
}

/// Runs until it is to stop (None) or the guest ends (its ending).
fn run_until_end(
    n: usize,
    vcpu: &mut VcpuFd,
    mut ring: Option<&mut Ring>,
    page: &RunPage,
    shared: &Shared,
) -> Option<Ending> {
    let mut slices = Slices::default();
    // Whether KVM may have to be entered once more to complete what it exited for; and the last
    // errand.
    let (mut is_half_done, mut errand_done) = (false, 0);
    loop {
        match shared.next(&mut slices, errand_done) {
            Next::Run => {}
            Next::End => return None,
            // It comes back at once, and if what it exited for has a second part, with that.
            Next::Errand(_) if is_half_done => page.interrupt(),
            Next::Errand(errand) => {
                errand(n, vcpu);
                errand_done = shared.has_done_errand();
                continue;
            }
        }
        let ran = vcpu.run();
        is_half_done = ran.is_ok();
        // What the guest wrote before it exited comes before that.
        if let Some(ring) = &mut ring {
            ring.drain(|port, data| _ = shared.pio.write(port, data));
        }
        match ran {
            Ok(VcpuExit::IoOut(port, data)) => {
                for operand in data.chunks(page.operand_bytes()) {
                    match (port, operand) {
                        (IDLE_PORT, &[a, b, c, d]) => shared.idle(u32::from_le_bytes([a, b, c, d])),
                        _ => _ = shared.pio.write(port.into(), operand),
                    }
                }
            }
            Ok(VcpuExit::IoIn(port, data)) => {
                for operand in data.chunks_mut(page.operand_bytes()) {
                    shared.pio.read(port.into(), operand);
                }
            }
            Ok(VcpuExit::MmioWrite(address, data)) => {
                shared.mmio.write(address, data);
            }
            Ok(VcpuExit::MmioRead(address, data)) => {
                shared.mmio.read(address, data);
            }
            Ok(VcpuExit::Intr | VcpuExit::IrqWindowOpen | VcpuExit::IoapicEoi(_)) => {}
            Ok(VcpuExit::Hlt) => shared.idle(u32::MAX),
            Ok(VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_SHUTDOWN, _)) => return Some(Ending::PowerOff),
            Ok(VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_RESET, _)) => return Some(Ending::Reset),
            Ok(VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_CRASH, _)) => {
                return Some(fault(vcpu, shared, Fault::GuestCrash));
            }
            // A kernel that has asked for a reset does not wait long for it before it tries a
            // triple fault.
            Ok(VcpuExit::Shutdown) if (shared.has_ended)() => return None,
            Ok(VcpuExit::Shutdown) => return Some(fault(vcpu, shared, Fault::Triple)),
            Ok(VcpuExit::FailEntry(reason, _)) => return Some(fault(vcpu, shared, Fault::Entry { reason })),
            Ok(VcpuExit::InternalError) => return Some(fault(vcpu, shared, Fault::Internal)),
            Ok(VcpuExit::MemoryFault { gpa, size, .. }) => {
                return Some(fault(vcpu, shared, Fault::Memory { gpa, bytes: size }));
            }
            Ok(other) => {
                let exit = format!("{other:?}");
                return Some(fault(vcpu, shared, Fault::Unhandled { exit }));
            }
            Err(e) => match io::Error::from(e).kind() {
                io::ErrorKind::Interrupted => {
                    page.go_on();
                    slices.end();
                }
                // A vCPU that waits for its start signal answers so when it is woken without one.
                io::ErrorKind::WouldBlock => slices.end(),
                // Of RAM a page is always to be had, or the kernel has ended this process.
                _ if e.errno() == libc::EFAULT && shared.regions.replace_lost() => {}
                _ => return Some(fault(vcpu, shared, Fault::Run { errno: e.errno() })),
            },
        }
    }
}

fn fault(vcpu: &mut VcpuFd, shared: &Shared, fault: Fault) -> Ending {
    Ending::Fault(Box::new(super::exit::describe(vcpu, fault, &shared.merges)))
}
