//! Where running fleets keep their sockets and logs: one directory a fleet, readable by its owner only.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use rustix::fs::{AtFlags, CWD, Dir, Mode, OFlags, Stat, fchmod, fstat, open, statat, unlinkat};

use super::HostError;
use os::lock;

/// Longest path the kernel takes for a Unix socket.
pub(super) const SOCKET_PATH_BYTES: usize = 107;

/// The directory of all fleets of this user: `$SAMEPAGE_RUNTIME_DIR`, else `/run/samepage` for root, else
/// `$XDG_RUNTIME_DIR/samepage`, else one in the temporary directory. Always from the root of the file system on.
pub fn root() -> PathBuf {
    let variable = |name| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    let uid = rustix::process::getuid();
    let root = variable("SAMEPAGE_RUNTIME_DIR").unwrap_or_else(|| {
        if uid.is_root() {
            return "/run/samepage".into();
        }
        match variable("XDG_RUNTIME_DIR") {
            Some(dir) => dir.join("samepage"),
            None => std::env::temp_dir().join(format!("samepage-{}", uid.as_raw())),
        }
    });
    std::path::absolute(&root).unwrap_or(root)
}

/// One fleet's directory. Clones share it.
#[derive(Clone, Debug)]
pub struct FleetDir {
    path: PathBuf,
    /// The directory that was made or found here. It is this one that is removed, whatever has come to its path since.
    held: Arc<Mutex<Option<OwnedFd>>>,
}

impl FleetDir {
    /// The directory of the fleet called `name`; nothing is made.
    pub fn of(name: &str) -> Self {
        Self::at(root().join("fleets").join(name))
    }

    /// The directory at `path`.
    pub(super) fn at(path: PathBuf) -> Self {
        Self { path, held: Arc::default() }
    }

    /// Makes it, for this user alone, or takes the one that is there.
    pub fn create(&self) -> Result<(), HostError> {
        let failed =
            |source| HostError::Runtime { what: "make the directory", path: self.path.clone(), source };
        // Before anything is made in them, and once all of them are there.
        self.check_owners()?;
        fs::DirBuilder::new().recursive(true).mode(0o700).create(&self.path).map_err(failed)?;
        self.check_owners()?;
        let fd = self.open().map_err(failed)?;
        fchmod(&fd, Mode::RWXU).map_err(|e| failed(e.into()))?;
        *lock(&self.held) = Some(fd);
        Ok(())
    }

    /// Refuses a directory that is not this user's alone, or that another user could put another one in the place of.
    pub fn check_owners(&self) -> Result<(), HostError> {
        check_owners(&self.path, 2)
    }

    /// Removes the directory that was made or taken here, with everything in it, once.
    pub fn remove(&self) {
        let Some(fd) = lock(&self.held).take() else { return };
        empty(&fd);
        // Another one at this path is another fleet's.
        if self.is_at_path(&fd) {
            let _ = fs::remove_dir(&self.path);
        }
    }

    /// Whether the directory that was made here is still where it was made.
    pub fn is_in_place(&self) -> bool {
        lock(&self.held).as_ref().is_some_and(|fd| self.is_at_path(fd))
    }

