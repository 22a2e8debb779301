//! Builds one VM, in order: from `/dev/kvm` to vCPU threads that run.

use std::fmt::Write;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use event_manager::MutEventSubscriber;
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use vmm_sys_util::eventfd::EventFd;

use super::board::Board;
use super::channel::ChannelOutput;
use super::coalesced::Ring;
use super::config::{MAX_VCPUS, VmConfig};
use super::control::Control;
use super::create::{BareVm, create_bare_vcpus, create_vcpus, give_memory};
use super::dirty::DirtyLog;
use super::drive::{self, Drive};
use super::error::VmError;
use super::events::EventLoop;
use super::exit::Outcome;
use super::feed::Feed;
use super::guest_end::GuestEnd;
use super::last_words::LastWords;
use super::listener::Listener;
use super::machine::Machine;
use super::merging::Merging;
use super::platform::{COM1_PORT, COM2_PORT, GENERATION, VIRTIO_BASE};
use super::pmem::Regions;
use super::restore::{Image, Mapped};
use super::running::Running;
use super::shut_down::ShutDown;
use super::snapshot::{FileWatch, Watch};
use super::state::vcpu::Saved;
use super::stats::KvmStats;
use super::sweep::sweeper;
use super::tracking::Tracking;
use super::trouble::Trouble;
use super::vcpu::{Shared, Vcpus};
use super::vsock::{Held, Vsock};
use super::working_set::Sampler;
use super::{acpi, boot, generation, interface, probe, registers, serial_ports, slots, virtio};
use memory::own;
use memory::ram::{Backing, Ram};
use merge::slab::agent::FoundSlabs;

/// A VM whose vCPUs run.
pub struct Vm {
    running: Running,
    /// KVM releases every irqfd when this is closed, though the vCPUs keep the VM itself. So all others have only a weak
    /// reference to it.
    _vm: Arc<VmFd>,
}

impl Vm {
    /// Builds the VM of `config`, has `events` watch what belongs to it, and starts its vCPUs. If it fails, `events` is as it was, and
    /// everything that was taken is given back: the RAM, sockets, locks on drives.
    pub fn start(config: &VmConfig, events: &mut EventLoop) -> Result<Self, VmError> {
        Self::start_from(Image::take(config)?, config, events)
    }

    /// The same, of one that goes on from `image`, if there is one.
    pub(crate) fn start_from(
        image: Option<Image>,
        config: &VmConfig,
        events: &mut EventLoop,
    ) -> Result<Self, VmError> {
        Self::start_in(None, image, config, events)
    }

    /// The same, in `bare`, which was made ahead for one that goes on from an image.
    pub(super) fn start_in(
        bare: Option<BareVm>,
        image: Option<Image>,
        config: &VmConfig,
        events: &mut EventLoop,
    ) -> Result<Self, VmError> {
        image.as_ref().map_or(Ok(()), |image| image.check(config))?;
        let ram = map_ram(config)?;
        Self::build(ram.clone(), bare, image, config, events).inspect_err(|_| give_back(ram))
    }

    /// Of RAM that [`map_ram`] made for it; one that goes on from `image`, if there is one.
    fn build(
        ram: Ram,
        bare: Option<BareVm>,
        mut image: Option<Image>,
        config: &VmConfig,
        events: &mut EventLoop,
    ) -> Result<Self, VmError> {
        check(config)?;
        let began = Instant::now();
        let host = Host::open(bare, config, image.as_mut())?;
        let mut still = Still::make(config, ram, host, image)?;
        tracing::debug!(ms = began.elapsed().as_millis(), "KVM and the devices are set up");
        still.load(config)?;
        // Before the guest writes: what it has in common with others is shared from the first instant.
        let found_slabs = FoundSlabs::new(Mutex::new(std::mem::take(&mut still.core.mapped.slabs)));
        let merging = Merging::prepare(config, &still.core.ram, found_slabs.clone());
        let wired = Wired::of(config, still, events.outcome())?;
        tracing::debug!(ms = began.elapsed().as_millis(), "the machine is built; its vCPUs start");
        wired.start(config, events, merging.map(|merging| (merging, found_slabs)))
    }

    /// The way to it.
    pub fn running(&self) -> &Running {
        &self.running
    }

    /// Ends its vCPUs.
    pub fn stop(self) {
        self.running.vcpus().stop();
    }
}

/// Whether there can be a VM so.
fn check(config: &VmConfig) -> Result<(), VmError> {
    if !(1..=MAX_VCPUS).contains(&config.cpus) {
        return Err(VmError::Vcpus { asked: config.cpus });
    }
    match config.initrd.is_some() && config.kernel.is_none() {
        true => Err(VmError::InitrdWithoutKernel),
        false => Ok(()),
    }
}

