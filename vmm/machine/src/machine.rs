//! The devices of a VM and how they hang on KVM: buses, interrupts, queue notifications.

use std::io::Write;
use std::sync::{Arc, Mutex};

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
use devices::virtio::{Interrupt, VirtioDevice};
use devices::virtio::{block, net, vsock};
use kvm_ioctls::{IoEventAddress, VmFd};
use vmm_sys_util::eventfd::EventFd;

use super::board::Board;
use super::error::VmError;
use super::platform::*;
use super::queues::{Notified, Queues};

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
    /// Readable when the guest asked for power-off, for a reset, or said that its kernel has
    /// panicked.
    pub asks: [EventFd; 3],
    /// The power button.
    pub power_button: PowerButton,
    /// Queue notifications of all virtio devices.
    pub queues: Queues,
    /// The interrupts of all virtio devices.
    interrupts: Vec<Interrupt>,
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
            let base = VIRTIO_BASE + n as u64 * VIRTIO_BYTES;
            let takes_memory =
                matches!(device.device_id(), block::DEVICE_ID | net::DEVICE_ID | vsock::DEVICE_ID);
            let source = device.source().map(|(fd, queue)| (fd.try_clone_to_owned(), queue));
            let transport = MmioTransport::new(Arc::clone(memory), device, irq(vm, virtio_irq(n))?);
            interrupts.push(transport.interrupt());
            let transport = Arc::new(Mutex::new(transport));
            for (queue, notified) in kicks(vm, base, &transport)?.into_iter().enumerate() {
                queues.add(Notified::ByDriver(notified), &transport, queue, takes_memory);
            }
            if let Some((fd, queue)) = source {
                let fd = fd.map_err(VmError::host("duplicate a descriptor"))?;
                queues.add(Notified::ByHost(fd), &transport, queue, takes_memory);
            }
            board.virtio.push(transport.clone());
            mmio.insert(base, VIRTIO_BYTES, "virtio-mmio", transport)?;
        }
        Ok(Self {
            pio,
            mmio,
            com1,
            com2,
            asks: [power_off, reset, panicked],
            power_button,
            queues,
            interrupts,
            board,
        })
    }

    /// Whether there is input, or an interrupt, that the guest has not looked at.
    pub fn input_waits(&self) -> Box<dyn Fn() -> bool + Send + Sync> {
        let (ports, interrupts) = ([self.com1.clone(), self.com2.clone()], self.interrupts.clone());
        Box::new(move || {
            ports.iter().any(|port| os::lock(port).has_input())
                || interrupts.iter().any(Interrupt::is_pending)
        })
    }
}

/// One event for each queue of the device at `base`, which both KVM writes, at a driver's
/// notification, and the device itself.
fn kicks(vm: &VmFd, base: u64, transport: &Mutex<MmioTransport>) -> Result<Vec<EventFd>, VmError> {
    let mut transport = os::lock(transport);
    let mut events = Vec::new();
    for queue in 0..transport.queue_count() {
        let notified = event()?;
        transport.set_kick(queue, clone(&notified)?);
        let address = IoEventAddress::Mmio(base + NOTIFY_OFFSET);
        vm.register_ioevent(&notified, &address, queue as u32)
            .map_err(VmError::kvm("register a queue notification (ioeventfd)"))?;
        events.push(notified);
    }
    Ok(events)
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