    fn open(&self) -> io::Result<OwnedFd> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        Ok(open(&self.path, flags, Mode::empty())?)
    }

    fn is_at_path(&self, fd: &OwnedFd) -> bool {
        let id = |stat: Stat| (stat.st_dev, stat.st_ino);
        match (fstat(fd), statat(CWD, &self.path, AtFlags::SYMLINK_NOFOLLOW)) {
            (Ok(own), Ok(there)) => id(own) == id(there),
            _ => false,
        }
    }

    /// Its path.
    pub fn path(&self) -> &Path {
        &self.path
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
        self.path.join("host.log")
    }

    /// Where a guest that is captured gives what it is.
    pub fn capture_socket(&self, guest: &str) -> Result<PathBuf, HostError> {
        self.socket(&format!("{guest}.cap"))
    }

    /// A guest's control socket.
    pub fn control(&self, guest: &str) -> Result<PathBuf, HostError> {
        self.socket(&format!("{guest}.ctl"))
    }

    /// A guest's COM2 socket.
    pub fn com2(&self, guest: &str) -> Result<PathBuf, HostError> {
        self.socket(&format!("{guest}.com2"))
    }

    /// A guest's socket for streams to its ports; those of the host's ports are beside it.
    pub fn vsock(&self, guest: &str) -> Result<PathBuf, HostError> {
        self.socket(&format!("{guest}.vsock"))
    }

    /// A guest's console and its VM's messages.
    pub fn log(&self, guest: &str) -> PathBuf {
        self.path.join(format!("{guest}.log"))
    }

    /// What is known of a guest, for a daemon that takes it over.
    pub fn state(&self, guest: &str) -> PathBuf {
        self.path.join(format!("{guest}.json"))
    }

    /// What the policy must not forget.
    pub fn policy(&self) -> PathBuf {
        self.path.join("policy.state")
    }

    /// The guests that have a control socket here, living or dead.
    pub fn control_sockets(&self) -> Vec<PathBuf> {
        let entries = fs::read_dir(&self.path).into_iter().flatten().flatten();
        entries.map(|e| e.path()).filter(|p| p.extension().is_some_and(|x| x == "ctl")).collect()
    }

    /// Removes what a daemon that was killed could not: everything of guests that are not `known`, and what it had begun with any.
    pub(super) fn remove_left(&self, known: impl Fn(&str) -> bool) {
        for path in fs::read_dir(&self.path).into_iter().flatten().flatten().map(|entry| entry.path()) {
            let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            // What is written anew has `.new` behind its name, and sockets for a guest's ports have their number.
            let Some((guest, kind)) = name.split_once('.') else { continue };
            let is_begun = ["cap", "json.new"].contains(&kind);
            let is_guests = ["ctl", "com2", "vsock", "log", "json"]
                .iter()
                .any(|of| kind.strip_prefix(of).is_some_and(|rest| rest.is_empty() || rest.starts_with('_')));
            if (is_begun || is_guests && !known(guest)) && path != self.host_log() {
                let _ = fs::remove_file(path);
            }
        }
    }

    fn socket(&self, name: &str) -> Result<PathBuf, HostError> {
        let path = self.path.join(name);
        match path.as_os_str().len() <= SOCKET_PATH_BYTES {
            true => Ok(path),
            false => Err(HostError::PathLength { path }),
        }
    }
}

/// Removes everything in a directory. What is in a directory in there is not Samepage's, and stays.
fn empty(fd: &OwnedFd) {
    let Ok(entries) = Dir::read_from(fd) else { return };
    for entry in entries.flatten() {
        if ![&b"."[..], b".."].contains(&entry.file_name().to_bytes())
            && unlinkat(fd, entry.file_name(), AtFlags::empty()).is_err()
        {
            let _ = unlinkat(fd, entry.file_name(), AtFlags::REMOVEDIR);
        }
    }
}

/// `path` as the file system knows it, as far as it is there.
pub fn resolved(path: &Path) -> PathBuf {
    match (fs::canonicalize(path), path.parent(), path.file_name()) {
        (Ok(resolved), _, _) => resolved,
        (Err(_), Some(parent), Some(name)) => resolved(parent).join(name),
        _ => path.into(),
    }
}

/// Refuses `path` if it or one of the directories above it is another user's, or may be written by one: that user could have put sockets
/// there that answer for others. The last `private` ones of them must be this user's; in those above, another user may make files of
/// its own, if it cannot rename ours (a sticky directory).
fn check_owners(path: &Path, private: usize) -> Result<(), HostError> {
    let user = rustix::process::getuid().as_raw();
    // A link is where it leads to; one that another user made leads to what another user may write.
    for (depth, dir) in resolved(path).ancestors().enumerate() {
        let meta = match fs::symlink_metadata(dir) {
            Ok(meta) => meta,
            Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
            Err(source) => return Err(HostError::Runtime { what: "look at", path: dir.into(), source }),
        };
        // In what is no directory there is no socket.
        if !meta.is_dir() {
            continue;
        }
        let refused = |why| HostError::Untrusted { path: dir.into(), why, fleets: path.into() };
        let own = meta.uid() == user;
        let of_root = meta.uid() == 0 || Some(meta.uid()) == unmapped_root();
        if !own && (depth < private || !of_root) {
            return Err(refused(format!("it belongs to user {}", meta.uid())));
        }
        let mode = meta.permissions().mode();
        let sticky = mode & 0o1000 != 0 && depth >= private;
        // Root's group is root; and where each user has a group of its own, it has the user's number.
        let of_group = mode & 0o020 != 0 && meta.gid() != 0 && meta.gid() != user;
        if !sticky && (mode & 0o002 != 0 || of_group) {
            return Err(refused(format!(
                "others than user {user} may write to it (mode {:o})",
                mode & 0o7777
            )));
        }
    }
    Ok(())
}