/// What a VM takes of the host, opened before a kernel is loaded: what is in use already is known at once.
struct Host {
    bare: BareVm,
    devices: virtio::Opened,
    control: Option<Listener>,
    com2: Option<Listener>,
    vsock: Option<Held>,
}

impl Host {
    /// What `config` names, and a VM, unless there is one. Drives are to be the files that `image` had.
    fn open(bare: Option<BareVm>, config: &VmConfig, mut image: Option<&mut Image>) -> Result<Self, VmError> {
        let bare = bare.map_or_else(BareVm::new, Ok)?;
        let layers = image.as_mut().map(|image| image.take_layers()).unwrap_or_default();
        let disks = drive::open_all(&config.drives, layers)?;
        image.map_or(Ok(()), |image| image.check_drives(&disks))?;
        let regions = Arc::new(Regions::open(&config.pmem, config.memory_bytes)?);
        let interfaces = interface::open_all(&config.net, config.mmds.as_ref())?;
        let listen = |path| match config.daemon.is_some() {
            true => Listener::bind(path)?.keep(),
            false => Listener::bind(path),
        };
        let control = config.control.as_deref().map(listen).transpose()?;
        let com2 = config.com2.as_deref().map(listen).transpose()?;
        let (device, vsock) = config.vsock.as_ref().map(Vsock::open).transpose()?.unzip();
        let devices = virtio::Opened { disks, regions, interfaces, vsock: device };
        Ok(Self { bare, devices, control, com2, vsock })
    }
}

/// What a VM has from when it is made until it ends.
struct Core {
    kvm: Kvm,
    vm: Arc<VmFd>,
    ram: Ram,
    regions: Arc<Regions>,
    write_log: DirtyLog,
    tracking: Tracking,
    handles: virtio::Handles,
    board: Board,
    last_words: LastWords,
    console_trouble: Trouble,
    control: Option<Listener>,
    /// What it goes on from; nothing of one that boots.
    mapped: Mapped,
    is_image: bool,
    is_paused: bool,
}

/// A VM whose devices are on their buses, and on which nothing has run.
struct Still {
    core: Core,
    vcpus: Vec<VcpuFd>,
    machine: Machine,
    com2: Option<Listener>,
    com2_output: ChannelOutput,
    vsock: Option<Held>,
}

impl Still {
    /// Gives it its memory, its devices and its vCPUs.
    fn make(config: &VmConfig, ram: Ram, host: Host, image: Option<Image>) -> Result<Self, VmError> {
        let Host { bare: BareVm { kvm, vm, vcpus: made }, devices, control, com2, vsock } = host;
        let (is_image, is_paused) = (image.is_some(), image.as_ref().is_some_and(|image| image.is_paused));
        let mapped = image.map(|image| image.map(&ram, config)).transpose()?.unwrap_or_default();
        give_memory(&vm, &ram)?;
        let vm = Arc::new(vm);
        let regions = devices.regions.clone();
        slots::set_files(&vm, regions.iter()).map_err(VmError::kvm("take the guest's persistent memory"))?;
        let write_log = DirtyLog::new(&vm, &ram);
        // Before anything is written that the memory file has not.
        let tracking = match config.track_dirty_pages {
            true => Tracking::start(&write_log, &ram, is_image)
                .map_err(VmError::host("log which pages are written (track_dirty_pages)"))?,
            false => Tracking::default(),
        };
        let (virtio, handles) = virtio::make(config, &ram, devices)?;
        let com2_output = ChannelOutput::new().map_err(VmError::host("make an eventfd"))?;
        let (console_trouble, last_words) = (Trouble::default(), LastWords::default());
        let console = Box::new(last_words.listen(config.console.output(&console_trouble)?));
        let machine = Machine::new(&vm, ram.memory(), console, Box::new(com2_output.clone()), virtio)?;
        let vcpus = match mapped.saved.as_ref().map(|(_, saved)| *saved) {
            Some(Saved::Here) => {
                let more = create_bare_vcpus(&vm, made.len() as u8, config.cpus)?;
                made.into_iter().chain(more).collect()
            }
            Some(Saved::Anywhere) | None => create_vcpus(&kvm, &vm, config.cpus)?,
        };
        let board = machine.board.clone();
        let core = Core {
            kvm,
            vm,
            ram,
            regions,
            write_log,
            tracking,
            handles,
            board,
            last_words,
            console_trouble,
            control,
            mapped,
            is_image,
            is_paused,
        };
        Ok(Self { core, vcpus, machine, com2, com2_output, vsock })
    }

