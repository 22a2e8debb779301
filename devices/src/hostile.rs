//! A guest that writes rubbish to every register of every device, through the buses, as a vCPU
//! would.

use std::io::{self, ErrorKind, Write};
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::{UnixDatagram, UnixListener};
use std::sync::{Arc, Mutex};

use proptest::prelude::*;
use virtio_bindings::bindings::virtio_mmio as reg;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::bus::Bus;
use crate::in_flight::InFlight;
use crate::interrupt::IrqLine;
use crate::legacy::i8042::{I8042, I8042_BASE, I8042_LEN};
use crate::legacy::pci::{PCI_BASE, PCI_LEN, Pci};
use crate::legacy::pm1::{PM1_BASE, PM1_LEN, Pm1};
use crate::legacy::power::{POWER_BASE, POWER_LEN, Power};
use crate::legacy::pvpanic::{PVPANIC_LEN, PVPANIC_PORT, Pvpanic};
use crate::legacy::serial::{COM1_BASE, COM2_BASE, SERIAL_LEN, Serial};
use crate::reclaim::{Gpa, Reclaim};
use crate::virtio::VirtioDevice;
use crate::virtio::balloon::{Balloon, Config, Handle};
use crate::virtio::block::{Block, Disk, ID_BYTES, Medium};
use crate::virtio::mmio::{MMIO_LEN, MmioTransport};
use crate::virtio::net::{self, Mac, Net, Offload, Tap};
use crate::virtio::pmem::Pmem;
use crate::virtio::rng::Rng;
use crate::virtio::testing::{BUFFERS, HIGH_RAM_END, ram};
use crate::virtio::vsock::Vsock;

const RNG_BASE: u64 = 0xd000_0000;
const BALLOON_BASE: u64 = RNG_BASE + MMIO_LEN;
const BLOCK_BASE: u64 = BALLOON_BASE + MMIO_LEN;
const NET_BASE: u64 = BLOCK_BASE + MMIO_LEN;
const VSOCK_BASE: u64 = NET_BASE + MMIO_LEN;
const PMEM_BASE: u64 = VSOCK_BASE + MMIO_LEN;
const VIRTIO_BASES: [u64; 6] = [RNG_BASE, BALLOON_BASE, BLOCK_BASE, NET_BASE, VSOCK_BASE, PMEM_BASE];
const RING: u64 = 0x1_0000;

/// A terminal that sometimes has had enough, or is gone.
struct Moody(u32);

impl Write for Moody {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0 = self.0.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        match self.0 >> 30 {
            0 => Ok(bytes.len()),
            1 => Err(ErrorKind::WouldBlock.into()),
            2 => Err(ErrorKind::BrokenPipe.into()),
            _ => Ok(0),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Err(ErrorKind::BrokenPipe.into())
    }
}

fn event() -> EventFd {
    EventFd::new(EFD_NONBLOCK).unwrap()
}

struct Machine {
    ports: Bus,
    mmio: Bus,
    com1: Arc<Mutex<Serial>>,
    /// rng, balloon, block and net.
    virtio: [Arc<Mutex<MmioTransport>>; 6],
    balloon: Handle,
}

/// A host that takes what is RAM, and sometimes does not.
struct Host;

impl Reclaim for Host {
    fn discard(&self, range: Range<Gpa>) -> io::Result<()> {
        assert!(range.start < range.end && range.end.0 <= HIGH_RAM_END, "{range:?}");
        if range.start.0.is_multiple_of(3) { Err(ErrorKind::OutOfMemory.into()) } else { Ok(()) }
    }
}

impl InFlight for Host {
    fn during(&self, range: Range<Gpa>, transfer: &mut dyn FnMut()) {
        assert!(range.start < range.end && range.end.0 <= HIGH_RAM_END, "{range:?}");
        transfer();
    }
}

/// A segment that always has one more frame, and takes what it is sent.
struct Echo(UnixDatagram);

impl Tap for Echo {
    fn send(&mut self, _: &[u8]) -> io::Result<()> {
        Ok(())
    }

    fn receive(&mut self, frame: &mut [u8]) -> io::Result<usize> {
        frame[..60].fill(7);
        Ok(60)
    }

    fn set_offload(&mut self, offload: Offload) -> io::Result<()> {
        if offload.ecn { Err(ErrorKind::InvalidInput.into()) } else { Ok(()) }
    }

