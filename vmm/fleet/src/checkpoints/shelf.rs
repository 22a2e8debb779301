//! Where the stores of this user are: a directory with one for each trust domain.

use std::fs;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use store::{Name, Store};

use super::{CheckpointError, CheckpointInfo, Description};
use crate::spec::check_name;

/// How long one waits for another process that changes a store.
pub const STORE_LIMIT: Duration = Duration::from_secs(120);

/// The stores of this user.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shelf(PathBuf);

impl Shelf {
    /// The one at this path, or where they are by default: `$SAMEPAGE_STORE_DIR`, else `/var/lib/samepage/checkpoints` for root, else
    /// `samepage/checkpoints` in `$XDG_DATA_HOME` or `~/.local/share`.
    pub fn find(path: Option<&Path>) -> Result<Self, CheckpointError> {
        let variable = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        let data = || variable("XDG_DATA_HOME").or_else(|| Some(variable("HOME")?.join(".local/share")));
        let by_default = || match rustix::process::getuid().is_root() {
            true => Some("/var/lib/samepage/checkpoints".into()),
            false => data().map(|data| data.join("samepage/checkpoints")),
        };
        let path = path.map(PathBuf::from).or_else(|| variable("SAMEPAGE_STORE_DIR")).or_else(by_default);
        let path = path.ok_or(CheckpointError::NoDirectory)?;
        Ok(Self(std::path::absolute(&path).unwrap_or(path)))
    }

    /// Its path.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// The path of a domain's store.
    pub fn path_of(&self, domain: &str) -> PathBuf {
        self.0.join(domain)
    }

    /// The store of a domain, which is made if it is not there.
    pub fn open(&self, domain: &str) -> Result<Store, CheckpointError> {
        self.check(domain)?;
        let failed = |source| CheckpointError::Directory { what: "make", path: self.0.clone(), source };
        fs::DirBuilder::new().recursive(true).mode(0o700).create(&self.0).map_err(failed)?;
        Ok(Store::open(&self.path_of(domain))?)
    }

    /// The store of a domain, if it is there.
    pub fn store(&self, domain: &str) -> Result<Option<Store>, CheckpointError> {
        self.check(domain)?;
        Ok(Store::find(&self.path_of(domain))?)
    }

    fn check(&self, domain: &str) -> Result<(), CheckpointError> {
        check_name(domain).map_err(|error| CheckpointError::Directory {
            what: "look for the store of a domain in",
            path: self.0.clone(),
            source: io::Error::new(io::ErrorKind::InvalidInput, error.to_string()),
        })
    }

    /// The domains that have a store, sorted.
    pub fn domains(&self) -> Result<Vec<String>, CheckpointError> {
        let failed = |source| CheckpointError::Directory { what: "list", path: self.0.clone(), source };
        let entries = match fs::read_dir(&self.0) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(failed(error)),
        };
        let mut domains = Vec::new();
        for entry in entries {
            let name = entry.map_err(failed)?.file_name();
            domains.extend(name.into_string().ok().filter(|name| check_name(name).is_ok()));
        }
        domains.sort_unstable();
        Ok(domains)
    }

    /// The domain in which there is a checkpoint of this name: the one that is said, or the only one.
    pub fn domain_of(&self, name: &Name, said: Option<&str>) -> Result<String, CheckpointError> {
        let domains = said.map_or_else(|| self.domains(), |domain| Ok(vec![domain.to_owned()]))?;
        let (mut found, mut known) = (Vec::new(), Vec::new());
        for domain in domains {
            let Some(store) = self.store(&domain)? else { continue };
            let names = store.read(STORE_LIMIT)?.names()?;
            if names.contains(name) {
                found.push(domain);
            }
            known.extend(names.iter().map(|name| name.as_str().to_owned()));
        }
        match &found[..] {
            [one] => Ok(one.clone()),
            [] => Err(CheckpointError::Missing {
                name: name.as_str().into(),
                known: if known.is_empty() { "none".into() } else { known.join(", ") },
            }),
            several => {
                Err(CheckpointError::WhichDomain { name: name.as_str().into(), domains: several.join(", ") })
            }
        }
    }

    /// All checkpoints of one domain, or of all; and those that are damaged, with what is wrong with them.
    pub fn list(&self, domain: Option<&str>) -> Result<(Vec<CheckpointInfo>, Vec<String>), CheckpointError> {
        let domains = domain.map_or_else(|| self.domains(), |domain| Ok(vec![domain.to_owned()]))?;
        let (mut found, mut damaged) = (Vec::new(), Vec::new());
        for domain in domains {
            let Some(store) = self.store(&domain)? else { continue };
            let reading = store.read(STORE_LIMIT)?;
            let sizes = reading.sizes()?;
            for name in reading.names()? {
                match Description::read(&reading, &name) {
                    Ok(description) => {
                        let size = sizes.checkpoints.iter().find(|(sized, _)| *sized == name);
                        let mut info = CheckpointInfo::of(name.as_str(), &description);
                        info.size = size.map(|(_, size)| *size);
                        found.push(info);
                    }
                    Err(error) => damaged.push(os::one_line(&error)),
                }
            }
        }
        Ok((found, damaged))
    }
}