    /// Makes it what its image was, or has it boot.
    fn load(&self, config: &VmConfig) -> Result<(), VmError> {
        let Core { vm, ram, board, mapped, .. } = &self.core;
        let memory = ram.memory();
        if let Some((state, saved)) = &mapped.saved {
            return Ok(state.restore(*saved, vm, &self.vcpus, board, memory)?);
        }
        let virtio_count = board.virtio.len();
        registers::write_tables(memory)?;
        let acpi_root = acpi::write(memory, config.cpus, virtio_count)?;
        if config.kernel.is_some() {
            generation::write(memory)?;
        }
        let cmdline = cmdline(config, &self.vcpus, virtio_count);
        let entry = boot::load(memory, config, &cmdline, acpi_root)?;
        // Samepage's own guest has no way to start the others: all of them begin at its entry.
        let begin = if config.kernel.is_some() { 1 } else { self.vcpus.len() };
        for (number, vcpu) in (0..).zip(&self.vcpus).take(begin) {
            registers::enter(vcpu, entry, number)?;
        }
        Ok(())
    }
}

/// A VM whose devices wake its vCPUs, and which has not begun.
struct Wired {
    core: Core,
    vcpus: Vec<VcpuFd>,
    shared: Arc<Shared>,
    shut_down: ShutDown,
    devices_paused: Arc<AtomicBool>,
    devices_resumed: EventFd,
    /// What the event loop is to watch.
    watched: Vec<Box<dyn MutEventSubscriber>>,
}

impl Wired {
    /// Joins the devices to what the vCPU threads share, and to what the event loop watches.
    fn of(config: &VmConfig, still: Still, outcome: &Outcome) -> Result<Self, VmError> {
        let Still { core, vcpus, machine, com2: listener, com2_output, vsock } = still;
        let input_waits = machine.input_waits();
        let Machine { pio, mmio, com1, com2, asks, power_button, mut queues, .. } = machine;
        let guest_end = GuestEnd::new(asks, core.last_words.clone(), outcome.clone());
        let ends = guest_end.clone();
        let has_ended = Box::new(move || ends.tell());
        let merges = core.ram.merges().clone();
        let (buses, regions) = ((pio, mmio), core.regions.clone());
        let shared =
            Shared::new(config.cpus, buses, input_waits, has_ended, outcome.clone(), merges, regions);
        if core.is_paused {
            shared.start_paused();
        }
        queues.wake(shared.clone());
        let (devices_paused, devices_resumed) = queues.pausing()?;
        let feed = Arc::new(Mutex::new(Feed::new(com2.clone(), shared.clone())));
        let shut_down = ShutDown::new(power_button, feed.clone()).map_err(VmError::host("make a timer"))?;

        let mut watched: Vec<Box<dyn MutEventSubscriber>> = Vec::new();
        watched.extend(vsock.map(|held| Box::new(held) as Box<dyn MutEventSubscriber>));
        watched.extend(core.regions.watch().map_err(VmError::host("watch persistent memory's files"))?);
        watched.push(Box::new(queues));
        watched.push(Box::new(guest_end));
        watched.extend(serial_ports::console_input(config, &shared, com1, outcome)?);
        watched.push(shut_down.subscriber(outcome.clone()));
        if let Some(listener) = listener {
            watched.push(serial_ports::channel(listener, com2_output, &com2, feed)?);
        }
        if let Some(balloon) = &core.handles.balloon {
            let sweeper = sweeper(balloon.clone(), core.ram.clone());
            watched.push(sweeper.map_err(VmError::host("make a timer"))?);
        }
        Ok(Self { core, vcpus, shared, shut_down, devices_paused, devices_resumed, watched })
    }

