//! The VM as the API sees it: not started, running or paused, and what may be asked in each state.
//!
//! It knows a VM by the traits [`Launch`] and [`Machine`] only, so that all of it can be tried without KVM.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::{Duration, Instant};

use devices::rate_limiter::Limits;
use devices::virtio::balloon::Handle;
use os::named_file;
use serde_json::{Value, json};

use super::balloon;
use super::fault::Fault;
use super::logger;
use super::metrics::{self, MetricsFile};
use super::model::{
    ActionType, BUILT_IN, Balloon, BootSource, CpuConfig, Drive, DrivePatch, HugePages, Logger, MAX_MEM_MIB,
    MIN_MEM_MIB, MachineConfig, Metrics, MmdsConfig, NetworkInterface, NetworkInterfacePatch, Pmem,
    PmemPatch, Spec, StatisticsPatch, VmState,
};
use super::request::Request;
use super::response::Response;
use super::snapshot::{self, CreateSnapshot, LoadSnapshot};
use crate::balloon::BalloonError;
use crate::snapshot::create::CreateError;
use crate::state::setup::Setup;
use crate::{DriveError, MAX_DRIVES, MAX_INTERFACES, MAX_PMEM, MAX_VCPUS, VmError};

/// What builds VMs.
pub trait Launch {
    /// A VM that runs.
    type Vm: Machine;

    /// Builds the VM of `spec`, which boots from `source`, and starts it.
    /// Its metadata service shows `store`.
    fn launch(&mut self, spec: &Spec, source: &BootSource, store: &mmds::Store) -> Result<Self::Vm, VmError>;

    /// Builds the VM that goes on from a snapshot, and what it is. `before` has the logger and metrics.
    fn load(
        &mut self,
        load: &LoadSnapshot,
        before: &Spec,
        store: &mmds::Store,
    ) -> Result<(Spec, Self::Vm), Fault>;
}

/// A VM that was started.
pub trait Machine {
    /// Whether its vCPUs are paused, by this API or otherwise.
    fn is_paused(&self) -> bool;

    /// Stops its vCPUs in place. False if one did not leave the guest in time, or a drive did not answer; then the VM runs on.
    fn pause(&mut self) -> bool;

    /// Lets the vCPUs run again.
    fn resume(&mut self);

    /// Writes what it is, and `setup` with it, to files. It is paused.
    fn create_snapshot(&mut self, create: &CreateSnapshot, setup: Setup) -> Result<(), CreateError>;

    /// Puts the file of `drive` in the place of the one that the drive of its name has.
    fn replace_drive(&mut self, drive: &crate::Drive) -> Result<(), DriveError>;

    /// Presses its power button. False if the guest has no driver for it.
    fn press_power_button(&self) -> bool;

    /// The host's way to the balloon, if there is one. What changes it goes through the methods below, which wake
    /// the guest.
    fn balloon(&self) -> Option<&Handle>;

    /// What the host has seen of the balloon for itself, as JSON. Null if it cannot be seen.
    fn balloon_host(&self) -> Value;

    /// Asks the balloon's driver for another size, in pages of 4096 bytes.
    fn set_balloon(&mut self, pages: u32) -> Result<(), BalloonError>;

    /// Starts a run of free page hinting.
    fn start_hinting(&mut self, acknowledge_on_stop: bool) -> Result<(), BalloonError>;

    /// Ends the run.
    fn stop_hinting(&mut self) -> Result<(), BalloonError>;

    /// Puts other buckets in the place of those that are given, at network interface `number`. False if there is none.
    fn set_net_limits(&mut self, number: usize, receive: Limits, transmit: Limits) -> bool;

    /// Asks the balloon's driver for statistics this often from now on, but not while the VM is paused. Zero: never.
    fn poll_statistics(&mut self, every: Duration) -> io::Result<()>;
}

/// A VM, or one that is to be.
pub struct Instance<L: Launch> {
    id: String,
    /// What `GET /version` says.
    version: &'static str,
    spec: Spec,
    launch: L,
    vm: Option<(L::Vm, Instant)>,
    metrics: Option<MetricsFile>,
    /// What the metadata service shows.
    mmds: mmds::Store,
    /// The most bytes of it.
    mmds_limit: usize,
}

