//! Builds one VM, in order: from `/dev/kvm` to vCPU threads that run.

use std::fmt::Write;
use std::io;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use devices::legacy::serial::Serial;
use devices::rate_limiter::Limiter;
use devices::virtio::balloon::Balloon;
use devices::virtio::block::Block;
use devices::virtio::rng::Rng;
use devices::virtio::{Interrupt, VirtioDevice};
use event_manager::MutEventSubscriber;
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use vmm_sys_util::eventfd::EventFd;

use super::channel::{Channel, ChannelOutput};
use super::coalesced::Ring;
use super::config::{Console, VmConfig};
use super::console::ConsoleInput;
use super::control::Control;
use super::create::{create_bare_vcpus, create_vcpus, create_vm};
use super::dirty::DirtyLog;
use super::drive::{self, Attached};
use super::error::{MAX_VCPUS, VmError};
use super::events::EventLoop;
use super::exit::Outcome;
use super::feed::Feed;
use super::guest_end::GuestEnd;
use super::interface;
use super::last_words::LastWords;
use super::listener::Listener;
use super::machine::Machine;
use super::merging::Merging;
use super::platform::{COM1_PORT, COM2_PORT, GENERATION, VIRTIO_BASE};
use super::probe;
use super::restore::{Image, Mapped};
use super::running::{NetHandle, Running};
use super::shut_down::ShutDown;
use super::snapshot::{FileWatch, Watch};
use super::state::vcpu::Saved;
use super::stats::KvmStats;
use super::sweep::sweeper;
use super::tracking::Tracking;
use super::trouble::Trouble;
use super::vcpu::{Shared, Vcpus};
use super::vsock::Vsock;
use super::working_set::Sampler;
use super::{acpi, boot, generation, registers};
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
        image.as_ref().map_or(Ok(()), |image| image.check(config))?;
        let ram = map_ram(config)?;
        Self::build(ram.clone(), image, config, events).inspect_err(|_| give_back(ram))
    }

    /// Of RAM that [`map_ram`] made for it; one that goes on from `image`, if there is one.
    fn build(
        ram: Ram,
        image: Option<Image>,
        config: &VmConfig,
        events: &mut EventLoop,
    ) -> Result<Self, VmError> {
        if !(1..=MAX_VCPUS).contains(&config.cpus) {
            return Err(VmError::Vcpus { asked: config.cpus });
        }
        if config.initrd.is_some() && config.kernel.is_none() {
            return Err(VmError::InitrdWithoutKernel);
        }
        let began = Instant::now();
        let outcome = events.outcome().clone();
        let mut subscribers: Vec<Box<dyn MutEventSubscriber>> = Vec::new();
        let kvm = open_kvm()?;
        let disks = drive::open_all(&config.drives)?;
        image.as_ref().map_or(Ok(()), |image| image.check_drives(&disks))?;
        let interfaces = interface::open_all(&config.net, config.mmds.as_ref())?;
        // Sockets before the kernel is loaded: a path in use is known at once.
        let listen = |path| match config.daemon.is_some() {
            true => Listener::bind(path)?.keep(),
            false => Listener::bind(path),
        };
        let control = config.control.as_deref().map(listen).transpose()?;
        let com2 = config.com2.as_deref().map(listen).transpose()?;
        let vsock = config.vsock.as_ref().map(Vsock::open).transpose()?;

        let (is_image, is_paused) = (image.is_some(), image.as_ref().is_some_and(|image| image.is_paused));
        let Mapped { saved: state, slabs, handler, lease } =
            image.map(|image| image.map(&ram, config)).transpose()?.unwrap_or_default();
        // What a state file is of, the configuration does not tell.
        let is_from_file = state.as_ref().is_some_and(|(state, _)| state.memory().is_none());
        let is_built_in = config.kernel.is_none() && !is_from_file;
        let vm = Arc::new(create_vm(&kvm, &ram)?);
        let write_log = DirtyLog::new(&vm, &ram);
        // Before anything is written that the memory file has not.
        let tracking = match config.track_dirty_pages {
            true => Tracking::start(&write_log, &ram, is_image)
                .map_err(VmError::host("log which pages are written (track_dirty_pages)"))?,
            false => Tracking::default(),
        };
        let entropy = Limiter::new(config.entropy);
        let mut virtio: Vec<Box<dyn VirtioDevice>> = vec![Box::new(Rng::limited(entropy.clone()))];
        let balloon = config.balloon.map(|balloon| {
            let (device, handle) = Balloon::new(balloon, ram.memory(), Box::new(ram.clone()));
            virtio.push(Box::new(device));
            handle
        });
        // Behind the others, which so are where they are without drives.
        let mut drives = Vec::new();
        for (disk, drive) in disks.into_iter().zip(&config.drives) {
            let file = disk.medium.file().try_clone();
            let file = file.map_err(VmError::host("duplicate a drive's descriptor"))?;
            let (device, handle) =
                Block::new(disk, Box::new(ram.clone()), || jail::enter(jail::Thread::Disk))
                    .map_err(VmError::host("start a drive's thread"))?;
            virtio.push(Box::new(device));
            drives.push(Attached { id: drive.id.clone(), file, read_only: drive.read_only, handle });
        }
        let mut nets = Vec::new();
        for (interface, limiters) in interfaces {
            nets.push(NetHandle { device: virtio.len(), limiters });
            virtio.push(Box::new(interface));
        }
        if let Some((device, held)) = vsock {
            virtio.push(Box::new(device));
            subscribers.push(Box::new(held));
        }
        let virtio_count = virtio.len();
        let com2_output = ChannelOutput::new().map_err(VmError::host("make an eventfd"))?;
        let (console_trouble, last_words) = (Trouble::default(), LastWords::default());
        let console = Box::new(last_words.listen(config.console.output(&console_trouble)?));
        let machine = Machine::new(&vm, ram.memory(), console, Box::new(com2_output.clone()), virtio)?;
        let vcpus = match state.as_ref().map(|(_, saved)| *saved) {
            Some(Saved::Here) => create_bare_vcpus(&vm, config.cpus)?,
            Some(Saved::Anywhere) | None => create_vcpus(&kvm, &vm, config.cpus)?,
        };
        tracing::debug!(ms = began.elapsed().as_millis(), "KVM and the devices are set up");
        match &state {
            Some((state, saved)) => state.restore(*saved, &vm, &vcpus, &machine.board, ram.memory())?,
            None => {
                registers::write_tables(ram.memory())?;
                let acpi_root = acpi::write(ram.memory(), config.cpus, virtio_count)?;
                if config.kernel.is_some() {
                    generation::write(ram.memory())?;
                }
                let cmdline = cmdline(config, &vcpus, virtio_count);
                let entry = boot::load(ram.memory(), config, &cmdline, acpi_root)?;
                // Samepage's own guest has no way to start the others: all of them begin at its entry.
                let begin = if config.kernel.is_some() { 1 } else { vcpus.len() };
                for (number, vcpu) in (0..).zip(&vcpus).take(begin) {
                    registers::enter(vcpu, entry, number)?;
                }
            }
        }
        // Before the guest writes: what it has in common with others is shared from the first instant.
        let found_slabs = FoundSlabs::new(Mutex::new(slabs));
        let merging = Merging::prepare(config, &ram, found_slabs.clone());

        let stats = Arc::new(KvmStats::open(&vm, &vcpus));
        let Machine { pio, mmio, com1, com2: com2_port, power_off, reset, panicked, .. } = machine;
        let Machine { power_button, mut queues, interrupts, board, .. } = machine;
        let waits = {
            let ports = [com1.clone(), com2_port.clone()];
            let input = move || ports.iter().any(|p| os::lock(p).has_input());
            Box::new(move || input() || interrupts.iter().any(Interrupt::is_pending))
        };
        let guest_end = GuestEnd::new([power_off, reset, panicked], last_words.clone(), outcome.clone());
        let ends = guest_end.clone();
        let has_ended = Box::new(move || ends.tell());
        let shared =
            Shared::new(config.cpus, pio, mmio, waits, has_ended, outcome.clone(), ram.merges().clone());
        if is_paused {
            shared.start_paused();
        }
        queues.wake(shared.clone());
        let (devices_paused, devices_resumed) = queues.pausing()?;

        subscribers.push(Box::new(queues));
        subscribers.push(Box::new(guest_end));
        if let Some(input) = console_input(config, &shared, &com1, &outcome)? {
            subscribers.push(Box::new(input));
        }
        let com2_drained = drained(&com2_port)?;
        let feed = Arc::new(Mutex::new(Feed::new(com2_port, shared.clone())));
        let shut_down = ShutDown::new(power_button, feed.clone()).map_err(VmError::host("make a timer"))?;
        subscribers.push(shut_down.subscriber(outcome.clone()));
        if let Some(listener) = com2 {
            subscribers.push(Box::new(Channel::new(listener, com2_output, feed, com2_drained)));
        }
        if let Some(balloon) = &balloon {
            let sweeper = sweeper(balloon.clone(), ram.clone());
            subscribers.push(sweeper.map_err(VmError::host("make a timer"))?);
        }
        tracing::debug!(ms = began.elapsed().as_millis(), "the machine is built; its vCPUs start");
        let ring = vcpus.first().filter(|_| is_built_in);
        let ring = ring.and_then(|first| Ring::of(&vm, first, &[COM1_PORT, COM2_PORT]));
        let vcpus = Arc::new(Mutex::new(Vcpus::start(shared.clone(), vcpus, ring)?));
        let running = Running {
            name: config.name.clone(),
            vcpu_count: config.cpus,
            write_log,
            tracking,
            drives: Arc::new(Mutex::new(drives)),
            nets: Arc::new(nets),
            entropy,
            handler_ended: handler.as_ref().map(|_| Arc::default()),
            wakes: Arc::new(AtomicBool::new(is_image)),
            sampler: Sampler::start(&ram, config.sampling),
            clock: Arc::default(),
            not_captured: not_captured(config, &ram),
            ram,
            stats,
            vcpus,
            devices_paused,
            devices_resumed: Arc::new(devices_resumed),
            balloon,
            shut_down,
            last_words,
            shared,
            outcome,
            console_trouble,
            found_slabs: merging.is_some().then_some(found_slabs),
            board,
            vm: Arc::downgrade(&vm),
            kvm: Arc::new(kvm),
            savable: Arc::default(),
        };
        // Threads with lists of their own are there before this one is confined: what it starts is confined as it is.
        config.outlive_daemon();
        if let Some(merging) = merging {
            merging.start(running.write_log());
        }
        if let Some(handler) = handler {
            subscribers.push(Box::new(Watch::new(handler, running.clone())));
        }
        if let Some(lease) = lease {
            subscribers.push(Box::new(FileWatch::new(lease, running.clone())));
        }
        if let Some(listener) = control {
            let control = Control::new(listener, running.clone());
            subscribers.push(Box::new(control.map_err(VmError::host("make an eventfd"))?));
        }
        for subscriber in subscribers {
            events.add(subscriber);
        }
        own::release_startup_code();
        // A capture tells it, when the files that say it can no longer be opened.
        let _ = probe::backend();
        jail::enter_with(jail::Thread::EventLoop, &config.files());
        match is_paused {
            // They are before their first instruction.
            true => _ = running.pause(),
            false => running.wake(),
        }
        if let Some(rate) = config.throttle
            && let Err(error) = running.set_throttle(Some(rate))
        {
            tracing::warn!("{} is not throttled: {error}", config.name);
        }
        Ok(Self { running, _vm: vm })
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
    config.drives.iter().any(|drive| !drive.read_only).then_some(
        "it has a drive that it may write, and two VMs cannot write the same file; expected read_only drives, or none",
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

fn open_kvm() -> Result<Kvm, VmError> {
    Kvm::new().map_err(|source| match io::Error::from(source).kind() {
        io::ErrorKind::NotFound => VmError::NoKvm,
        io::ErrorKind::PermissionDenied => VmError::KvmPermission,
        _ => VmError::Kvm { what: "open /dev/kvm", source },
    })
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

fn drained(port: &Mutex<Serial>) -> Result<EventFd, VmError> {
    let port = os::lock(port);
    port.drained_fd().try_clone().map_err(VmError::host("duplicate an eventfd"))
}

/// Standard input to COM1.
fn console_input(
    config: &VmConfig,
    shared: &Arc<Shared>,
    com1: &Arc<Mutex<Serial>>,
    outcome: &Outcome,
) -> Result<Option<ConsoleInput>, VmError> {
    if config.lifeline || config.console != Console::Stdio {
        return Ok(None);
    }
    let feed = Feed::new(com1.clone(), shared.clone());
    let input = ConsoleInput::new(feed, drained(com1)?, outcome.clone());
    input.map(Some).map_err(VmError::host("watch the terminal"))
}
