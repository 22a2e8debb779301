//! Files that a thread may open from now on, by Landlock. What is open already stays so: a VM's
//! kernel, drives, console, devices.
#![expect(unsafe_code, reason = "the landlock crate does not tell the kernel's version")]

use std::fs::File;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use ::landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, PathBeneath, PathFd, Ruleset, RulesetAttr, RulesetCreated,
    RulesetCreatedAttr, RulesetError, Scope,
};

use super::Thread;

/// What is asked for; a kernel that knows less does what it knows.
const ASKED: ABI = ABI::V6;

/// Files that a VM's process opens while its guest runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Files {
    /// Its own entries in /proc, and its sockets in these directories.
    Sockets(Vec<PathBuf>),
    /// Any regular file and socket, as far as its user may: a client of its API names where
    /// snapshots go.
    Named,
}

/// Restricts the calling thread to `files`, or those of them that threads of its kind need, for
/// good.
pub(super) fn restrict(thread: Thread, files: &Files) -> Result<(), RulesetError> {
    let ruleset = match (thread, files) {
        (Thread::EventLoop, Files::Sockets(directories)) => {
            directories.iter().try_fold(with_proc(ruleset()?)?, |ruleset, directory| {
                // One that is removed with all in it is made anew, and so are the sockets in it.
                let ruleset = allow(ruleset, Path::new("/"), AccessFs::ReadDir | AccessFs::MakeSock)?;
                allow(ruleset, directory, AccessFs::RemoveFile.into())
            })?
        }
        (Thread::EventLoop, Files::Named) => {
            let read = AccessFs::ReadFile | AccessFs::ReadDir;
            let write = AccessFs::WriteFile | AccessFs::Truncate | AccessFs::MakeReg | AccessFs::Refer;
            allow(ruleset()?, Path::new("/"), read | write | AccessFs::MakeSock | AccessFs::RemoveFile)?
        }
        (Thread::Merge, _) => with_proc(ruleset()?)?,
        _ => ruleset()?,
    };
    // Where the kernel has no Landlock, or an older one, that is all there is: `samepage doctor`
    // says so.
    ruleset.restrict_self().map(drop)
}

/// Nothing may be opened, executed or made, no TCP socket bound or connected, no abstract socket of
/// another domain connected to.
fn ruleset() -> Result<RulesetCreated, RulesetError> {
    Ruleset::default()
        .handle_access(AccessFs::from_all(ASKED))?
        .handle_access(AccessNet::from_all(ASKED))?
        .scope(Scope::AbstractUnixSocket)?
        .create()
}

/// This process's own entries in /proc, and what swap there is.
fn with_proc(ruleset: RulesetCreated) -> Result<RulesetCreated, RulesetError> {
    static HELD: OnceLock<Vec<File>> = OnceLock::new();
    // Held: a rule is of an inode, and those of /proc would be others when memory is short and
    // these are dropped.
    let held = HELD.get_or_init(|| {
        let open = |path| {
            let mut how = File::options();
            how.read(true).custom_flags(libc::O_PATH | libc::O_CLOEXEC).open(path).ok()
        };
        ["/proc/self", "/proc/swaps"].into_iter().filter_map(open).collect()
    });
    held.iter().try_fold(ruleset, |ruleset, file| {
        let is_directory = file.metadata().is_ok_and(|meta| meta.is_dir());
        let read =
            if is_directory { AccessFs::ReadFile | AccessFs::ReadDir } else { AccessFs::ReadFile.into() };
        ruleset.add_rule(PathBeneath::new(file, read))
    })
}

/// What lies at or below `path`, if it is there.
fn allow(
    ruleset: RulesetCreated,
    path: &Path,
    access: BitFlags<AccessFs>,
) -> Result<RulesetCreated, RulesetError> {
    match PathFd::new(path) {
        Ok(beneath) => ruleset.add_rule(PathBeneath::new(beneath, access)),
        Err(_) => Ok(ruleset),
    }
}

/// The version of this kernel's Landlock, if it has one that is on.
pub fn version() -> Option<u32> {
    const ASK_VERSION: libc::c_long = 1;
    // SAFETY: with this flag the kernel reads no attributes, and makes nothing.
    let version = unsafe {
        libc::syscall(libc::SYS_landlock_create_ruleset, std::ptr::null::<u8>(), 0usize, ASK_VERSION)
    };
    u32::try_from(version).ok().filter(|version| *version > 0)
}

/// What a kernel of the newest version that is asked for does.
pub const WHOLE: u32 = 6;
