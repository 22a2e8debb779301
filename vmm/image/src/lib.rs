//! Kernels and the images Linux guests start from: recognising a kernel, unpacking it, and putting
//! it together with its modules and our agent.
//!
//! An image is a directory with `vmlinux` (unpacked, so that no start pays for it), `vmlinuz` (as
//! it came, for guests that unpack it themselves), `initrd.cpio` (the agent as /init, the modules
//! it loads) and `image.json` (what is in it). It appears whole or not at all.
//!
//! A root file system for it ([`rootfs`]) is made of Debian, an archive or a directory.
//!
//! It must not know a VM or run a shell; the tools that it runs are apt, to fetch a package, and
//! for root file systems mmdebstrap, mke2fs and debugfs. Whatever it reads may be cut short or
//! hostile. Begin with [`vmlinux`] (which kernel is this?), then [`Options`] and [`format`] (what a
//! file is by its first bytes).

pub mod apt;
pub mod bzimage;
pub mod cpio;
pub mod elf;
mod error;
mod files;
pub mod format;
mod initrd;
pub mod modules;
pub mod package;
pub mod progress;
mod publish;
pub mod rootfs;
#[cfg(test)]
mod tests;
mod tool;
pub mod unpack;
pub mod vmlinux;

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use serde::Serialize;

pub use apt::Flavour;
pub use error::ImageError;
pub use files::PACKED_KERNEL_FILE;
use files::{DESCRIPTION_FILE, INITRD_FILE, KERNEL_FILE};
use modules::{Modules, Plan};
use os::named_file;
use package::PackageId;
use progress::Progress;
use vmlinux::{Kernel, KernelError, KernelProblem, Unpack};

/// The modules every image has: the transport of our devices, and the devices.
pub const MODULES: [&str; 4] = ["virtio_mmio", "virtio_rng", "virtio_balloon", "virtio_blk"];
/// Modules that an image has if its kernel has them: the port by which the kernel reports a panic,
/// the number by which a copy of a guest knows that it is one, the network device, and sockets
/// between guest and host.
pub const OPTIONAL_MODULES: [&str; 4] =
    ["pvpanic_mmio", "vmgenid", "virtio_net", "vmw_vsock_virtio_transport"];

/// Modules that an image has if its kernel has them, and that are loaded only in a guest that has such memory: they are large.
pub const PMEM_MODULES: [&str; 2] = ["virtio_pmem", "nd_pmem"];

/// The most of an uncompressed kernel that is searched for its version.
const VERSION_SEARCH_BYTES: u64 = 128 << 20;

/// What to make an image of, and where.
#[derive(Clone, Debug)]
pub struct Options {
    /// Where the kernel and its modules come from.
    pub source: KernelFrom,
    /// Modules to add to [`MODULES`] and [`OPTIONAL_MODULES`].
    pub modules: Vec<String>,
    /// Where to put the image.
    pub to: Destination,
}

/// Where a kernel and its modules come from.
#[derive(Clone, Debug)]
pub enum KernelFrom {
    /// The newest Debian package that apt knows.
    Newest {
        /// As in `6.12`.
        release: String,
        flavour: Flavour,
    },
    /// A Debian kernel package.
    Package(PathBuf),
    /// A kernel, and its modules unless all that are needed are built in.
    Files {
        /// An ELF vmlinux, a bzImage or a vmlinuz.
        kernel: PathBuf,
        /// As in `/lib/modules/6.12.9-amd64`.
        modules: Option<PathBuf>,
    },
}

/// Where an image is put.
#[derive(Clone, Debug)]
pub enum Destination {
    /// This directory; it may be an image already, which is then replaced.
    Dir(PathBuf),
    /// A directory of images: below it, by the kernel's version, with a link `latest` to it.
    Collection(PathBuf),
}