    fn readable(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// A listener of the kernel's choice of name, which is in no file system.
fn listener() -> UnixListener {
    let dir = tempfile::tempdir().unwrap();
    UnixListener::bind(dir.path().join("v.sock")).unwrap()
}

impl Machine {
    fn new() -> Self {
        let memory = ram();
        // A ring full of chains, so that a notification that gets through finds something to do:
        // buffers to write to, and of the first eight, which are offered, the first four with
        // something to read before them.
        for slot in 0..16u64 {
            let (flags, next) = if slot < 4 { (1, slot as u16 + 12) } else { (2, 0) };
            let descriptor = virtio_queue::desc::split::Descriptor::new(BUFFERS + slot, 64, flags, next);
            memory.write_obj(descriptor, GuestAddress(RING + 16 * slot)).unwrap();
        }
        memory.write_obj(8u16, GuestAddress(RING + 0x4002)).unwrap();

        let serial = || Arc::new(Mutex::new(Serial::new(IrqLine::new(event()), Box::new(Moody(1))).unwrap()));
        let com1 = serial();
        let config = Config {
            target_pages: 5,
            deflate_on_oom: true,
            statistics: true,
            hinting: true,
            reporting: true,
        };
        let (device, balloon) = Balloon::new(config, &memory, Box::new(Host));
        let file = tempfile::tempfile().unwrap();
        file.set_len(8 * 512).unwrap();
        let disk = Disk { medium: Medium::File(file), sectors: 8, read_only: false, id: [7; ID_BYTES] };
        let interface = net::Config { mac: Mac([2; 6]), mtu: None };
        let sockets =
            Vsock::new(3, listener(), Box::new(|_| Err(ErrorKind::ConnectionRefused.into()))).unwrap();
        let devices: [Box<dyn VirtioDevice>; 6] = [
            Box::new(Rng::new()),
            Box::new(device),
            Box::new(Block::new(disk, Box::new(Host), || {}).unwrap().0),
            Box::new(Net::new(interface, Box::new(Echo(UnixDatagram::unbound().unwrap())))),
            Box::new(sockets),
            Box::new(Pmem::new(4 << 30, 2 << 20, Some(tempfile::tempfile().unwrap()), || {}).unwrap()),
        ];
        let virtio = devices.map(|device| {
            Arc::new(Mutex::new(MmioTransport::new(memory.clone(), device, IrqLine::new(event()))))
        });
        let (mut ports, mut mmio) = (Bus::default(), Bus::default());
        ports.insert(COM1_BASE, SERIAL_LEN, "com1", com1.clone()).unwrap();
        ports.insert(COM2_BASE, SERIAL_LEN, "com2", serial()).unwrap();
        ports.insert(I8042_BASE, I8042_LEN, "i8042", Arc::new(Mutex::new(I8042::new(event())))).unwrap();
        let power = Arc::new(Mutex::new(Power::new(event(), event())));
        ports.insert(POWER_BASE, POWER_LEN, "power", power).unwrap();
        let pm1 = Arc::new(Mutex::new(Pm1::new(event(), Box::new(|_| {}))));
        ports.insert(PM1_BASE, PM1_LEN, "pm1", pm1).unwrap();
        let pvpanic = Arc::new(Mutex::new(Pvpanic::new(event())));
        ports.insert(PVPANIC_PORT, PVPANIC_LEN, "pvpanic", pvpanic).unwrap();
        ports.insert(PCI_BASE, PCI_LEN, "pci", Arc::new(Mutex::new(Pci::new(event())))).unwrap();
        for (n, base) in VIRTIO_BASES.into_iter().enumerate() {
            mmio.insert(base, MMIO_LEN, "virtio", virtio[n].clone()).unwrap();
        }
        Self { ports, mmio, com1, virtio, balloon }
    }
}

#[derive(Clone, Debug)]
enum Step {
    Port(u64, Vec<u8>),
    Mmio(u64, Vec<u8>),
    /// Of all virtio devices.
    Register(u32, u32),
    Input(Vec<u8>),
    Event(usize),
    /// The host's way to the balloon.
    Handle(u32),
}

fn step() -> impl Strategy<Value = Step> {
    let port = prop_oneof![
        COM1_BASE..COM1_BASE + SERIAL_LEN,
        COM2_BASE..COM2_BASE + SERIAL_LEN,
        I8042_BASE..I8042_BASE + I8042_LEN,
        POWER_BASE..POWER_BASE + POWER_LEN,
        0u64..0x1_0000,
    ];
    let bytes = || prop::collection::vec(any::<u8>(), 0..9);
    // Values that mean something somewhere, so that a random driver gets as far as a running queue.
    let value = prop_oneof![
        Just(0u32),
        Just(1),
        Just(3),
        Just(0xb),
        Just(0xf),
        Just(16),
        Just(RING as u32),
        Just(RING as u32 + 0x4000),
        Just(RING as u32 + 0x8000),
        any::<u32>(),
    ];
    let register = (0u32..0x46).prop_map(|word| 4 * word);
    prop_oneof![
        3 => (port, bytes()).prop_map(|(port, data)| Step::Port(port, data)),
        1 => (RNG_BASE - 8..VSOCK_BASE + MMIO_LEN + 8, bytes()).prop_map(|(at, data)| Step::Mmio(at, data)),
        4 => (register, value).prop_map(|(register, value)| Step::Register(register, value)),
        1 => bytes().prop_map(Step::Input),
        1 => (0usize..7).prop_map(Step::Event),
        1 => any::<u32>().prop_map(Step::Handle),
    ]
}

/// The writes of a good driver up to a running queue.
fn start() -> Vec<Step> {
    let ring = RING as u32;
    [
        (reg::VIRTIO_MMIO_STATUS, 0),
        (reg::VIRTIO_MMIO_STATUS, 1),
        (reg::VIRTIO_MMIO_STATUS, 3),
        (reg::VIRTIO_MMIO_DRIVER_FEATURES_SEL, 1),
        (reg::VIRTIO_MMIO_DRIVER_FEATURES, 1),
        (reg::VIRTIO_MMIO_STATUS, 0xb),
        (reg::VIRTIO_MMIO_QUEUE_NUM, 16),
        (reg::VIRTIO_MMIO_QUEUE_DESC_LOW, ring),
        (reg::VIRTIO_MMIO_QUEUE_AVAIL_LOW, ring + 0x4000),
        (reg::VIRTIO_MMIO_QUEUE_USED_LOW, ring + 0x8000),
        (reg::VIRTIO_MMIO_QUEUE_READY, 1),
        (reg::VIRTIO_MMIO_STATUS, 0xf),
        (reg::VIRTIO_MMIO_QUEUE_NOTIFY, 0),
    ]
    .map(|(register, value)| Step::Register(register, value))
    .into()
}

fn run(machine: &Machine, step: &Step) {
    match step {
        Step::Port(port, data) => {
            machine.ports.write(*port, data);
            machine.ports.read(*port, &mut data.clone());
        }
        Step::Mmio(address, data) => {
            machine.mmio.write(*address, data);
            machine.mmio.read(*address, &mut data.clone());
        }
        Step::Register(register, value) => {
            for base in VIRTIO_BASES {
                let address = base + u64::from(*register);
                machine.mmio.write(address, &value.to_le_bytes());
                machine.mmio.read(address, &mut [0; 4]);
            }
        }
        Step::Input(data) => {
            let mut com1 = machine.com1.lock().unwrap();
            let room = com1.input_room();
            assert!(com1.input(data) <= room.min(data.len()));
            com1.flush_output();
        }
        Step::Event(queue) => {
            machine.virtio.iter().for_each(|device| _ = device.lock().unwrap().notify(*queue));
        }
        Step::Handle(value) => {
            let balloon = &machine.balloon;
            balloon.set_target(*value);
            let _ = (balloon.request_statistics(), balloon.held(), balloon.start_hinting(value % 2 == 0));
            let _ = (balloon.statistics(), balloon.stop_hinting());
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn rubbish_in_every_register_is_survived(
        started in any::<bool>(),
        steps in prop::collection::vec(step(), 0..200),
    ) {
        let machine = Machine::new();
        let prelude = if started { start() } else { Vec::new() };
        for step in prelude.iter().chain(&steps) {
            run(&machine, step);
        }
        // Whatever happened, a reset brings the device back.
        for step in start() {
            run(&machine, &step);
        }
        let mut status = [0; 4];
        for base in VIRTIO_BASES {
            prop_assert!(machine.mmio.read(base + u64::from(reg::VIRTIO_MMIO_STATUS), &mut status));
            prop_assert_eq!(status[0] & 0x8f, 0xf);
        }
    }
}
