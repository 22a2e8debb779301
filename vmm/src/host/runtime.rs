//! Where running fleets keep their sockets and logs: one directory a fleet, readable by its owner only.

use std::fs;
use std::io;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};

use super::HostError;

/// Longest path the kernel takes for a Unix socket.
pub(super) const SOCKET_PATH_BYTES: usize = 107;

/// The directory of all fleets of this user: `$SAMEPAGE_RUNTIME_DIR`, else `/run/samepage` for root, else
/// `$XDG_RUNTIME_DIR/samepage`, else one in the temporary directory.
pub fn root() -> PathBuf {
    let variable = |name| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    if let Some(dir) = variable("SAMEPAGE_RUNTIME_DIR") {
        return dir;
    }
    let uid = rustix::process::getuid();
    if uid.is_root() {
        return "/run/samepage".into();
    }
    match variable("XDG_RUNTIME_DIR") {
        Some(dir) => dir.join("samepage"),
        None => std::env::temp_dir().join(format!("samepage-{}", uid.as_raw())),
    }
}

/// One fleet's directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FleetDir(PathBuf);

impl FleetDir {
    /// The directory of the fleet called `name`; nothing is made.
    pub fn of(name: &str) -> Self {
        Self(root().join("fleets").join(name))
    }

    /// One that is elsewhere.
    #[cfg(test)]
    pub(super) fn at(path: impl Into<PathBuf>) -> Self {
        Self(path.into())
    }

    /// Makes it, for this user alone.
    pub fn create(&self) -> Result<(), HostError> {
        let failed = |source| HostError::Runtime { what: "make the directory", path: self.0.clone(), source };
        fs::DirBuilder::new().recursive(true).mode(0o700).create(&self.0).map_err(failed)?;
        // A directory that was there may be somebody else's, in a temporary directory everybody writes.
        let meta = fs::symlink_metadata(&self.0).map_err(failed)?;
        let owner = std::os::unix::fs::MetadataExt::uid(&meta);
        if !meta.is_dir() || owner != rustix::process::getuid().as_raw() {
            return Err(failed(io::Error::other(format!("it belongs to user {owner}"))));
        }
        fs::set_permissions(&self.0, fs::Permissions::from_mode(0o700)).map_err(failed)
    }

    /// Removes it with everything in it.
    pub fn remove(&self) {
        let _ = fs::remove_dir_all(&self.0);
    }

    /// Its path.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// The daemon's socket.
    pub fn host_socket(&self) -> Result<PathBuf, HostError> {
        self.socket("host.sock")
    }

    /// Where the engine waits for the agents of VMs.
    pub fn merge_socket(&self) -> Result<PathBuf, HostError> {
        self.socket("merge.sock")
    }

    /// The daemon's log.
    pub fn host_log(&self) -> PathBuf {
        self.0.join("host.log")
    }

    /// A guest's control socket.
    pub fn control(&self, guest: &str) -> Result<PathBuf, HostError> {
        self.socket(&format!("{guest}.ctl"))
    }

    /// A guest's COM2 socket.
    pub fn com2(&self, guest: &str) -> Result<PathBuf, HostError> {
        self.socket(&format!("{guest}.com2"))
    }

    /// A guest's console and its VM's messages.
    pub fn log(&self, guest: &str) -> PathBuf {
        self.0.join(format!("{guest}.log"))
    }

    /// What is known of a guest, for a daemon that takes it over.
    pub fn state(&self, guest: &str) -> PathBuf {
        self.0.join(format!("{guest}.json"))
    }

    /// What the policy must not forget.
    pub fn policy(&self) -> PathBuf {
        self.0.join("policy.state")
    }

    /// The guests that have a control socket here, living or dead.
    pub fn control_sockets(&self) -> Vec<PathBuf> {
        let entries = fs::read_dir(&self.0).into_iter().flatten().flatten();
        entries.map(|e| e.path()).filter(|p| p.extension().is_some_and(|x| x == "ctl")).collect()
    }

    fn socket(&self, name: &str) -> Result<PathBuf, HostError> {
        let path = self.0.join(name);
        match path.as_os_str().len() <= SOCKET_PATH_BYTES {
            true => Ok(path),
            false => Err(HostError::PathLength { path }),
        }
    }
}

/// Names of the fleets that have a directory, sorted.
pub fn fleets() -> Vec<String> {
    let entries = fs::read_dir(root().join("fleets")).into_iter().flatten().flatten();
    let mut names: Vec<String> = entries.filter_map(|e| e.file_name().into_string().ok()).collect();
    names.sort();
    names
}

/// The fleet a command means: the one named, or the only one there is.
pub fn choose(name: Option<String>) -> Result<String, HostError> {
    let known = fleets();
    match name {
        Some(fleet) if known.contains(&fleet) => Ok(fleet),
        Some(fleet) => {
            let known = match known.is_empty() {
                true => ": none is".into(),
                false => format!("; these are: {}", known.join(", ")),
            };
            Err(HostError::NotUp { fleet, known })
        }
        None => match <[String; 1]>::try_from(known) {
            Ok([only]) => Ok(only),
            Err(none) if none.is_empty() => Err(HostError::WhichFleet {
                known: "none is up: `samepage fleet up FILE.toml` starts one".into(),
            }),
            Err(many) => {
                Err(HostError::WhichFleet { known: format!("say --name with one of: {}", many.join(", ")) })
            }
        },
    }
}
