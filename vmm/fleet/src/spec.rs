//! The fleet file: which guests, with what memory and work, merged how, and what they are promised.

mod drive;
mod fill;
mod from;
mod metrics;
mod names;
mod net;
mod open;
mod overcommit;
mod reservation;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use devices::virtio::vsock::MIN_CID;
use serde::de::Error as _;
use serde::{Deserialize, Serialize};
use thiserror::Error;

pub use self::drive::DriveSpec;
pub use self::fill::FillSpec;
use self::from::From;
pub use self::metrics::{MetricsAddress, MetricsAddressError};
pub(crate) use self::names::check_name;
pub use self::names::resolve;
pub use self::net::NetSpec;
pub(crate) use self::net::{check_owners as check_interface_owners, taps};
pub use self::open::{DomainRule, Open};
pub use self::overcommit::{AdmissionName, Overcommit};
use self::overcommit::{OvercommitError, OvercommitKeys};
pub use self::reservation::Reservation;
use self::reservation::{ReservationError, ReservationKeys};
use super::HostError;
use machine::{InterfaceError, MAX_DRIVES, MAX_VCPUS, MEMORY_BYTES, Unpack, VmConfig, Vsock};
use memory::layout::{MAX_RAM_BYTES, MIN_RAM_BYTES};
use memory::numa::{NumaError, Placement};
use memory::size::{SizeError, parse_size};
use merge::slab::engine::Tuning;
use os::named_file;

/// The most guests of one fleet.
pub const MAX_GUESTS: usize = 1024;
/// The longest name of a fleet or guest: it is part of a socket's path.
const MAX_NAME_BYTES: usize = 32;

/// The longest a guest may be given to become ready: a day.
const MAX_READY_SECONDS: u32 = 24 * 60 * 60;

