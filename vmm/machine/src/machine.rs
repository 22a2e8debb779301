//! The devices of a VM and how they hang on KVM: buses, interrupts, queue notifications.

use std::io::Write;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, TryLockError};
use std::time::{Duration, Instant};

use devices::GuestMemory;
use devices::bus::Bus;
use devices::interrupt::IrqLine;
use devices::legacy::i8042::{I8042, I8042_BASE, I8042_LEN};
use devices::legacy::pci::{PCI_BASE, PCI_LEN, Pci};
use devices::legacy::pm1::{PM1_BASE, PM1_LEN, Pm1, PowerButton, SetLevel};
use devices::legacy::power::{POWER_BASE, POWER_LEN, Power};
use devices::legacy::pvpanic::{PVPANIC_LEN, PVPANIC_PORT, Pvpanic};
use devices::legacy::serial::Serial;
use devices::virtio::mmio::{MmioTransport, NOTIFY_OFFSET};
use devices::virtio::{Interrupt, Progress, VirtioDevice};
use devices::virtio::{block, net, vsock};
use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use kvm_ioctls::{IoEventAddress, VmFd};
use vmm_sys_util::eventfd::EventFd;

use super::board::Board;
use super::error::VmError;
use super::pacer::Next;
use super::platform::*;
use super::timer::Timer;
use super::vcpu::Shared;

/// A VM's devices.
pub struct Machine {
    /// Port devices.
    pub pio: Bus,
    /// Memory-mapped devices.
    pub mmio: Bus,
    /// The console.
    pub com1: Arc<Mutex<Serial>>,
    /// The control channel.
    pub com2: Arc<Mutex<Serial>>,
    /// Readable when the guest asked for power-off.
    pub power_off: EventFd,
    /// Readable when the guest asked for a reset.
    pub reset: EventFd,
    /// Readable when the guest's kernel said that it has panicked.
    pub panicked: EventFd,
    /// The power button.
    pub power_button: PowerButton,
    /// Queue notifications of all virtio devices.
    pub queues: Queues,
    /// The interrupts of all virtio devices.
    pub interrupts: Vec<Interrupt>,
    /// What holds state of the guest.
    pub board: Board,
}

impl Machine {
    /// Makes the devices and joins them to `vm`.
    pub fn new(
        vm: &Arc<VmFd>,
        memory: &Arc<GuestMemory>,
        com1_out: Box<dyn Write + Send>,
        com2_out: Box<dyn Write + Send>,
        virtio: Vec<Box<dyn VirtioDevice>>,
    ) -> Result<Self, VmError> {
        let (mut pio, mut mmio) = (Bus::default(), Bus::default());
        let (power_off, reset, panicked) = (event()?, event()?, event()?);
        let com1 = serial(vm, &mut pio, ("COM1", COM1_PORT, COM1_IRQ), com1_out)?;
        let com2 = serial(vm, &mut pio, ("COM2", COM2_PORT, COM2_IRQ), com2_out)?;
        let i8042 = I8042::new(clone(&reset)?);
        pio.insert(I8042_BASE, I8042_LEN, "i8042", Arc::new(Mutex::new(i8042)))?;
        let power = Power::new(clone(&power_off)?, clone(&reset)?);
        pio.insert(POWER_BASE, POWER_LEN, "power", Arc::new(Mutex::new(power)))?;
        let pm1 = Pm1::new(clone(&power_off)?, sci(vm));
        let power_button = pm1.button();
        let pm1 = Arc::new(Mutex::new(pm1));
        pio.insert(PM1_BASE, PM1_LEN, "pm1", pm1.clone())?;
        let pvpanic = Pvpanic::new(clone(&panicked)?);
        pio.insert(PVPANIC_PORT, PVPANIC_LEN, "pvpanic", Arc::new(Mutex::new(pvpanic)))?;
        let pci = Arc::new(Mutex::new(Pci::new(clone(&reset)?)));
        pio.insert(PCI_BASE, PCI_LEN, "pci", pci.clone())?;
        let (mut queues, mut interrupts) = (Queues::default(), Vec::new());
        let mut board = Board { com1: com1.clone(), com2: com2.clone(), pm1, pci, virtio: Vec::new() };
        for (n, device) in virtio.into_iter().take(VIRTIO_MAX).enumerate() {
            let takes_memory =
                matches!(device.device_id(), block::DEVICE_ID | net::DEVICE_ID | vsock::DEVICE_ID);
            let source = match device.source() {
                Some((fd, queue)) => {
                    let fd = fd.try_clone_to_owned().map_err(VmError::host("duplicate a descriptor"))?;
                    Some((Notified::ByHost(fd), queue))
                }
                None => None,
            };
            let mut transport = MmioTransport::new(Arc::clone(memory), device, irq(vm, virtio_irq(n))?);
            let base = VIRTIO_BASE + n as u64 * VIRTIO_BYTES;
            let notified = (0..transport.queue_count()).map(|_| event()).collect::<Result<Vec<_>, _>>()?;
            for (queue, event) in notified.iter().enumerate() {
                transport.set_kick(queue, clone(event)?);
            }
            interrupts.push(transport.interrupt());
            let transport = Arc::new(Mutex::new(transport));
            for (queue, notified) in notified.into_iter().enumerate() {
                let address = IoEventAddress::Mmio(base + NOTIFY_OFFSET);
                vm.register_ioevent(&notified, &address, queue as u32)
                    .map_err(VmError::kvm("register a queue notification (ioeventfd)"))?;
                let (notified, transport) = (Notified::ByDriver(notified), transport.clone());
                queues.all.push(QueueEvent::new(notified, transport, queue, takes_memory));
            }
            if let Some((notified, queue)) = source {
                let transport = transport.clone();
                queues.all.push(QueueEvent::new(notified, transport, queue, takes_memory));
            }
            board.virtio.push(transport.clone());
            mmio.insert(base, VIRTIO_BYTES, "virtio-mmio", transport)?;
        }
        Ok(Self {
            pio,
            mmio,
            com1,
            com2,
            power_off,
            reset,
            panicked,
            power_button,
            queues,
            interrupts,
            board,
        })
    }
}