/// An image that was made, as `image.json` describes it too.
#[derive(Clone, Debug, Serialize)]
pub struct Image {
    /// The version of the kernel, as in `6.12.9+deb12-cloud-amd64`.
    pub name: String,
    /// The package it comes from.
    pub package: Option<PackageId>,
    pub dir: PathBuf,
    /// The kernel: an ELF file, or a bzImage if it must unpack itself.
    pub kernel: PathBuf,
    pub kernel_bytes: u64,
    /// The same with its decompressor, if it came so.
    pub packed_kernel: Option<PathBuf>,
    /// The initramfs, uncompressed.
    pub initrd: PathBuf,
    pub initrd_bytes: u64,
    /// The modules in the initramfs, in the order of loading.
    pub modules: Vec<String>,
    /// Modules that the kernel has built in.
    pub builtin: Vec<String>,
}

/// Makes an image with `agent`, a static program, as its /init.
///
/// # Errors
/// On any error nothing is left of the attempt, and an image that was there before is untouched.
pub fn make(options: &Options, agent: &[u8], progress: &mut dyn Progress) -> Result<Image, ImageError> {
    if !elf::is_static_program(agent) {
        return Err(ImageError::Agent(agent.len()));
    }
    // Beside the destination, so that the finished image can be renamed into place.
    let parent = match &options.to {
        Destination::Collection(root) => root.clone(),
        Destination::Dir(dir) => {
            publish::check(dir)?;
            match dir.parent() {
                Some(parent) if !parent.as_os_str().is_empty() => parent.to_path_buf(),
                _ => PathBuf::from("."),
            }
        }
    };
    let made_parent = publish::make_dirs(&parent)?;
    let result = make_below(options, agent, &parent, progress);
    match result {
        Ok(image) => Ok(image),
        Err(error) => {
            publish::remove_dirs(&made_parent);
            // After a request to stop, that is why readers and programs failed.
            Err(if progress.stopped() { ImageError::Stopped } else { error })
        }
    }
}

fn make_below(
    options: &Options,
    agent: &[u8],
    parent: &Path,
    progress: &mut dyn Progress,
) -> Result<Image, ImageError> {
    let work = tempfile::Builder::new()
        .prefix(".samepage-image-")
        .tempdir_in(parent)
        .map_err(ImageError::file("make a temporary directory in", parent))?;
    let (package, kernel, modules_dir) = gather(&options.source, work.path(), progress)?;

    let staged = work.path().join("image");
    fs::create_dir(&staged).map_err(ImageError::file("make the directory", &staged))?;
    progress.stage("unpacking the kernel", None);
    let written = write_kernel(&kernel, &staged)?;
    let version = written.version;
    check_stop(progress)?;

    progress.stage("collecting modules", None);
    let mut at_boot = 0;
    let plan = match &modules_dir {
        Some(dir) => {
            let modules = Modules::open(dir)?;
            let optional = OPTIONAL_MODULES.into_iter().filter(|name| modules.has(name));
            let wanted: Vec<_> = MODULES
                .into_iter()
                .chain(optional)
                .map(String::from)
                .chain(options.modules.clone())
                .collect();
            let mut plan = modules.plan(&wanted, version.as_deref())?;
            at_boot = plan.load.len();
            if PMEM_MODULES.iter().all(|name| modules.has(name)) {
                modules.extend(&mut plan, &PMEM_MODULES, version.as_deref())?;
            }
            plan
        }
        None => Plan::default(),
    };
    check_stop(progress)?;
    let initrd = staged.join(INITRD_FILE);
    let initrd_bytes = initrd::write(&initrd, agent, plan.load.split_at(at_boot))?;

    let name = version.unwrap_or_else(|| {
        kernel.file_name().map_or_else(|| "kernel".into(), |n| n.to_string_lossy().into_owned())
    });
    let dir = match &options.to {
        Destination::Dir(dir) => std::path::absolute(dir).map_err(ImageError::file("find", dir))?,
        Destination::Collection(root) => root.join(&name),
    };
    let image = Image {
        name,
        package,
        kernel: dir.join(written.file),
        kernel_bytes: written.bytes,
        packed_kernel: written.has_packed.then(|| dir.join(PACKED_KERNEL_FILE)),
        initrd: dir.join(INITRD_FILE),
        initrd_bytes,
        modules: plan.load.into_iter().map(|m| m.name).collect(),
        builtin: plan.builtin,
        dir,
    };
    describe(&image, &staged)?;
    check_stop(progress)?;
    publish::publish(&staged, &image.dir)?;
    if let Destination::Collection(root) = &options.to {
        publish::link_latest(root, work.path(), &image.name)?;
    }
    Ok(image)
}