/// What is wrong with a fleet file.
#[derive(Debug, Error)]
pub enum SpecError {
    /// It is not TOML, or has a key that no fleet file has.
    #[error(transparent)]
    Toml(#[from] toml::de::Error),
    /// It has no guest.
    #[error("it has no guests: expected at least one [[guest]], or [open] for VMs that others start")]
    NoGuests,
    /// It has too many.
    #[error("it has {0} guests: expected at most {MAX_GUESTS}")]
    TooMany(usize),
    /// A name is used twice.
    #[error("two guests are called {0:?}: give each a name of its own")]
    SameName(String),
    /// A name cannot be part of a path.
    #[error("{0:?} is no name: expected 1 to {MAX_NAME_BYTES} letters, digits, - or _")]
    Name(String),
    /// A guest's memory.
    #[error("guest {guest}: memory")]
    Memory {
        /// Whose.
        guest: String,
        /// What is wrong.
        #[source]
        source: SizeError,
    },
    #[error("guest {guest}: numa")]
    Numa {
        guest: String,
        #[source]
        source: NumaError,
    },
    /// A guest's vCPUs.
    #[error("guest {guest}: {cpus} vCPUs are not possible: expected 1 to {MAX_VCPUS}")]
    Cpus {
        /// Whose.
        guest: String,
        /// How many.
        cpus: u8,
    },
    /// A guest's percentages.
    #[error("guest {guest}: the percentages of its fill make {sum}: expected 100")]
    Mix {
        /// Whose.
        guest: String,
        /// Their sum.
        sum: u32,
    },
    /// A guest's time to become ready.
    #[error("guest {guest}: ready_seconds = {seconds} is not possible: expected 1 to {MAX_READY_SECONDS}")]
    ReadySeconds {
        /// Whose.
        guest: String,
        /// How many.
        seconds: u32,
    },
    /// What the fleet may use.
    #[error("overcommit")]
    Overcommit(#[source] OvercommitError),
    /// Where metrics are to be served.
    #[error(transparent)]
    Metrics(#[from] MetricsAddressError),
    /// A guest's reservation.
    #[error("guest {guest}")]
    Reservation {
        /// Whose.
        guest: String,
        /// What is wrong.
        #[source]
        source: ReservationError,
    },
    /// A clone of what cannot be cloned.
    #[error(
        "guest {guest}: from = {from:?}, {why}: expected a guest of this file that boots, such as from = \"web\""
    )]
    From {
        /// The clone.
        guest: String,
        /// Its origin.
        from: String,
        /// What is wrong with that.
        why: &'static str,
    },
    /// A clone that is to be other than its origin.
    #[error(
        "guest {guest}: it has `from`, and is as its origin is: `{key}` is not possible beside it, only `count` and `net` are"
    )]
    FromKey {
        /// The clone.
        guest: String,
        /// What was said besides.
        key: String,
    },
    /// An initrd without a kernel.
    #[error("guest {guest}: an initrd needs a kernel: the built-in guest has no use for one")]
    InitrdWithoutKernel {
        /// Whose.
        guest: String,
    },
    /// A guest's drives.
    #[error("guest {guest}: {asked} drives are not possible: expected at most {MAX_DRIVES}")]
    Drives { guest: String, asked: usize },
    /// A drive that one of two guests may write.
    #[error(
        "guests {first} and {second} both have the drive {path}, and not both only read it: give each a copy, or \
         both read_only = true, or overlay = true",
        path = path.display()
    )]
    DriveOwners { path: PathBuf, first: String, second: String },
    /// A drive that is not written needs no overlay.
    #[error(
        "guest {guest}: the drive {path} has read_only and overlay: expected one of them",
        path = path.display()
    )]
    ReadOnlyOverlay { guest: String, path: PathBuf },
    /// A guest's network interfaces.
    #[error("guest {guest}: net")]
    Net {
        /// Whose.
        guest: String,
        /// What is wrong.
        #[source]
        source: InterfaceError,
    },
    /// Two interfaces have what is one's.
    #[error(
        "guests {first} and {second} both have the {what}: give each its own ({{n}} in a TAP's name is the guest's number)"
    )]
    NetOwners {
        /// An address or a TAP.
        what: String,
        /// The guest that has it.
        first: String,
        /// The guest that has it, too; maybe the same.
        second: String,
    },
    /// A clone has as many interfaces as its origin.
    #[error(
        "guest {guest}: {asked} network interfaces are given, and its origin has {expected}: expected as many"
    )]
    CloneInterfaces { guest: String, asked: usize, expected: usize },
    /// Two guests cannot have one TAP.
    #[error(
        "guest {guest}: the TAP {tap} is another guest's, and a clone needs one of its own: name them with {{n}} in the fleet file \
         (tap = \"tap{{n}}\"), or say which (`samepage clone --net TAP|auto`, `net` beside `from`)"
    )]
    CloneTap { guest: String, tap: String },
    /// A rule of `[open]` that fits every VM.
    #[error("open: the rule of domain {domain} says neither uid nor cgroup: expected one of them, or both")]
    OpenRule {
        /// The domain.
        domain: String,
    },
    /// A control group that is none.
    #[error("open: {cgroup:?} is no control group: expected its path below /sys/fs/cgroup, beginning with /")]
    Cgroup {
        /// What was given.
        cgroup: String,
    },
    /// More processes stand by than there can be guests.
    #[error("pool = {0} is not possible: expected 0 to {MAX_GUESTS} processes that stand by for clones")]
    Pool(usize),
    /// Another engine knows no VMs but those of the fleet.
    #[error("open: expected engine \"slab\": only its VMs join by themselves")]
    OpenEngine,
    /// KSM merges across everything, which several domains forbid.
    #[error(
        "engine \"ksm\" merges across the whole host and cannot keep the domains {domains} apart: use engine \"slab\" or \"off\", \
         or one domain"
    )]
    Domains {
        /// All domains of the fleet.
        domains: String,
    },
}

/// Which engine merges.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum EngineName {
    /// The host kernel's samepage merging.
    Ksm,
    /// Samepage's own: pages of sealed memory files, found by what guests write, each trust domain by itself.
    Slab,
    /// Nothing: the baseline to compare with.
    Off,
}

impl EngineName {
    /// As in files, on the command line and in reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::Ksm => "ksm",
            Self::Slab => "slab",
            Self::Off => "off",
        }
    }
}

/// What a guest's balloon can do, besides being inflated and deflated.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, expecting = "keys such as { deflate_on_oom = true }")]
pub struct BalloonSpec {
    /// The guest may take pages back when it runs out of memory.
    #[serde(default)]
    pub deflate_on_oom: bool,
    /// The guest tells of free pages as it frees them, and they go back to the host.
    #[serde(default)]
    pub free_page_reporting: bool,
}

