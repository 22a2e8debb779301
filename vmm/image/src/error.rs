//! Why no image, or no root file system, could be made.

use std::io;
use std::path::PathBuf;

use super::unpack::UnpackError;
use super::vmlinux::KernelError;

/// Why no image, or no root file system, could be made. What was there before is untouched.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// The user or the system asked to stop.
    #[error("stopped; nothing was changed")]
    Stopped,
    /// A file operation failed.
    #[error("cannot {action} {}", path.display())]
    File {
        /// What was to be done, as in "cannot ... PATH".
        action: &'static str,
        /// The file or directory.
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    /// This machine has no apt.
    #[error(
        "cannot look up kernel packages: {tool} is not installed here; \
         give a package with --deb FILE, or a kernel with --kernel VMLINUZ --modules DIR"
    )]
    NoApt { tool: &'static str },
    /// A program could not be run.
    #[error("cannot run {tool}")]
    Run {
        tool: &'static str,
        #[source]
        source: io::Error,
    },
    /// A program of apt failed.
    #[error("{tool} {what} failed: {detail}")]
    Apt {
        tool: &'static str,
        /// What it was asked to do.
        what: String,
        detail: String,
    },
    /// apt knows no such kernel.
    #[error(
        "apt knows no package linux-image-{release}.*{flavour}-amd64{}; {}",
        if known.is_empty() { String::new() } else { format!(" (it has releases {})", known.join(", ")) },
        if *fresh { "give one with --deb FILE, or --kernel VMLINUZ --modules DIR" }
        else { "run `apt-get update` as root, or give one with --deb FILE, or --kernel VMLINUZ --modules DIR" },
    )]
    NoPackage {
        /// The release that was asked for, as in `6.12`.
        release: String,
        /// `-cloud` or nothing.
        flavour: &'static str,
        /// The releases that there are.
        known: Vec<String>,
        /// Whether the lists have just been updated.
        fresh: bool,
    },
    /// Text that cannot be a release.
    #[error("--release {0:?} is not a kernel release; expected a number like 6.12")]
    Release(String),
    /// A file that is no Debian package.
    #[error("{} is not a Debian package: {expected}", path.display())]
    NotADeb {
        path: PathBuf,
        /// What was expected and not found.
        expected: &'static str,
    },
    /// A package in a compression that is not supported.
    #[error("the package {} cannot be unpacked", path.display())]
    Deb {
        path: PathBuf,
        #[source]
        source: UnpackError,
    },
    /// A package whose contents are damaged.
    #[error("the package {} is damaged; download it again", path.display())]
    DebDamaged { path: PathBuf },
    /// A package without a kernel.
    #[error(
        "the package {}{} has no boot/vmlinuz-*; expected a kernel package such as linux-image-6.12.*-cloud-amd64",
        path.display(),
        package.as_ref().map(|p| format!(" ({p})")).unwrap_or_default(),
    )]
    NoKernel {
        path: PathBuf,
        /// The name in its control file.
        package: Option<String>,
    },
    /// More than a kernel package unpacks to.
    #[error("the package {} unpacks to more than {cap} bytes, which no kernel package does", path.display())]
    DebTooLarge {
        path: PathBuf,
        /// The bound, in bytes.
        cap: u64,
    },
    /// The kernel cannot be used.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    #[error("{} is not a modules directory: it has neither *.ko files nor modules.builtin; expected one like /lib/modules/6.12.9-amd64", .0.display())]
    NotModules(PathBuf),
    /// Modules of several kernels.
    #[error("{} holds the modules of several kernels ({}); name one of them", path.display(), found.join(", "))]
    SeveralModules {
        path: PathBuf,
        /// Names of the directories in it.
        found: Vec<String>,
    },
    /// A module that is nowhere.
    #[error(
        "the module {name} is neither among the modules in {place} nor built into the kernel{}{}",
        needed_by.as_ref().map(|m| format!(" ({m} needs it)")).unwrap_or_default(),
        near.as_ref().map(|n| format!("; did you mean {n}?")).unwrap_or_default(),
    )]
    NoModule {
        /// Its name, with underscores.
        name: String,
        /// The name of the modules directory, which is the kernel's version.
        place: String,
        /// The module whose dependency it is.
        needed_by: Option<String>,
        /// The module whose name is most similar.
        near: Option<String>,
    },
    /// A chain of dependencies that is too long.
    #[error("the dependencies of the module {name} are more than {cap} deep; is {} damaged?", path.display())]
    Depth {
        /// The module at which the search was given up.
        name: String,
        path: PathBuf,
        cap: usize,
    },
    /// A module that cannot be unpacked.
    #[error("the module {} cannot be unpacked", path.display())]
    Module {
        path: PathBuf,
        #[source]
        source: UnpackError,
    },
    /// A file that is called .ko and is no module.
    #[error("{} is not a kernel module: it has no .modinfo section", .0.display())]
    NotAModule(PathBuf),
    /// Modules of another kernel.
    #[error("the module {} is for kernel {module}, and the kernel is {kernel}; give the modules of the same kernel", path.display())]
    VersionMismatch {
        path: PathBuf,
        /// The version it was built for.
        module: String,
        /// The version of the kernel.
        kernel: String,
    },
    /// The agent is no static program.
    #[error("the agent is not a static x86-64 program ({0} bytes), so it cannot be /init")]
    Agent(usize),
    /// A directory that may not be replaced.
    #[error("{} exists and holds {found}, which is not part of an image; choose another --out", path.display())]
    Occupied {
        path: PathBuf,
        /// A file or directory in it.
        found: String,
    },
    /// A program that makes root file systems is not here.
    #[error("{tool} is not installed here: install Debian's package {package}")]
    NoTool { tool: &'static str, package: &'static str },
    /// It failed.
    #[error("{tool} failed: {words}")]
    Failed { tool: &'static str, words: String },
    #[error("{} is no directory with a tree: expected one with a bin or usr/bin", .0.display())]
    NoTree(PathBuf),
    #[error("the tree has {bytes} bytes of files: expected at most {most}")]
    TreeTooLarge { bytes: u64, most: u64 },
    #[error("the name {0:?} is not possible: expected one without line ends, inside the tree")]
    TreeName(PathBuf),
    #[error("{} is no tar archive of a tree: expected one that is not compressed", path.display())]
    Archive {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
}

impl ImageError {
    /// For `map_err`: a failed file operation. `action` as in "cannot ... PATH".
    pub(super) fn file(action: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::File { action, path, source }
    }
}