type Gathered = (Option<PackageId>, PathBuf, Option<PathBuf>);

/// Puts the kernel and its modules on this machine's disk.
fn gather(source: &KernelFrom, work: &Path, progress: &mut dyn Progress) -> Result<Gathered, ImageError> {
    let subdirectory = |name| {
        let dir = work.join(name);
        fs::create_dir(&dir).map_err(ImageError::file("make the directory", &dir)).map(|()| dir)
    };
    let deb = match source {
        KernelFrom::Files { kernel, modules } => return Ok((None, kernel.clone(), modules.clone())),
        KernelFrom::Package(path) => path.clone(),
        KernelFrom::Newest { release, flavour } => {
            apt::fetch(release, *flavour, &subdirectory("fetched")?, progress)?
        }
    };
    let unpacked = package::unpack(&deb, &subdirectory("package")?, progress)?;
    Ok((unpacked.id, unpacked.kernel, Some(unpacked.root)))
}

/// A kernel in an image that is made.
struct Written {
    version: Option<String>,
    file: &'static str,
    bytes: u64,
    has_packed: bool,
}

/// Writes the kernel, unpacked where possible, and as it came where it has a decompressor.
fn write_kernel(path: &Path, staged: &Path) -> Result<Written, ImageError> {
    let unreadable =
        |source| ImageError::Kernel(KernelError { path: path.into(), problem: KernelProblem::Read(source) });
    let kernel = vmlinux::open(path, Unpack::Host)?;
    let version = version_of(path).map_err(unreadable)?;
    let file = match &kernel {
        Kernel::Elf(_) => KERNEL_FILE,
        Kernel::BzImage(_) => PACKED_KERNEL_FILE,
    };
    let to = staged.join(file);
    let mut out = File::create(&to).map_err(ImageError::file("write", &to))?;
    let written = match kernel {
        Kernel::Elf(mut elf) => io::copy(&mut elf, &mut out),
        Kernel::BzImage(bytes) => io::copy(&mut &bytes[..], &mut out),
    };
    let bytes = written.map_err(ImageError::file("write", &to))?;
    let mut has_packed = file == PACKED_KERNEL_FILE;
    if !has_packed && let Ok(Kernel::BzImage(packed)) = vmlinux::open(path, Unpack::Guest) {
        let to = staged.join(PACKED_KERNEL_FILE);
        fs::write(&to, packed).map_err(ImageError::file("write", &to))?;
        has_packed = true;
    }
    Ok(Written { version, file, bytes, has_packed })
}

/// The version of the kernel at `path`: from its setup header, or from the banner inside a vmlinux.
fn version_of(path: &Path) -> io::Result<Option<String>> {
    let mut bytes = Vec::new();
    named_file::regular(path)?.0.take(VERSION_SEARCH_BYTES).read_to_end(&mut bytes)?;
    let text = if bzimage::is_bzimage(&bytes) {
        bzimage::parse(&bytes).ok().and_then(|header| header.version)
    } else {
        const BANNER: &[u8] = b"Linux version ";
        let found = bytes.windows(BANNER.len()).position(|w| w == BANNER);
        found.and_then(|at| {
            let tail = &bytes[at + BANNER.len()..];
            std::str::from_utf8(&tail[..tail.iter().position(|b| !b.is_ascii_graphic())?]).ok()
        })
    };
    // It becomes the name of a directory.
    let safe = |v: &&str| !v.starts_with('.') && !v.contains('/');
    Ok(text.and_then(|t| t.split_whitespace().next()).filter(safe).map(Into::into))
}

fn describe(image: &Image, staged: &Path) -> Result<(), ImageError> {
    let path = staged.join(DESCRIPTION_FILE);
    let mut text =
        serde_json::to_vec_pretty(image).map_err(|e| ImageError::file("write", &path)(e.into()))?;
    text.push(b'\n');
    fs::write(&path, text).map_err(ImageError::file("write", &path))
}

fn check_stop(progress: &dyn Progress) -> Result<(), ImageError> {
    if progress.stopped() { Err(ImageError::Stopped) } else { Ok(()) }
}