fn event() -> Result<EventFd, VmError> {
    EventFd::new(libc::EFD_NONBLOCK).map_err(VmError::host("make an eventfd"))
}

fn clone(of: &EventFd) -> Result<EventFd, VmError> {
    of.try_clone().map_err(VmError::host("duplicate an eventfd"))
}

fn irq(vm: &VmFd, number: u32) -> Result<IrqLine, VmError> {
    let fd = event()?;
    vm.register_irqfd(&fd, number).map_err(VmError::kvm("register an interrupt (irqfd)"))?;
    Ok(IrqLine::new(fd))
}

/// The way to ACPI's interrupt. It goes down only when the guest says so, which an irqfd cannot do.
fn sci(vm: &Arc<VmFd>) -> SetLevel {
    // The VM is its owner's, to end it: see `Vm`.
    let vm = Arc::downgrade(vm);
    Box::new(move |high| {
        if let Some(vm) = vm.upgrade()
            && let Err(error) = vm.set_irq_line(SCI_IRQ, high)
        {
            tracing::warn!("ACPI's interrupt cannot be set: {error}");
        }
    })
}

fn serial(
    vm: &VmFd,
    pio: &mut Bus,
    (name, port, number): (&'static str, u16, u32),
    out: Box<dyn Write + Send>,
) -> Result<Arc<Mutex<Serial>>, VmError> {
    let device = Serial::new(irq(vm, number)?, out).map_err(VmError::host("make an eventfd"))?;
    let device = Arc::new(Mutex::new(device));
    pio.insert(port.into(), COM_PORTS.into(), name, device.clone())?;
    Ok(device)
}

/// What says that a queue has work.
enum Notified {
    /// The driver, and the device itself when a turn has left something.
    ByDriver(EventFd),
    /// The host, by what is readable as long as there is something: so it is watched for edges, and read by the device only. An edge
    /// that finds no driver is made up for when there is one, as then every queue is processed once.
    ByHost(OwnedFd),
}

struct QueueEvent {
    notified: Notified,
    transport: Arc<Mutex<MmioTransport>>,
    queue: usize,
    /// What it does may cost frames: it writes much of guest memory.
    takes_memory: bool,
    /// Notified while the VM was paused, or held by its throttle.
    missed: bool,
    /// When its rate limit lets something through again, if it holds something back.
    due: Option<Instant>,
}

impl QueueEvent {
    fn new(
        notified: Notified,
        transport: Arc<Mutex<MmioTransport>>,
        queue: usize,
        takes_memory: bool,
    ) -> Self {
        Self { notified, transport, queue, takes_memory, missed: false, due: None }
    }

    /// False if the device is in use for longer than an access takes: a vCPU resets it, and its disk is slow.
    fn process(&mut self) -> bool {
        let Some(mut transport) = lock_soon(&self.transport) else { return false };
        let progress = match self.notified {
            // A driver that has reset its device meanwhile makes no mistake.
            Notified::ByDriver(_) if self.due.is_none() => transport.notify(self.queue),
            _ => transport.arrived(self.queue),
        };
        self.due = match progress {
            Progress::Later(wait) => Instant::now().checked_add(wait),
            Progress::Idle | Progress::More => None,
        };
        true
    }
}

/// How often a lock is tried before the event loop does something else.
const TRIES: u32 = 1000;
/// When it is tried again.
const AGAIN: Duration = Duration::from_millis(1);

fn lock_soon<T>(mutex: &Mutex<T>) -> Option<MutexGuard<'_, T>> {
    for _ in 0..TRIES {
        match mutex.try_lock() {
            Ok(guard) => return Some(guard),
            Err(TryLockError::Poisoned(poisoned)) => return Some(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) => std::thread::yield_now(),
        }
    }
    None
}

/// Behind the queues' numbers, and those of the resumption and of the throttle's timer: that of the rate limits' timer.
const REFILLED: u32 = 2;
/// The least wait for a rate limit: a timer that is set more often costs more than it is worth.
const LEAST_WAIT: Duration = Duration::from_micros(100);