impl<L: Launch> Instance<L> {
    /// A VM that is not started.
    pub fn new(id: String, launch: L) -> Self {
        Self {
            id,
            version: VERSION,
            spec: Spec::default(),
            launch,
            vm: None,
            metrics: None,
            mmds: mmds::Store::default(),
            mmds_limit: mmds::SIZE_LIMIT,
        }
    }

    /// What the metadata service shows, of at most `limit` bytes from now on.
    pub fn mmds(&mut self, limit: usize) -> &mmds::Store {
        self.mmds_limit = limit;
        &self.mmds
    }

    /// Says another version from now on.
    pub fn says_version(&mut self, version: &'static str) {
        self.version = version;
    }

    /// What builds its VM.
    pub fn launch_mut(&mut self) -> &mut L {
        &mut self.launch
    }

    /// The VM, if it was started.
    pub fn into_vm(self) -> Option<L::Vm> {
        self.vm.map(|(vm, _)| vm)
    }

    /// Carries out one request.
    pub fn serve(&mut self, request: Request) -> Response {
        match self.carry_out(request) {
            Ok(Some(value)) => Response::json(&value),
            Ok(None) => Response::done(),
            Err(fault) => Response::fault(fault.message()),
        }
    }

    /// Carries out one request. What it was to show, or None where there is nothing to show.
    pub fn carry_out(&mut self, request: Request) -> Result<Option<Value>, Fault> {
        match request {
            Request::GetInstance => return Ok(Some(self.describe())),
            Request::GetVersion => return Ok(Some(json!({"firecracker_version": self.version}))),
            Request::GetVmConfig => {
                let mut spec = self.spec.clone();
                spec.balloon = self.balloon_config();
                return Ok(Some(serde_json::to_value(spec)?));
            }
            Request::GetMachineConfig => return Ok(Some(serde_json::to_value(self.spec.machine_config)?)),
            Request::GetBalloon => {
                let config = self.balloon_config().ok_or(Fault::NoBalloon)?;
                return Ok(Some(serde_json::to_value(config)?));
            }
            Request::GetBalloonStatistics => {
                let (vm, handle) = self.balloon()?;
                if self.spec.balloon.is_none_or(|c| c.stats_polling_interval_s == 0) {
                    return Err(Fault::NoStatistics);
                }
                return Ok(Some(balloon::statistics(handle, vm.balloon_host())));
            }
            Request::GetHinting => {
                self.hinting()?;
                let (_, handle) = self.balloon()?;
                return Ok(Some(balloon::hinting(handle.hinting()?)));
            }
            Request::PutMachineConfig(config) => self.set_machine_config(config)?,
            Request::PatchMachineConfig(patch) => {
                self.set_machine_config(patch.apply(self.spec.machine_config))?;
            }
            Request::PutBootSource(source) => self.set_boot_source(source)?,
            Request::PutDrive(drive) => self.set_drive(drive)?,
            Request::PatchDrive(patch) => self.change_drive(patch)?,
            Request::PutPmem(pmem) => self.set_pmem(pmem)?,
            Request::PatchPmem(patch) => self.change_pmem(&patch)?,
            Request::PutVsock(vsock) => {
                self.before_start()?;
                vsock.sockets().check().map_err(Fault::Vsock)?;
                self.spec.vsock = Some(vsock);
            }
            Request::PutNetworkInterface(interface) => self.set_interface(interface)?,
            Request::PatchNetworkInterface(patch) => self.patch_interface(&patch)?,
            Request::GetMmds => return Ok(Some(self.mmds.get())),
            Request::PutMmds(value) => self.mmds.put(value, self.mmds_limit)?,
            Request::PatchMmds(value) => self.mmds.patch(value, self.mmds_limit)?,
            Request::PutMmdsConfig(config) => self.set_mmds_config(config)?,
            Request::PutEntropy(entropy) => {
                self.before_start()?;
                self.spec.entropy = Some(entropy);
            }
            Request::PutSerial(serial) => {
                self.before_start()?;
                if let Some(path) = &serial.serial_out_path {
                    // It is opened at the start; what cannot be is known now.
                    named_file::append(path, 0o600)
                        .map_err(|source| Fault::SerialFile { path: path.clone(), source })?;
                }
                self.spec.serial = Some(serial);
            }
            Request::PutCpuConfig(CpuConfig { .. }) => self.before_start()?,
            Request::PutLogger(logger) => self.set_logger(logger)?,
            Request::PutMetrics(metrics) => self.set_metrics(metrics)?,
            Request::PutBalloon(config) => self.set_balloon(config)?,
            Request::PutAction(ActionType::InstanceStart) => self.start()?,
            Request::PutAction(ActionType::FlushMetrics) => self.flush_metrics()?,
            Request::PutAction(ActionType::SendCtrlAltDel) => {
                // What it is for: Firecracker's callers have a guest end in good order by it.
                if !self.vm()?.press_power_button() {
                    return Err(Fault::CtrlAltDel);
                }
            }
            Request::PatchVm(VmState::Paused) => {
                let vm = self.vm()?;
                if !vm.is_paused() && !vm.pause() {
                    return Err(Fault::Pause);
                }
            }
            Request::PatchVm(VmState::Resumed) => self.vm()?.resume(),
            Request::CreateSnapshot(create) => {
                if !self.spec.pmem.is_empty() {
                    return Err(Fault::PmemSnapshot);
                }
                let setup = snapshot::setup(&self.spec);
                let created = self.vm()?.create_snapshot(&create, setup);
                created.map_err(|error| Fault::Create(Box::new(error)))?;
            }
            Request::LoadSnapshot(load) => self.load(&load)?,
            Request::PatchBalloon(patch) => {
                let mem_size_mib = self.spec.machine_config.mem_size_mib;
                self.balloon()?;
                let pages = balloon::target_pages(patch.amount_mib, mem_size_mib)?;
                self.vm()?.set_balloon(pages)?;
            }
            Request::PatchBalloonStatistics(patch) => self.set_statistics(patch)?,
            Request::StartHinting(start) => {
                self.hinting()?.start_hinting(start.acknowledge_on_stop.unwrap_or(true))?
            }
            Request::StopHinting => self.hinting()?.stop_hinting()?,
        }
        Ok(None)
    }