/// In a user namespace that root is not part of, files of root seem to be of this user, as all are that are not of the namespace.
fn unmapped_root() -> Option<u32> {
    let map = fs::read_to_string("/proc/self/uid_map").ok()?;
    // First in here, first outside, how many.
    let all = map.split_whitespace().eq(["0", "0", "4294967295"]);
    (!all).then(|| fs::read_to_string("/proc/sys/kernel/overflowuid").ok()?.trim().parse().ok()).flatten()
}

/// Names of the fleets that have a directory, sorted.
pub(super) fn directories() -> Result<Vec<String>, HostError> {
    let fleets = root().join("fleets");
    check_owners(&fleets, 1)?;
    let entries = fs::read_dir(fleets).into_iter().flatten().flatten();
    let directories = entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
    let mut names: Vec<String> = directories.filter_map(|e| e.file_name().into_string().ok()).collect();
    names.sort();
    Ok(names)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_made_is_removed_and_nothing_that_came_to_its_place() {
        let root = tempfile::tempdir().unwrap();
        let old = FleetDir::at(root.path().join("fleets/f"));
        old.create().unwrap();
        assert!(old.is_in_place());
        fs::write(old.path().join("a.log"), "").unwrap();
        let elsewhere = root.path().join("elsewhere");
        fs::rename(old.path(), &elsewhere).unwrap();
        let new = FleetDir::at(old.path().into());
        new.create().unwrap();
        fs::write(new.path().join("b.log"), "").unwrap();
        assert!(!old.is_in_place() && new.is_in_place());
        old.clone().remove();
        assert!(new.path().join("b.log").exists(), "another fleet's directory was removed");
        assert_eq!(fs::read_dir(elsewhere).unwrap().count(), 0);
        fs::create_dir(new.path().join("empty")).unwrap();
        new.remove();
        assert!(!new.path().exists());
        // Once: a second time would mean whatever is there by then.
        fs::create_dir(new.path()).unwrap();
        new.remove();
        FleetDir::at(new.path().into()).remove();
        assert!(new.path().exists());
    }

    #[test]
    fn what_guests_have_left_that_are_gone_is_removed_and_nothing_else() {
        let root = tempfile::tempdir().unwrap();
        let dir = FleetDir::at(root.path().into());
        let stays = [
            "a-0.ctl",
            "a-0.log",
            "host.log",
            "host.sock",
            "merge.sock",
            "policy.state",
            "promised",
            "k-0.txt",
        ];
        let goes = [
            "k-0.ctl",
            "k-0.com2",
            "k-0.log",
            "k-0.json",
            "k-0.json.new",
            "k-0.cap",
            "k-0.vsock_52",
            "a-0.cap",
            "a-0.json.new",
        ];
        stays.iter().chain(&goes).for_each(|name| fs::write(root.path().join(name), "").unwrap());
        dir.remove_left(|guest| guest == "a-0");
        let there = |name: &&str| root.path().join(name).exists();
        assert!(stays.iter().all(there) && !goes.iter().any(there));
    }

    #[test]
    fn a_directory_that_others_may_write_is_refused() {
        let root = tempfile::tempdir().unwrap();
        let mode = |path: &Path, mode| fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
        let open = root.path().join("open");
        fs::create_dir_all(open.join("fleets")).unwrap();
        let fleet = FleetDir::at(open.join("fleets/f"));
        mode(&open, 0o777);
        let refused = fleet.create().unwrap_err().to_string();
        assert!(refused.contains(open.to_str().unwrap()) && refused.contains("777"), "{refused}");
        assert!(!fleet.path().exists());
        // As /tmp is: others cannot rename what is ours.
        mode(&open, 0o1777);
        fleet.create().unwrap();
        // But the directory of fleets is this user's alone.
        mode(&open.join("fleets"), 0o1777);
        assert!(fleet.check_owners().is_err());
        mode(&open.join("fleets"), 0o700);
        fleet.check_owners().unwrap();
        // A link does not lead around it.
        mode(&open, 0o777);
        std::os::unix::fs::symlink(&open, root.path().join("link")).unwrap();
        assert!(FleetDir::at(root.path().join("link/fleets/f")).check_owners().is_err());
        if rustix::process::getuid().is_root() {
            mode(&open, 0o755);
            std::os::unix::fs::chown(&open, Some(12345), None).unwrap();
            let refused = fleet.check_owners().unwrap_err().to_string();
            assert!(refused.contains("12345"), "{refused}");
        }
    }
}
