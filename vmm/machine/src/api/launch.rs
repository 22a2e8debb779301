//! The real thing: VMs on KVM, started as the API's objects say, on the main thread's event loop.

use std::io;
use std::path::Path;
use std::time::Duration;

use devices::rate_limiter::{LimiterState, Limits};
use devices::virtio::balloon::Handle;
use serde_json::Value;

use super::balloon::device_config;
use super::fault::Fault;
use super::instance::{Launch, Machine, vm_drive};
use super::model::{BUILT_IN, BootSource, Entropy, HugePages, NetworkInterface, Pmem, Spec, Vsock};
use super::snapshot::{self, CreateSnapshot, LoadSnapshot};
use crate::balloon::{BalloonError, BalloonHost};
use crate::restore::Image;
use crate::snapshot::create::CreateError;
use crate::snapshot::load::StateFile;
use crate::state::setup::Setup;
use crate::{Console, EventLoop, Interface, Mmds, Timer, Unpack, Vm, VmConfig, VmError, cmdline};
use memory::ram::Backing;

/// Starts VMs.
pub struct Launcher {
    /// What the API does not say: sockets, console, merging, name.
    rest: VmConfig,
    /// The main thread's loop.
    pub events: EventLoop,
}

impl Launcher {
    /// A launcher that has started nothing yet.
    pub fn new(rest: VmConfig, events: EventLoop) -> Self {
        Self { rest, events }
    }

    /// The VM of `spec`.
    fn config(&self, spec: &Spec, source: &BootSource) -> VmConfig {
        let machine = spec.machine_config;
        let (backing, huge_pages) = backing(machine.huge_pages);
        let is_built_in = source.kernel_image_path == Path::new(BUILT_IN);
        let mut cmdline = source.boot_args.clone().unwrap_or_else(|| self.rest.cmdline().into());
        if let Some(root) = spec.drives.iter().find(|drive| drive.is_root_device) {
            let device = match &root.partuuid {
                Some(partuuid) => format!("PARTUUID={partuuid}"),
                None => "/dev/vda".to_owned(),
            };
            let mode = if root.is_read_only { "ro" } else { "rw" };
            cmdline = cmdline::append(&cmdline, &format!("root={device} {mode}"));
        }
        if let Some((number, root)) = (0..).zip(&spec.pmem).find(|(_, pmem)| pmem.root_device) {
            let mode = if root.read_only { "ro" } else { "rw" };
            cmdline = cmdline::append(&cmdline, &format!("root=/dev/pmem{number} {mode}"));
        }
        VmConfig {
            kernel: (!is_built_in).then(|| source.kernel_image_path.clone()),
            unpack: Unpack::Host,
            initrd: source.initrd_path.clone(),
            cmdline: Some(cmdline),
            drives: spec.drives.iter().map(vm_drive).collect(),
            pmem: spec.pmem.iter().map(Pmem::pmem).collect(),
            net: interfaces(spec),
            vsock: spec.vsock.as_ref().map(Vsock::sockets),
            memory_bytes: machine.mem_size_mib << 20,
            backing,
            cpus: machine.vcpu_count,
            balloon: spec.balloon.as_ref().map(device_config),
            huge_pages,
            track_dirty_pages: machine.track_dirty_pages,
            entropy: entropy(spec),
            console: self.console(spec),
            ..self.rest.clone()
        }
    }
}

impl Launcher {
    /// Where the console goes: the API's word counts.
    fn console(&self, spec: &Spec) -> Console {
        let path = spec.serial.as_ref().and_then(|serial| serial.serial_out_path.clone());
        path.map_or_else(|| self.rest.console.clone(), Console::File)
    }

    fn started(&mut self, image: Option<Image>, config: &VmConfig) -> Result<LaunchedVm, VmError> {
        let timer = Timer::new().map_err(VmError::host("make a timer"))?;
        let vm = match image {
            None => Vm::start(config, &mut self.events)?,
            image => Vm::start_from(image, config, &mut self.events)?,
        };
        let running = vm.running().clone();
        self.events.add(timer.subscriber(move || _ = running.request_balloon_statistics()));
        Ok(LaunchedVm { vm, timer })
    }
}

impl Launch for Launcher {
    type Vm = LaunchedVm;

    fn launch(
        &mut self,
        spec: &Spec,
        source: &BootSource,
        store: &mmds::Store,
    ) -> Result<LaunchedVm, VmError> {
        let config = VmConfig { mmds: mmds(spec, store), ..self.config(spec, source) };
        self.started(None, &config)
    }