/// One guest.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct GuestSpec {
    /// Its name, unique in the fleet.
    pub name: String,
    /// Its trust domain: pages are never shared with a guest of another one.
    pub domain: String,
    /// Its VM, as far as a fleet file describes it: sockets, and what the engine and the governor need, are added when it is started.
    pub vm: VmConfig,
    /// How long it may take until it is ready; None is the default of its kind of guest.
    pub ready_seconds: Option<u32>,
    /// What it is promised when memory is short.
    #[serde(rename = "standing")]
    pub reservation: Reservation,
    /// What it fills its memory with once it is ready.
    pub fill: Option<FillSpec>,
    /// Its network interfaces as the file gives them, by which those of its clones are made.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub net: Vec<NetSpec>,
    /// The guest or snapshot that it went on from; None of one that booted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub clone_of: Option<String>,
}

impl GuestSpec {
    /// One that is promised what is usual for its memory, and is filled with nothing.
    pub fn new(name: String, domain: String, vm: VmConfig) -> Self {
        let (vm, reservation) =
            (VmConfig { name: name.clone(), ..vm.clone() }, Reservation::usual(vm.memory_bytes));
        Self {
            name,
            domain,
            vm,
            ready_seconds: None,
            reservation,
            fill: None,
            net: Vec::new(),
            clone_of: None,
        }
    }
}

/// A fleet.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct FleetSpec {
    /// Its name; a part of the runtime directory's paths.
    pub name: String,
    /// What merges.
    pub engine: EngineName,
    /// How the slab engine does.
    #[serde(default)]
    pub merge: Tuning,
    /// What it may use, and how it is kept within that.
    pub overcommit: Overcommit,
    /// Where its numbers are served; None: nowhere.
    #[serde(default)]
    pub metrics: Option<MetricsAddress>,
    /// Which VMs may join that others start; None: none may.
    #[serde(default)]
    pub open: Option<Open>,
    /// How many VM processes stand by for clones.
    #[serde(default)]
    pub pool: usize,
    /// Its guests, at least one unless others may join.
    pub guests: Vec<GuestSpec>,
}

/// A fleet file as it is written; [`FleetSpec::of`] checks it.
#[derive(Deserialize)]
#[serde(deny_unknown_fields, expecting = "the keys of a fleet")]
pub struct FleetFile {
    name: String,
    #[serde(default = "default_engine")]
    engine: EngineName,
    #[serde(default)]
    merge: Tuning,
    overcommit: Option<OvercommitKeys>,
    metrics: Option<String>,
    open: Option<Open>,
    #[serde(default)]
    pool: usize,
    #[serde(default)]
    defaults: Defaults,
    #[serde(default)]
    guest: Vec<NamedGuest>,
}

fn default_engine() -> EngineName {
    EngineName::Slab
}

/// What a table `[[guest]]` says, or `[defaults]`.
#[derive(Clone, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, expecting = "a table with keys of a guest")]
struct GuestKeys {
    name: Option<String>,
    count: Option<u16>,
    from: Option<String>,
    memory: Option<String>,
    cpus: Option<u8>,
    kernel: Option<PathBuf>,
    #[serde(alias = "unpack")]
    kernel_decompress: Option<Unpack>,
    initrd: Option<PathBuf>,
    cmdline: Option<String>,
    domain: Option<String>,
    ready_seconds: Option<u32>,
    huge_pages: Option<bool>,
    numa: Option<Placement>,
    drives: Option<Vec<DriveSpec>>,
    net: Option<Vec<NetSpec>>,
    vsock: Option<bool>,
    balloon: Option<BalloonSpec>,
    min: Option<String>,
    max: Option<String>,
    shares: Option<u32>,
    priority: Option<u32>,
    fill: Option<FillSpec>,
}

