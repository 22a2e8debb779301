//! The fleet file: which guests, with what memory and work, merged how, and what they are promised.

mod drive;
mod error;
mod from;
mod guest;
mod interface;
mod keys;
mod limits;
mod metrics;
mod names;
mod net;
mod open;
mod overcommit;
mod paths;
mod pmem;
mod reservation;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use serde::de::Error as _;
use serde::{Deserialize, Serialize};

pub use self::drive::DriveSpec;
pub use self::error::SpecError;
use self::from::From;
pub use self::guest::{BalloonSpec, FillSpec, GuestSpec};
pub use self::interface::NetSpec;
use self::keys::{Defaults, NamedGuest, one_guest};
pub use self::limits::MAX_GUESTS;
pub use self::metrics::{MetricsAddress, MetricsAddressError};
pub(crate) use self::names::check_name;
pub(crate) use self::net::{check_owners as check_interface_owners, taps};
pub use self::open::{DomainRule, Open};
use self::overcommit::OvercommitKeys;
pub use self::overcommit::{AdmissionName, Overcommit};
pub use self::paths::resolve;
pub use self::pmem::PmemSpec;
pub use self::reservation::Reservation;
use super::HostError;
use merge::slab::engine::Tuning;
use os::named_file;

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
        pmem::check_domains(&guests)?;
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

#[cfg(test)]
mod tests;
