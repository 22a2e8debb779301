//! The keys of a guest in a fleet file, and the guest that they describe.

use std::path::{Path, PathBuf};

use devices::virtio::vsock::MIN_CID;
use machine::{MAX_VCPUS, MEMORY_BYTES, Unpack, VmConfig, Vsock};
use memory::layout::{MAX_RAM_BYTES, MIN_RAM_BYTES};
use memory::numa::Placement;
use memory::size::parse_size;
use serde::{Deserialize, Serialize};

use super::drive::{self, DriveSpec};
use super::error::SpecError;
use super::guest::{BalloonSpec, FillSpec, GuestSpec};
use super::interface::NetSpec;
use super::limits::MAX_READY_SECONDS;
use super::names::check_name;
use super::net;
use super::paths::resolve;
use super::pmem::{self, PmemSpec};
use super::reservation::ReservationKeys;

/// What a table `[[guest]]` says, or `[defaults]`.
#[derive(Clone, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, expecting = "a table with keys of a guest")]
pub(super) struct GuestKeys {
    pub(super) name: Option<String>,
    pub(super) count: Option<u16>,
    pub(super) from: Option<String>,
    pub(super) memory: Option<String>,
    pub(super) cpus: Option<u8>,
    pub(super) kernel: Option<PathBuf>,
    #[serde(alias = "unpack")]
    pub(super) kernel_decompress: Option<Unpack>,
    pub(super) initrd: Option<PathBuf>,
    pub(super) cmdline: Option<String>,
    pub(super) domain: Option<String>,
    pub(super) ready_seconds: Option<u32>,
    pub(super) huge_pages: Option<bool>,
    pub(super) numa: Option<Placement>,
    pub(super) drives: Option<Vec<DriveSpec>>,
    pub(super) pmem: Option<Vec<PmemSpec>>,
    pub(super) net: Option<Vec<NetSpec>>,
    pub(super) vsock: Option<bool>,
    pub(super) balloon: Option<BalloonSpec>,
    pub(super) min: Option<String>,
    pub(super) max: Option<String>,
    pub(super) shares: Option<u32>,
    pub(super) priority: Option<u32>,
    pub(super) fill: Option<FillSpec>,
}

impl GuestKeys {
    /// These, and of `defaults` those that are not here: whole keys, whatever is in them.
    pub(super) fn over(&self, defaults: &Self) -> Result<Self, serde_json::Error> {
        let said = |keys: &Self| {
            let mut keys = serde_json::to_value(keys)?;
            if let Some(keys) = keys.as_object_mut() {
                keys.retain(|_, value| !value.is_null());
            }
            serde_json::from_value::<serde_json::Map<String, serde_json::Value>>(keys)
        };
        let mut keys = said(defaults)?;
        keys.extend(said(self)?);
        serde_json::from_value(keys.into())
    }
}

/// `[defaults]`: no guest's own.
#[derive(Default, Deserialize)]
#[serde(try_from = "GuestKeys")]
pub(super) struct Defaults(pub(super) GuestKeys);

impl TryFrom<GuestKeys> for Defaults {
    type Error = &'static str;

    fn try_from(keys: GuestKeys) -> Result<Self, &'static str> {
        match (&keys.name, &keys.count, &keys.from) {
            (None, None, None) => Ok(Self(keys)),
            (Some(_), ..) => Err("unknown field `name`: each [[guest]] has its own, and none is for all"),
            (None, Some(_), _) => Err("unknown field `count`: it belongs to a [[guest]]"),
            (None, None, Some(_)) => Err("unknown field `from`: it belongs to a [[guest]]"),
        }
    }
}

/// `[[guest]]`: it has a name.
#[derive(Deserialize)]
#[serde(try_from = "GuestKeys")]
pub(super) struct NamedGuest {
    pub(super) name: String,
    pub(super) keys: GuestKeys,
}

impl TryFrom<GuestKeys> for NamedGuest {
    type Error = &'static str;

    fn try_from(mut keys: GuestKeys) -> Result<Self, &'static str> {
        let name = keys.name.take().ok_or("missing field `name`")?;
        Ok(Self { name, keys })
    }
}

/// The guest that `keys` describe, number `n` of them, in a fleet called `fleet`.
pub(super) fn one_guest(
    (name, n): (String, usize),
    keys: &GuestKeys,
    fleet: &str,
    dir: &Path,
) -> Result<GuestSpec, SpecError> {
    check_name(&name)?;
    let domain = keys.domain.as_deref().unwrap_or(fleet).to_owned();
    check_name(&domain)?;
    let memory_bytes = match &keys.memory {
        None => MEMORY_BYTES,
        Some(memory) => parse_size(memory, MIN_RAM_BYTES, MAX_RAM_BYTES)
            .map_err(|source| SpecError::Memory { guest: name.clone(), source })?,
    };
    let cpus = keys.cpus.unwrap_or(1);
    if !(1..=MAX_VCPUS).contains(&cpus) {
        return Err(SpecError::Cpus { guest: name, cpus });
    }
    if let Some(seconds) = keys.ready_seconds.filter(|s| !(1..=MAX_READY_SECONDS).contains(s)) {
        return Err(SpecError::ReadySeconds { guest: name, seconds });
    }
    if let Some(sum) = keys.fill.map(|f| f.sum()).filter(|s| *s != 100) {
        return Err(SpecError::Mix { guest: name, sum });
    }
    if let Some(numa) = keys.numa {
        numa.check().map_err(|source| SpecError::Numa { guest: name.clone(), source })?;
    }
    if keys.initrd.is_some() && keys.kernel.is_none() {
        return Err(SpecError::InitrdWithoutKernel { guest: name });
    }
    let reservation = ReservationKeys {
        min: keys.min.as_ref(),
        max: keys.max.as_ref(),
        shares: keys.shares,
        priority: keys.priority,
    };
    let reservation = reservation
        .of(memory_bytes)
        .map_err(|source| SpecError::Reservation { guest: name.clone(), source })?;
    let mut vm = VmConfig {
        memory_bytes,
        cpus,
        kernel: keys.kernel.as_ref().map(|path| resolve(path, dir)),
        unpack: keys.kernel_decompress.unwrap_or_default(),
        initrd: keys.initrd.as_ref().map(|path| resolve(path, dir)),
        cmdline: keys.cmdline.clone(),
        huge_pages: keys.huge_pages,
        numa: keys.numa,
        drives: drive::of(&name, n, keys.drives.as_deref().unwrap_or_default(), dir)?,
        pmem: pmem::of(&name, n, keys.pmem.as_deref().unwrap_or_default(), dir)?,
        net: net::of(&name, n, fleet, keys.net.as_deref().unwrap_or_default())?,
        // Its path is known when it is started.
        vsock: keys.vsock.unwrap_or(false).then(|| Vsock { cid: MIN_CID, path: PathBuf::new() }),
        ..VmConfig::default()
    };
    if let (Some(device), Some(said)) = (&mut vm.balloon, keys.balloon) {
        device.deflate_on_oom = said.deflate_on_oom;
        device.reporting = said.free_page_reporting;
    }
    let (ready_seconds, fill) = (keys.ready_seconds, keys.fill);
    let net = keys.net.clone().unwrap_or_default();
    Ok(GuestSpec { ready_seconds, reservation, fill, net, ..GuestSpec::new(name, domain, vm) })
}