impl GuestKeys {
    /// These, and of `defaults` those that are not here: whole keys, whatever is in them.
    fn over(&self, defaults: &Self) -> Result<Self, serde_json::Error> {
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
struct Defaults(GuestKeys);

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
struct NamedGuest {
    name: String,
    keys: GuestKeys,
}

impl TryFrom<GuestKeys> for NamedGuest {
    type Error = &'static str;

    fn try_from(mut keys: GuestKeys) -> Result<Self, &'static str> {
        let name = keys.name.take().ok_or("missing field `name`")?;
        Ok(Self { name, keys })
    }
}

impl FleetSpec {
    /// Reads and checks a fleet file. Relative paths in it are relative to it; `~/` is the home directory.
    pub fn read(path: &Path) -> Result<Self, HostError> {
        let text = named_file::read_regular_text(path)
            .map_err(|source| HostError::SpecRead { path: path.into(), source })?;
        let dir = match path.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        // Whole, so that a file means the same from wherever it is read, and what was started from it is found unchanged.
        let dir = fs::canonicalize(dir).unwrap_or_else(|_| dir.into());
        Self::parse(&text, &dir).map_err(|source| HostError::Spec { path: path.into(), source })
    }

    /// A fleet without guests of its own, which this user's VMs may join.
    pub fn open(name: &str) -> Result<Self, SpecError> {
        Self::parse(&format!("name = {name:?}\n[open]\n"), Path::new("/"))
    }

    /// As [`Self::read`], for text whose relative paths begin at `dir`.
    pub fn parse(text: &str, dir: &Path) -> Result<Self, SpecError> {
        Self::of(toml::from_str(text)?, dir)
    }

    /// Checks `file`, whose relative paths begin at `dir`.
    pub fn of(file: FleetFile, dir: &Path) -> Result<Self, SpecError> {
        check_name(&file.name)?;
        let (mut guests, mut from) = (Vec::new(), BTreeMap::new());
        for named in &file.guest {
            if named.keys.from.is_some() {
                from::check_keys(&named.name, &named.keys)?;
            }
            // The file said it and it was read: this does not fail.
            let keys = named.keys.over(&file.defaults.0).map_err(toml::de::Error::custom)?;
            let copies = keys.count.map_or(1, usize::from);
            if guests.len() + copies > MAX_GUESTS {
                return Err(SpecError::TooMany(guests.len() + copies));
            }
            for n in 0..copies {
                let name = match keys.count {
                    None => named.name.clone(),
                    Some(_) => format!("{}-{n}", named.name),
                };
                if let Some(origin) = &keys.from {
                    from.insert(
                        name.clone(),
                        From { origin: origin.clone(), has_net: named.keys.net.is_some() },
                    );
                }
                guests.push(one_guest((name, n), &keys, &file.name, dir)?);
            }
        }
        from::resolve(&mut guests, &from, &file.name)?;
        if file.pool > MAX_GUESTS {
            return Err(SpecError::Pool(file.pool));
        }
        let open = file.open.clone().map(|open| open.checked(dir)).transpose()?;
        match &open {
            None if guests.is_empty() => return Err(SpecError::NoGuests),
            Some(_) if file.engine != EngineName::Slab => return Err(SpecError::OpenEngine),
            _ => {}
        }
        let mut names = BTreeSet::new();
        if let Some(twice) = guests.iter().find(|g| !names.insert(&g.name)) {
            return Err(SpecError::SameName(twice.name.clone()));
        }
        let domains: BTreeSet<&str> = guests.iter().map(|g| g.domain.as_str()).collect();
        if file.engine == EngineName::Ksm && domains.len() > 1 {
            let domains = domains.into_iter().collect::<Vec<_>>().join(", ");
            return Err(SpecError::Domains { domains });
        }
        drive::check_owners(&guests)?;
        net::check_owners(&guests)?;
        let overcommit = match &file.overcommit {
            Some(keys) => keys.check().map_err(SpecError::Overcommit)?,
            None => Overcommit::default(),
        };
        let metrics = file.metrics.as_deref().map(|text| MetricsAddress::parse(text, dir)).transpose()?;
        Ok(Self {
            name: file.name,
            engine: file.engine,
            merge: file.merge,
            overcommit,
            metrics,
            open,
            pool: file.pool,
            guests,
        })
    }
}

/// The guest that `keys` describe, number `n` of them, in a fleet called `fleet`.
fn one_guest(
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

#[cfg(test)]
mod tests;