/// Handles queue notifications on the event loop; holds them back while the VM is paused, so that
/// devices leave a paused guest's memory alone, and those that take memory while it is held by its throttle.
#[derive(Default)]
pub struct Queues {
    all: Vec<QueueEvent>,
    paused: Arc<AtomicBool>,
    resumed: Option<EventFd>,
    /// Set while something is held back by the throttle.
    paid: Option<Timer>,
    /// Set while something is held back by a rate limit.
    refilled: Option<Timer>,
    vcpus: Option<Arc<Shared>>,
}

impl Queues {
    /// Whom to wake after work on a queue: a vCPU that waits in us does not see the interrupt.
    pub fn wake(&mut self, vcpus: Arc<Shared>) {
        self.vcpus = Some(vcpus);
    }

    /// The switch that holds notifications back, and the event to write after it is off again, or after the throttle's rate is another.
    pub fn pausing(&mut self) -> Result<(Arc<AtomicBool>, EventFd), VmError> {
        let resumed = event()?;
        self.resumed = Some(clone(&resumed)?);
        self.paid = Some(Timer::new().map_err(VmError::host("make a timer"))?);
        self.refilled = Some(Timer::new().map_err(VmError::host("make a timer"))?);
        Ok((self.paused.clone(), resumed))
    }

    /// Handles the notification of queue `n`, or keeps it.
    fn process_queue(&mut self, n: usize) {
        let held = self.paused.load(Ordering::SeqCst) || self.is_throttled(n);
        if let Some(event) = self.all.get_mut(n) {
            event.missed = held || !event.process();
            if event.missed && !held {
                let _ = self.paid.as_ref().map(|paid| paid.every(AGAIN));
            }
            if event.due.is_some() {
                self.await_refill();
            }
        }
    }

    /// Sets the timer to when the first queue is due.
    fn await_refill(&self) {
        if let (Some(due), Some(refilled)) =
            (self.all.iter().filter_map(|event| event.due).min(), &self.refilled)
        {
            // Zero would be never.
            let wait = due.saturating_duration_since(Instant::now()).max(LEAST_WAIT);
            let _ = refilled.every(wait);
        }
    }

    /// Handles the queues that are due.
    fn refill(&mut self) {
        let _ = self.refilled.as_ref().map(Timer::disarm);
        let now = Instant::now();
        for n in 0..self.all.len() {
            if self.all.get(n).is_some_and(|event| event.due.is_some_and(|due| due <= now)) {
                self.process_queue(n);
                // One that is held back for another reason is looked at when that is over.
                if let Some(event) = self.all.get_mut(n).filter(|event| event.missed) {
                    event.due = None;
                }
            }
        }
        self.await_refill();
    }

    /// Whether queue `n` is to wait; then the timer is set.
    fn is_throttled(&self, n: usize) -> bool {
        let takes_memory = self.all.get(n).is_some_and(|event| event.takes_memory);
        let next = self.vcpus.as_ref().filter(|_| takes_memory).and_then(|vcpus| vcpus.throttle.look());
        match (next, &self.paid) {
            // Without the timer it would wait for ever.
            (Some(Next::Hold(time)), Some(paid)) => paid.every(time).is_ok(),
            _ => false,
        }
    }
}

impl MutEventSubscriber for Queues {
    fn init(&mut self, ops: &mut EventOps) {
        let count = self.all.len() as u32;
        for (n, event) in (0..).zip(&self.all) {
            let _ = match &event.notified {
                Notified::ByDriver(fd) => ops.add(Events::with_data(fd, n, EventSet::IN)),
                Notified::ByHost(fd) => {
                    ops.add(Events::with_data(fd, n, EventSet::IN | EventSet::EDGE_TRIGGERED))
                }
            };
        }
        if let Some(resumed) = &self.resumed {
            let _ = ops.add(Events::with_data(resumed, count, EventSet::IN));
        }
        if let Some(paid) = &self.paid {
            let _ = ops.add(Events::with_data(paid, count + 1, EventSet::IN));
        }
        if let Some(refilled) = &self.refilled {
            let _ = ops.add(Events::with_data(refilled, count + REFILLED, EventSet::IN));
        }
    }

    fn process(&mut self, events: Events, _: &mut EventOps) {
        let n = events.data() as usize;
        match self.all.get(n) {
            Some(event) => {
                if let Notified::ByDriver(fd) = &event.notified {
                    let _ = fd.read();
                }
                self.process_queue(n);
            }
            None if n == self.all.len() + REFILLED as usize => self.refill(),
            // Resumed, or what was owed is paid: what is to wait longer sets the timer again.
            None => {
                let _ = self.resumed.as_ref().map(EventFd::read);
                let _ = self.paid.as_ref().map(Timer::disarm);
                for n in 0..self.all.len() {
                    if self.all.get(n).is_some_and(|event| event.missed) {
                        self.process_queue(n);
                    }
                }
            }
        }
        if let Some(vcpus) = &self.vcpus {
            vcpus.input_arrived();
        }
    }
}
