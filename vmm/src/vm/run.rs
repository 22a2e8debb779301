//! Builds a VM and runs it to its end.

use std::io;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use devices::virtio::VirtioDevice;
use devices::virtio::rng::Rng;
use event_manager::{EventManager, EventOps, EventSet, Events, MutEventSubscriber, SubscriberOps};
use kvm_bindings::{KVM_PIT_SPEAKER_DUMMY, kvm_pit_config, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use vmm_sys_util::eventfd::EventFd;

use super::channel::{Channel, ChannelOutput};
use super::console::{Console, ConsoleInput, Lifeline};
use super::control::{Control, Reply, Request, Serve, Status};
use super::error::{MAX_VCPUS, VmError};
use super::exit::{Ending, Outcome};
use super::feed::Feed;
use super::machine::Machine;
use super::platform::{KVM_IDENTITY_MAP, KVM_TSS, VIRTIO_BASE, VIRTIO_MAX};
use super::stats::KvmStats;
use super::terminal::Raw;
use super::vcpu::{Shared, Vcpus};
use super::{Config, KernelSource, acpi, boot, cpuid, probe, registers};
use crate::memory::layout;
use crate::memory::own;
use crate::memory::ram::Ram;

type Subscribers = EventManager<Box<dyn MutEventSubscriber>>;

/// Builds the VM of `config` and runs it until it ends.
pub fn run(config: &Config) -> Result<Ending, VmError> {
    if !(1..=MAX_VCPUS).contains(&config.vcpus) {
        return Err(VmError::Vcpus { asked: config.vcpus });
    }
    if config.initrd.is_some() && matches!(config.kernel, KernelSource::BuiltIn(_)) {
        return Err(VmError::InitrdWithoutKernel);
    }
    let began = Instant::now();
    let kvm = open_kvm()?;
    let ram = Ram::new(config.memory_bytes)?;
    if let Some(on) = config.huge_pages {
        ram.set_huge_pages(on)?;
    }
    if config.mergeable {
        ram.set_mergeable(true)?;
    }
    // Signals before sockets: whoever sees a socket may end the VM, and it is removed. Sockets before the kernel is
    // loaded: a path in use is known at once.
    let outcome = Outcome::new().map_err(VmError::host("make an eventfd"))?;
    let signals = Signals::new(outcome.clone())?;
    let control = config.control.as_deref().map(Listener::bind).transpose()?;
    let com2 = config.com2.as_deref().map(Listener::bind).transpose()?;

    let vm = create_vm(&kvm, &ram)?;
    let virtio: Vec<Box<dyn VirtioDevice>> = vec![Box::new(Rng::new())];
    let acpi_root = {
        registers::write_tables(ram.memory())?;
        acpi::write(ram.memory(), config.vcpus, virtio.len())?
    };
    let com2_output = ChannelOutput::new().map_err(VmError::host("make an eventfd"))?;
    let machine =
        Machine::new(&vm, ram.memory(), config.console.output()?, Box::new(com2_output.clone()), virtio)?;
    let vcpus = create_vcpus(&kvm, &vm, config.vcpus)?;
    tracing::debug!(ms = began.elapsed().as_millis(), "KVM and the devices are set up");
    let entry = boot::load(
        ram.memory(),
        &layout::stretches(config.memory_bytes),
        &config.kernel,
        config.initrd.as_deref(),
        &cmdline(config, &vcpus),
        acpi_root,
    )?;
    if let Some(first) = vcpus.first() {
        registers::enter(first, entry)?;
    }

    let stats = KvmStats::open(&vm, &vcpus);
    let Machine { pio, mmio, com1, com2: com2_port, power_off, reset, mut queues } = machine;
    let waits = {
        let ports = [com1.clone(), com2_port.clone()];
        Box::new(move || ports.iter().any(|p| p.lock().unwrap_or_else(PoisonError::into_inner).has_input()))
    };
    let shared = Shared::new(pio, mmio, waits, outcome.clone());
    let (devices_paused, devices_resumed) = queues.pausing()?;

    let mut events = Subscribers::new()?;
    events.add_subscriber(Box::new(queues));
    events.add_subscriber(Box::new(Ended(outcome.clone())));
    for (event, ending) in [(power_off, GuestAsks::PowerOff), (reset, GuestAsks::Reset)] {
        events.add_subscriber(Box::new(GuestEnd { event, ending, outcome: outcome.clone() }));
    }
    events.add_subscriber(Box::new(signals));
    let raw = console_input(config, &mut events, &shared, &com1, &outcome)?;
    if let Some(listener) = &com2 {
        let drained = drained(&com2_port)?;
        let feed = Feed::new(com2_port, shared.clone());
        events.add_subscriber(Box::new(Channel::new(listener.socket()?, com2_output, feed, drained)));
    }
    tracing::debug!(ms = began.elapsed().as_millis(), "the machine is built; its vCPUs start");
    let vcpus = Arc::new(Mutex::new(Vcpus::start(shared, vcpus)?));
    if let Some(listener) = &control {
        let server = Server {
            name: config.name.clone(),
            vcpu_count: config.vcpus,
            ram,
            stats,
            vcpus: vcpus.clone(),
            devices_paused,
            devices_resumed,
            outcome: outcome.clone(),
        };
        events.add_subscriber(Box::new(Control::new(listener.socket()?, server)));
    }
    own::release_startup_code();
    let ending = loop {
        events.run()?;
        if let Some(ending) = outcome.take() {
            break ending;
        }
    };
    vcpus.lock().unwrap_or_else(PoisonError::into_inner).stop();
    drop(raw);
    Ok(ending)
}

fn open_kvm() -> Result<Kvm, VmError> {
    Kvm::new().map_err(|source| match io::Error::from(source).kind() {
        io::ErrorKind::NotFound => VmError::NoKvm,
        io::ErrorKind::PermissionDenied => VmError::KvmPermission,
        _ => VmError::Kvm { what: "open /dev/kvm", source },
    })
}

fn create_vm(kvm: &Kvm, ram: &Ram) -> Result<VmFd, VmError> {
    let vm = loop {
        match kvm.create_vm() {
            // Creating a VM waits for other work of the host and can be interrupted.
            Err(e) if e.errno() == libc::EINTR => {}
            other => break other.map_err(VmError::kvm("create a VM"))?,
        }
    };
    vm.set_identity_map_address(KVM_IDENTITY_MAP).map_err(VmError::kvm("set the identity map's place"))?;
    vm.set_tss_address(KVM_TSS as usize).map_err(VmError::kvm("set the task segment's place"))?;
    vm.create_irq_chip().map_err(VmError::kvm("create the interrupt controllers"))?;
    let pit = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
    vm.create_pit2(pit).map_err(VmError::kvm("create the timer"))?;
    for (slot, extent) in ram.extents().iter().enumerate() {
        let region = kvm_userspace_memory_region {
            slot: slot as u32,
            guest_phys_addr: extent.gpa,
            memory_size: extent.bytes,
            userspace_addr: extent.hva,
            flags: 0,
        };
        set_memory(&vm, region)?;
    }
    Ok(vm)
}

#[expect(unsafe_code, reason = "hands guest RAM to KVM")]
fn set_memory(vm: &VmFd, region: kvm_userspace_memory_region) -> Result<(), VmError> {
    // SAFETY: the region is a mapping of `Ram`, which is never unmapped.
    unsafe { vm.set_user_memory_region(region) }.map_err(VmError::kvm("take the guest's memory"))
}

fn create_vcpus(kvm: &Kvm, vm: &VmFd, count: u8) -> Result<Vec<VcpuFd>, VmError> {
    let (supported, deadline_timer) = cpuid::supported(kvm)?;
    (0..count)
        .map(|id| {
            let vcpu = vm.create_vcpu(id.into()).map_err(VmError::kvm("create a vCPU"))?;
            vcpu.set_cpuid2(&cpuid::for_vcpu(&supported, deadline_timer, id, count))
                .map_err(VmError::kvm("set the CPUID"))?;
            registers::reset(&vcpu)?;
            Ok(vcpu)
        })
        .collect()
}

/// The built-in guest keeps time by the TSC and is told its rate, and where to look for virtio devices.
fn cmdline(config: &Config, vcpus: &[VcpuFd]) -> String {
    match (&config.kernel, vcpus.first().and_then(|v| v.get_tsc_khz().ok())) {
        (KernelSource::BuiltIn(_), Some(khz)) => {
            format!("{} tsc_khz={khz} virtio_mmio={VIRTIO_BASE:#x}:{VIRTIO_MAX}", config.cmdline)
        }
        _ => config.cmdline.clone(),
    }
}

fn drained(port: &Mutex<devices::legacy::serial::Serial>) -> Result<EventFd, VmError> {
    let port = port.lock().unwrap_or_else(PoisonError::into_inner);
    port.drained_fd().try_clone().map_err(VmError::host("duplicate an eventfd"))
}

fn console_input(
    config: &Config,
    events: &mut Subscribers,
    shared: &Arc<Shared>,
    com1: &Arc<Mutex<devices::legacy::serial::Serial>>,
    outcome: &Outcome,
) -> Result<Option<Raw>, VmError> {
    if config.lifeline {
        events.add_subscriber(Box::new(Lifeline(outcome.clone())));
        return Ok(None);
    }
    if config.console != Console::Stdio {
        return Ok(None);
    }
    let raw = Raw::enter().map_err(VmError::host("make the terminal raw"))?;
    let feed = Feed::new(com1.clone(), shared.clone());
    let input = ConsoleInput::new(feed, drained(com1)?, outcome.clone(), raw.is_some());
    events.add_subscriber(Box::new(input));
    Ok(raw)
}

/// A socket that is gone from the file system when the VM is.
struct Listener {
    socket: UnixListener,
    path: PathBuf,
}

impl Listener {
    fn bind(path: &Path) -> Result<Self, VmError> {
        let failed = |hint, source| VmError::Socket { path: path.into(), hint, source };
        let socket = UnixListener::bind(path).map_err(|e| match e.kind() {
            io::ErrorKind::AddrInUse => {
                failed(": it is there already; another VM uses it, or one was killed (then remove it)", e)
            }
            io::ErrorKind::NotFound => failed(": its directory does not exist", e),
            _ => failed("", e),
        })?;
        socket.set_nonblocking(true).map_err(|e| failed("", e))?;
        Ok(Self { socket, path: path.into() })
    }

    fn socket(&self) -> Result<UnixListener, VmError> {
        self.socket.try_clone().map_err(VmError::host("duplicate a socket"))
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

/// Wakes the loop when an ending was told.
struct Ended(Outcome);

impl MutEventSubscriber for Ended {
    fn init(&mut self, ops: &mut EventOps) {
        let _ = ops.add(Events::new(self.0.event(), EventSet::IN));
    }

    fn process(&mut self, _: Events, _: &mut EventOps) {
        let _ = self.0.event().read();
    }
}

#[derive(Clone, Copy)]
enum GuestAsks {
    PowerOff,
    Reset,
}

/// The guest's own end, through the power or reset register.
struct GuestEnd {
    event: EventFd,
    ending: GuestAsks,
    outcome: Outcome,
}

impl MutEventSubscriber for GuestEnd {
    fn init(&mut self, ops: &mut EventOps) {
        let _ = ops.add(Events::new(&self.event, EventSet::IN));
    }

    fn process(&mut self, _: Events, _: &mut EventOps) {
        let _ = self.event.read();
        self.outcome.tell(match self.ending {
            GuestAsks::PowerOff => Ending::PowerOff,
            GuestAsks::Reset => Ending::Reset,
        });
    }
}

/// Signals that ask the program to end, end the VM in good order.
struct Signals {
    pipe: std::os::unix::net::UnixStream,
    outcome: Outcome,
}

impl Signals {
    fn new(outcome: Outcome) -> Result<Self, VmError> {
        let failed = VmError::host::<io::Error>;
        let (pipe, end) =
            std::os::unix::net::UnixStream::pair().map_err(failed("make a pipe for signals"))?;
        for signal in [SIGINT, SIGTERM, SIGHUP] {
            let end = end.try_clone().map_err(failed("make a pipe for signals"))?;
            signal_hook::low_level::pipe::register(signal, end).map_err(failed("watch for signals"))?;
        }
        Ok(Self { pipe, outcome })
    }
}

impl MutEventSubscriber for Signals {
    fn init(&mut self, ops: &mut EventOps) {
        let _ = ops.add(Events::new(&self.pipe, EventSet::IN));
    }

    fn process(&mut self, _: Events, _: &mut EventOps) {
        let mut bytes = [0u8; 16];
        let _ = rustix::io::read(&self.pipe, &mut bytes);
        self.outcome.tell(Ending::Stopped);
    }
}

/// Carries out what the control socket asks.
struct Server {
    name: String,
    vcpu_count: u8,
    ram: Ram,
    stats: KvmStats,
    vcpus: Arc<Mutex<Vcpus>>,
    devices_paused: Arc<AtomicBool>,
    devices_resumed: EventFd,
    outcome: Outcome,
}

impl Serve for Server {
    fn serve(&mut self, request: Request) -> Reply {
        let vcpus = self.vcpus.lock().unwrap_or_else(PoisonError::into_inner);
        match request {
            Request::Status => Reply::Status(Status {
                name: self.name.clone(),
                pid: std::process::id(),
                paused: self.devices_paused.load(Ordering::SeqCst),
                vcpus: self.vcpu_count,
                memory_bytes: self.ram.bytes(),
                backend: probe::backend_name().to_owned(),
                extents: self.ram.extents(),
            }),
            Request::Pause if vcpus.pause() => {
                self.devices_paused.store(true, Ordering::SeqCst);
                Reply::Done
            }
            Request::Pause => {
                vcpus.resume();
                Reply::Error("a vCPU did not leave the guest in time; the VM runs on".into())
            }
            Request::Resume => {
                self.devices_paused.store(false, Ordering::SeqCst);
                let _ = self.devices_resumed.write(1);
                vcpus.resume();
                Reply::Done
            }
            Request::Stop => {
                self.outcome.tell(Ending::Stopped);
                Reply::Done
            }
            Request::Mergeable { on } => match self.ram.set_mergeable(on) {
                Ok(()) => Reply::Done,
                Err(e) => Reply::Error(chain(&e)),
            },
            Request::KvmStats => match self.stats.read() {
                Ok(values) => Reply::KvmStats(values),
                Err(e) => Reply::Error(format!("KVM's statistics cannot be read: {e}")),
            },
        }
    }
}

fn chain(error: &dyn std::error::Error) -> String {
    match error.source() {
        Some(source) => format!("{error}: {}", chain(source)),
        None => error.to_string(),
    }
}