    fn describe(&self) -> Value {
        json!({"app_name": "Samepage", "id": self.id, "state": self.state(), "vmm_version": VERSION})
    }

    fn state(&self) -> &'static str {
        match &self.vm {
            None => "Not started",
            Some((vm, _)) if vm.is_paused() => "Paused",
            Some(_) => "Running",
        }
    }

    fn before_start(&self) -> Result<(), Fault> {
        match self.vm {
            None => Ok(()),
            Some(_) => Err(Fault::AfterStart),
        }
    }

    fn vm(&mut self) -> Result<&mut L::Vm, Fault> {
        self.vm.as_mut().map(|(vm, _)| vm).ok_or(Fault::BeforeStart)
    }

    /// A VM that was started, and its balloon.
    fn balloon(&self) -> Result<(&L::Vm, &Handle), Fault> {
        let (vm, _) = self.vm.as_ref().ok_or(Fault::BeforeStart)?;
        Ok((vm, vm.balloon().ok_or(Fault::NoBalloon)?))
    }

    /// A VM whose balloon has free page hinting.
    fn hinting(&mut self) -> Result<&mut L::Vm, Fault> {
        let (_, handle) = self.balloon()?;
        match handle.config().hinting {
            true => self.vm(),
            false => Err(Fault::NoHinting),
        }
    }

    /// The balloon as it is now: the target may have been changed by others.
    fn balloon_config(&self) -> Option<Balloon> {
        let mut config = self.spec.balloon?;
        if let Some((vm, _)) = &self.vm {
            config.amount_mib = balloon::mib(vm.balloon()?.target_pages());
        }
        Some(config)
    }

    fn set_machine_config(&mut self, config: MachineConfig) -> Result<(), Fault> {
        self.before_start()?;
        let MachineConfig { vcpu_count, mem_size_mib, smt, huge_pages, .. } = config;
        if !(1..=MAX_VCPUS).contains(&vcpu_count) {
            return Err(Fault::Vcpus { asked: vcpu_count });
        }
        if !(MIN_MEM_MIB..=MAX_MEM_MIB).contains(&mem_size_mib) {
            return Err(Fault::Memory { asked: mem_size_mib });
        }
        if huge_pages == HugePages::Pool2M && !mem_size_mib.is_multiple_of(2) {
            return Err(Fault::HugeMemory { asked: mem_size_mib });
        }
        // Of a single vCPU there is no telling.
        if smt && vcpu_count > 1 {
            return Err(Fault::Smt);
        }
        if let Some(balloon) = self.spec.balloon {
            balloon::target_pages(balloon.amount_mib, mem_size_mib)?;
        }
        self.spec.machine_config = config;
        Ok(())
    }

    fn set_boot_source(&mut self, source: BootSource) -> Result<(), Fault> {
        self.before_start()?;
        let kernel = &source.kernel_image_path;
        let built_in = kernel == Path::new(BUILT_IN);
        if !built_in {
            readable(kernel).map_err(|source| Fault::Kernel { path: kernel.clone(), source })?;
        }
        if let Some(initrd) = &source.initrd_path {
            if built_in {
                return Err(Fault::BuiltInInitrd);
            }
            readable(initrd).map_err(|source| Fault::Initrd { path: initrd.clone(), source })?;
        }
        self.spec.boot_source = Some(source);
        Ok(())
    }

    /// Adds a drive, or replaces the one of that name.
    fn set_drive(&mut self, drive: Drive) -> Result<(), Fault> {
        self.before_start()?;
        let id = &drive.drive_id;
        check_id(id)?;
        let others = || self.spec.drives.iter().filter(|other| other.drive_id != *id);
        let is_partition =
            |id: &String| !id.is_empty() && id.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-');
        if let Some(partuuid) = drive.partuuid.as_ref().filter(|id| !is_partition(id)) {
            return Err(Fault::Partuuid { partuuid: partuuid.clone() });
        }
        let pmem = self.spec.pmem.iter().filter(|pmem| pmem.root_device).map(|pmem| &pmem.id);
        let mut roots =
            others().filter(|other| other.is_root_device).map(|other| &other.drive_id).chain(pmem);
        if let Some(root) = roots.next().filter(|_| drive.is_root_device) {
            return Err(Fault::SecondRoot { id: root.clone() });
        }
        if others().count() >= MAX_DRIVES {
            return Err(Fault::Drives);
        }
        vm_drive(&drive).check().map_err(Fault::Drive)?;
        let drives = &mut self.spec.drives;
        match drives.iter().position(|other| other.drive_id == drive.drive_id) {
            Some(at) => drives[at] = drive,
            None => drives.push(drive),
        }
        // The guest's /dev/vda; the others stay in their order.
        drives.sort_by_key(|drive| !drive.is_root_device);
        Ok(())
    }

    /// Adds a file as memory, or replaces the one of that name.
    fn set_pmem(&mut self, pmem: Pmem) -> Result<(), Fault> {
        self.before_start()?;
        check_id(&pmem.id)?;
        let others = || self.spec.pmem.iter().filter(|other| other.id != pmem.id);
        let drives =
            self.spec.drives.iter().filter(|drive| drive.is_root_device).map(|drive| &drive.drive_id);
        let mut roots = others().filter(|other| other.root_device).map(|other| &other.id).chain(drives);
        if let Some(root) = roots.next().filter(|_| pmem.root_device) {
            return Err(Fault::SecondRoot { id: root.clone() });
        }
        if others().count() >= MAX_PMEM {
            return Err(Fault::Pmems);
        }
        pmem.pmem().check().map_err(Fault::Pmem)?;
        match self.spec.pmem.iter().position(|other| other.id == pmem.id) {
            Some(at) => self.spec.pmem[at] = pmem,
            None => self.spec.pmem.push(pmem),
        }
        Ok(())
    }

    /// There is nothing that can be changed, but it has to be there.
    fn change_pmem(&self, patch: &PmemPatch) -> Result<(), Fault> {
        if self.vm.is_none() {
            return Err(Fault::BeforeStart);
        }
        match self.spec.pmem.iter().any(|pmem| pmem.id == patch.id) {
            true => Ok(()),
            false => Err(Fault::NoSuchPmem { id: patch.id.clone() }),
        }
    }

    /// Gives a drive of the running VM another file.
    fn change_drive(&mut self, patch: DrivePatch) -> Result<(), Fault> {
        let (vm, _) = self.vm.as_mut().ok_or(Fault::BeforeStart)?;
        let known =
            self.spec.drives.iter().map(|drive| drive.drive_id.as_str()).collect::<Vec<_>>().join(", ");
        let drive = self.spec.drives.iter_mut().find(|drive| drive.drive_id == patch.drive_id);
        let unknown = DriveError::Unknown { id: patch.drive_id, known };
        let drive = drive.ok_or(Fault::Drive(unknown))?;
        // Without a path there is nothing to change.
        let Some(path_on_host) = patch.path_on_host else { return Ok(()) };
        let changed = Drive { path_on_host, ..drive.clone() };
        vm.replace_drive(&vm_drive(&changed)).map_err(Fault::Drive)?;
        *drive = changed;
        Ok(())
    }

    fn set_logger(&mut self, logger: Logger) -> Result<(), Fault> {
        self.before_start()?;
        let path = || logger.log_path.clone().unwrap_or_default();
        logger::configure(&logger).map_err(|source| Fault::LogFile { path: path(), source })?;
        self.spec.logger = Some(logger);
        Ok(())
    }

    fn set_metrics(&mut self, metrics: Metrics) -> Result<(), Fault> {
        self.before_start()?;
        if self.metrics.is_some() {
            return Err(Fault::MetricsAgain);
        }
        let path = &metrics.metrics_path;
        let file =
            MetricsFile::open(path).map_err(|source| Fault::MetricsFile { path: path.clone(), source })?;
        self.metrics = Some(file);
        self.spec.metrics = Some(metrics);
        Ok(())
    }

    /// Adds a network interface, or replaces the one of that name.
    fn set_interface(&mut self, interface: NetworkInterface) -> Result<(), Fault> {
        self.before_start()?;
        let id = &interface.iface_id;
        check_id(id)?;
        interface.interface().look().map_err(Fault::Interface)?;
        let interfaces = &mut self.spec.network_interfaces;
        let place = interfaces.iter().position(|other| other.iface_id == *id);
        for other in interfaces.iter().filter(|other| other.iface_id != *id) {
            let its = || other.iface_id.clone();
            if let Some(mac) = interface.guest_mac.filter(|mac| other.guest_mac == Some(*mac)) {
                return Err(Fault::Mac { mac, id: its() });
            }
            if other.host_dev_name == interface.host_dev_name {
                return Err(Fault::Tap { tap: interface.host_dev_name, id: its() });
            }
        }
        match place {
            Some(place) => interfaces[place] = interface,
            None if interfaces.len() >= MAX_INTERFACES => return Err(Fault::Interfaces),
            None => interfaces.push(interface),
        }
        Ok(())
    }

    fn set_mmds_config(&mut self, config: MmdsConfig) -> Result<(), Fault> {
        self.before_start()?;
        let is_there = |id: &&String| self.spec.network_interfaces.iter().any(|other| other.iface_id == **id);
        if config.network_interfaces.is_empty() {
            return Err(Fault::MmdsNowhere);
        }
        if let Some(id) = config.network_interfaces.iter().find(|id| !is_there(id)) {
            return Err(Fault::MmdsInterface { id: id.clone() });
        }
        if let Some(address) = config.ipv4_address.filter(|address| !mmds::is_possible(*address)) {
            return Err(Fault::MmdsAddress { address });
        }
        self.spec.mmds_config = Some(config);
        Ok(())
    }

    fn patch_interface(&mut self, patch: &NetworkInterfacePatch) -> Result<(), Fault> {
        let (vm, _) = self.vm.as_mut().ok_or(Fault::BeforeStart)?;
        let interfaces = &mut self.spec.network_interfaces;
        let place = interfaces.iter().position(|interface| interface.iface_id == patch.iface_id);
        let number = place.filter(|n| vm.set_net_limits(*n, patch.rx_rate_limiter, patch.tx_rate_limiter));
        let missing = || Fault::NoSuchInterface { id: patch.iface_id.clone() };
        let interface = number.and_then(|n| interfaces.get_mut(n)).ok_or_else(missing)?;
        patch.apply(interface);
        Ok(())
    }

    fn set_balloon(&mut self, config: Balloon) -> Result<(), Fault> {
        self.before_start()?;
        balloon::target_pages(config.amount_mib, self.spec.machine_config.mem_size_mib)?;
        self.spec.balloon = Some(config);
        Ok(())
    }

    fn start(&mut self) -> Result<(), Fault> {
        self.before_start()?;
        let source = self.spec.boot_source.as_ref().ok_or(Fault::NoBootSource)?;
        let vm = self.launch.launch(&self.spec, source, &self.mmds).map_err(Fault::Start)?;
        self.has_started(vm)
    }

    /// Goes on from a snapshot, of which everything comes but where messages and metrics go.
    fn load(&mut self, load: &LoadSnapshot) -> Result<(), Fault> {
        self.before_start()?;
        // Only where messages and metrics go may be said before.
        let (logger, metrics) = (self.spec.logger.clone(), self.spec.metrics.clone());
        let is_configured = self.spec != Spec { logger, metrics, ..Spec::default() };
        if is_configured {
            return Err(Fault::LoadAfterConfiguring);
        }
        let (spec, vm) = self.launch.load(load, &self.spec, &self.mmds)?;
        self.spec = spec;
        self.has_started(vm)
    }

    fn has_started(&mut self, vm: L::Vm) -> Result<(), Fault> {
        let (vm, _) = self.vm.insert((vm, Instant::now()));
        if let Some(seconds) = self.spec.balloon.map(|b| b.stats_polling_interval_s).filter(|s| *s > 0) {
            vm.poll_statistics(Duration::from_secs(seconds.into())).map_err(Fault::Timer)?;
        }
        Ok(())
    }

    fn set_statistics(&mut self, patch: StatisticsPatch) -> Result<(), Fault> {
        self.balloon()?;
        let seconds = patch.stats_polling_interval_s;
        // The queue of statistics is offered from the start, or never.
        match &self.spec.balloon {
            Some(config) if (config.stats_polling_interval_s == 0) == (seconds == 0) => {}
            _ => return Err(Fault::StatisticsSwitch),
        }
        if seconds > 0 {
            self.vm()?.poll_statistics(Duration::from_secs(seconds.into())).map_err(Fault::Timer)?;
        }
        if let Some(config) = &mut self.spec.balloon {
            config.stats_polling_interval_s = seconds;
        }
        Ok(())
    }

    fn flush_metrics(&mut self) -> Result<(), Fault> {
        let state = self.state();
        let (vm, started) = self.vm.as_ref().ok_or(Fault::BeforeStart)?;
        let file = self.metrics.as_mut().ok_or(Fault::NoMetrics)?;
        let balloon = vm.balloon().map(|handle| balloon::metrics(handle, vm.balloon_host()));
        let sample = metrics::sample(&self.id, state, started.elapsed(), &self.spec, balloon);
        file.append(&sample).map_err(Fault::MetricsWrite)
    }
}

/// Samepage's version.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");

fn check_id(id: &str) -> Result<(), Fault> {
    match !id.is_empty() && id.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_') {
        true => Ok(()),
        false => Err(Fault::Id { id: id.into() }),
    }
}

/// The drive of the VM that the API's object describes.
pub(super) fn vm_drive(drive: &Drive) -> crate::Drive {
    let (id, path) = (drive.drive_id.clone(), drive.path_on_host.clone());
    crate::Drive { id, path, read_only: drive.is_read_only, ..crate::Drive::default() }
}

/// Whether a file is there and can be read. A FIFO, which would be waited for, and a directory are refused.
fn readable(path: &Path) -> io::Result<File> {
    let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path)?;
    match file.metadata()?.is_file() {
        true => Ok(file),
        false => Err(io::Error::new(io::ErrorKind::InvalidInput, "it is not a regular file")),
    }
}

#[cfg(test)]
mod tests;