    /// Starts the vCPUs and the merging agent, has `events` watch what belongs to the VM, and confines this process.
    fn start(
        self,
        config: &VmConfig,
        events: &mut EventLoop,
        merging: Option<(Merging, FoundSlabs)>,
    ) -> Result<Vm, VmError> {
        let Self { core, vcpus, shared, shut_down, devices_paused, devices_resumed, mut watched } = self;
        let Core { kvm, vm, ram, mapped: Mapped { saved: state, handler, lease, .. }, .. } = core;
        let (merging, found_slabs) = merging.unzip();
        let stats = Arc::new(KvmStats::open(&vm, &vcpus));
        // What a state file is of, the configuration does not tell.
        let is_from_file = state.is_some_and(|(state, _)| state.memory().is_none());
        let is_built_in = config.kernel.is_none() && !is_from_file;
        let ring = vcpus.first().filter(|_| is_built_in);
        let ring = ring.and_then(|first| Ring::of(&vm, first, &[COM1_PORT, COM2_PORT]));
        let vcpus = Arc::new(Mutex::new(Vcpus::start(shared.clone(), vcpus, ring)?));
        let running = Running {
            name: config.name.clone(),
            vcpu_count: config.cpus,
            write_log: core.write_log,
            tracking: core.tracking,
            drives: Arc::new(Mutex::new(core.handles.drives)),
            nets: Arc::new(core.handles.nets),
            entropy: core.handles.entropy,
            handler_ended: handler.as_ref().map(|_| Arc::default()),
            wakes: Arc::new(AtomicBool::new(core.is_image)),
            sampler: Sampler::start(&ram, config.sampling),
            clock: Arc::default(),
            not_captured: not_captured(config, &ram),
            ram,
            stats,
            vcpus,
            devices_paused,
            devices_resumed: Arc::new(devices_resumed),
            balloon: core.handles.balloon,
            shut_down,
            last_words: core.last_words,
            shared,
            outcome: events.outcome().clone(),
            console_trouble: core.console_trouble,
            found_slabs,
            board: core.board,
            vm: Arc::downgrade(&vm),
            kvm: Arc::new(kvm),
            savable: Arc::default(),
        };
        // Threads with lists of their own are there before this one is confined: what it starts is confined as it is.
        config.outlive_daemon();
        if let Some(merging) = merging {
            merging.start(running.write_log());
        }
        watched.extend(handler.map(|handler| Box::new(Watch::new(handler, running.clone())) as _));
        watched.extend(lease.map(|lease| Box::new(FileWatch::new(lease, running.clone())) as _));
        if let Some(listener) = core.control {
            let control = Control::new(listener, running.clone());
            watched.push(Box::new(control.map_err(VmError::host("make an eventfd"))?));
        }
        watched.into_iter().for_each(|subscriber| events.add(subscriber));
        confine(config);
        go(config, &running, core.is_paused);
        Ok(Vm { running, _vm: vm })
    }
}

/// Confines this process's main thread, and what it starts from now on.
fn confine(config: &VmConfig) {
    own::release_startup_code();
    // A capture tells it, when the files that say it can no longer be opened.
    let _ = probe::backend();
    jail::enter_with(jail::Thread::EventLoop, &config.files());
}

/// Lets it run, unless it `is_paused` before its first instruction, and sets its pace.
fn go(config: &VmConfig, running: &Running, is_paused: bool) {
    match is_paused {
        true => _ = running.pause(),
        false => running.wake(),
    }
    if let Some(rate) = config.throttle
        && let Err(error) = running.set_throttle(Some(rate))
    {
        tracing::warn!("{} is not throttled: {error}", config.name);
    }
}

/// Why a VM of `config` cannot be captured, if it cannot.
fn not_captured(config: &VmConfig, ram: &Ram) -> Option<&'static str> {
    if ram.is_filled_by_handler() {
        return Some("its memory is filled by another process; expected memory of its own");
    }
    if ram.maps_file() {
        return Some("its memory lies in a file; expected memory of its own, as with --merge");
    }
    if config.backing != Backing::Anonymous {
        return Some("its memory is a memfd or comes from the pool of huge pages; expected anonymous memory");
    }
    if config.pmem.iter().any(|pmem| !pmem.read_only) {
        return Some(
            "it has persistent memory that it may write, and two VMs cannot write the same file; expected read_only, or none",
        );
    }
    config.drives.iter().any(Drive::is_written).then_some(
        "it has a drive that it may write, and two VMs cannot write the same file; expected drives with read_only or overlay, or none",
    )
}

/// RAM for the VM of `config`, which reads as zeros.
fn map_ram(config: &VmConfig) -> Result<Ram, VmError> {
    let ram = Ram::new(config.memory_bytes, config.backing)?;
    let advise = || -> Result<(), VmError> {
        if let Some(on) = config.huge_pages {
            ram.set_huge_pages(on)?;
        }
        if config.mergeable {
            ram.set_mergeable(true)?;
        }
        Ok(())
    };
    match advise() {
        Ok(()) => Ok(ram),
        Err(error) => {
            give_back(ram);
            Err(error)
        }
    }
}

/// Gives the RAM of a VM back that was not started.
fn give_back(ram: Ram) {
    if let Err(ram) = ram.unmap() {
        tracing::warn!(
            "{} MiB of RAM stay mapped: something of the VM that did not start has it",
            ram.bytes() >> 20
        );
    }
}

/// The built-in guest reads no ACPI tables: its command line has where its virtio devices are, and the
/// TSC's rate, by which it keeps time.
fn cmdline(config: &VmConfig, vcpus: &[VcpuFd], virtio_count: usize) -> String {
    if config.kernel.is_some() {
        return config.cmdline().into();
    }
    let mut line =
        format!("{} virtio_mmio={VIRTIO_BASE:#x}:{virtio_count} generation={GENERATION}", config.cmdline());
    if let Some(khz) = vcpus.first().and_then(|v| v.get_tsc_khz().ok()) {
        let _ = write!(line, " tsc_khz={khz}");
    }
    if config.cpus > 1 {
        let _ = write!(line, " processors={}", config.cpus);
    }
    line
}