    fn load(
        &mut self,
        load: &LoadSnapshot,
        before: &Spec,
        store: &mmds::Store,
    ) -> Result<(Spec, LaunchedVm), Fault> {
        let failed = |error| Fault::Load(Box::new(error));
        let memory = load.memory()?;
        let file = StateFile::open(&load.snapshot_path).map_err(failed)?;
        let mut spec = snapshot::spec(&file, load, before);
        load.apply_overrides(&mut spec)?;
        let (backing, huge_pages) = backing(spec.machine_config.huge_pages);
        let rest = VmConfig { track_dirty_pages: spec.machine_config.track_dirty_pages, ..self.rest.clone() };
        let (net, vsock) = (interfaces(&spec), spec.vsock.as_ref().map(Vsock::sockets));
        let config =
            VmConfig { backing, huge_pages, net, vsock, entropy: entropy(&spec), ..file.config(rest) };
        let config = VmConfig { mmds: mmds(&spec, store), ..config };
        let image = file.image(&config, &memory, load.how()).map_err(failed)?;
        let vm = self.started(Some(image), &config).map_err(Fault::LoadStart)?;
        // The limits are the devices' state.
        let running = vm.vm.running();
        let limits = |state: Option<LimiterState>| state.map(|state| state.limits()).unwrap_or_default();
        for (number, interface) in spec.network_interfaces.iter_mut().enumerate() {
            let [receive, transmit] = running.net_limits(number);
            (interface.rx_rate_limiter, interface.tx_rate_limiter) = (limits(receive), limits(transmit));
        }
        spec.entropy = running.entropy_limits().map(|state| Entropy { rate_limiter: state.limits() });
        Ok((spec, vm))
    }
}

fn mmds(spec: &Spec, store: &mmds::Store) -> Option<Mmds> {
    let config = spec.mmds_config.as_ref()?;
    let has_it = |interface: &NetworkInterface| config.network_interfaces.contains(&interface.iface_id);
    let interfaces = (0..).zip(&spec.network_interfaces).filter(|(_, interface)| has_it(interface));
    let interfaces = interfaces.map(|(number, _)| number).collect();
    Some(Mmds { config: config.config(), store: store.clone(), interfaces })
}

fn entropy(spec: &Spec) -> Limits {
    spec.entropy.map(|entropy| entropy.rate_limiter).unwrap_or_default()
}

fn interfaces(spec: &Spec) -> Vec<Interface> {
    spec.network_interfaces.iter().map(NetworkInterface::interface).collect()
}

fn backing(huge_pages: HugePages) -> (Backing, Option<bool>) {
    match huge_pages {
        HugePages::None => (Backing::Anonymous, None),
        HugePages::Transparent => (Backing::Anonymous, Some(true)),
        HugePages::Pool2M => (Backing::Hugetlb, None),
    }
}

/// A VM that the API started.
pub struct LaunchedVm {
    vm: Vm,
    /// For statistics.
    timer: Timer,
}

impl LaunchedVm {
    /// Ends its vCPUs.
    pub fn stop(self) {
        self.vm.stop();
    }
}

impl Machine for LaunchedVm {
    fn is_paused(&self) -> bool {
        self.vm.running().is_paused()
    }

    fn pause(&mut self) -> bool {
        self.vm.running().pause()
    }

    fn resume(&mut self) {
        self.vm.running().resume();
    }

    fn create_snapshot(&mut self, create: &CreateSnapshot, setup: Setup) -> Result<(), CreateError> {
        let paths = (create.snapshot_path.as_path(), create.mem_file_path.as_path());
        let created = self.vm.running().create_snapshot(create.snapshot_type.kind(), paths, setup)?;
        tracing::info!(pages = created.pages, state_bytes = created.state_bytes, "the snapshot is written");
        Ok(())
    }

    fn replace_drive(&mut self, drive: &crate::Drive) -> Result<(), crate::DriveError> {
        self.vm.running().replace_drive(drive)
    }

    fn press_power_button(&self) -> bool {
        self.vm.running().press_power_button()
    }

    fn balloon(&self) -> Option<&Handle> {
        self.vm.running().balloon()
    }

    fn balloon_host(&self) -> Value {
        let running = self.vm.running();
        let host = running.balloon().and_then(|handle| BalloonHost::of(handle, running.ram()).ok());
        host.and_then(|host| serde_json::to_value(host).ok()).unwrap_or_default()
    }

    fn set_balloon(&mut self, pages: u32) -> Result<(), BalloonError> {
        self.vm.running().set_balloon(pages)
    }

    fn start_hinting(&mut self, acknowledge_on_stop: bool) -> Result<(), BalloonError> {
        self.vm.running().start_hinting(acknowledge_on_stop)
    }

    fn stop_hinting(&mut self) -> Result<(), BalloonError> {
        self.vm.running().stop_hinting()
    }

    fn set_net_limits(&mut self, number: usize, receive: Limits, transmit: Limits) -> bool {
        self.vm.running().set_net_limits(number, receive, transmit)
    }

    fn poll_statistics(&mut self, every: Duration) -> io::Result<()> {
        self.timer.every(every)
    }
}
