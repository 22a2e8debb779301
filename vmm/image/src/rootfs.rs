//! The root file system of a Linux guest: an ext4 image, made without root of Debian, of a tar
//! archive, or of a directory.
//!
//! `mmdebstrap` makes Debian's tree, `mke2fs -d` the file system, and `debugfs` writes into it what
//! an ordinary user's files cannot have: owners and modes. Device nodes are left out: guests have
//! devtmpfs. A tree without an init gets a small one. The image appears whole or not at all.

mod tree;

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde::Serialize;
use tempfile::NamedTempFile;

pub use self::tree::MAX_BYTES;
use self::tree::Tree;
use super::error::ImageError;
use super::progress::Progress;
use super::tool;

/// What a guest's kernel or init mounts on.
const PLACES: [&str; 6] = ["dev", "proc", "run", "sys", "tmp", "root"];
/// Where the kernel looks for the first program.
const INITS: [&str; 5] = ["sbin/init", "usr/sbin/init", "etc/init", "bin/init", "usr/bin/init"];
/// The init of a tree without one, and how it is asked to end.
const PROGRAMS: [(&str, &str); 3] = [
    ("init", include_str!("rootfs/init.sh")),
    ("poweroff", include_str!("rootfs/poweroff.sh")),
    ("reboot", include_str!("rootfs/reboot.sh")),
];
/// Room for what a guest writes, if it is not said how large the image is to be: it is a hole.
const ROOM_BYTES: u64 = 1 << 30;

/// What to make a root file system of, and where.
#[derive(Clone, Debug)]
pub struct Options {
    pub source: Source,
    /// The size of the image; None for that of the tree, and room.
    pub bytes: Option<u64>,
    /// The image; one that is there is replaced.
    pub to: PathBuf,
}

/// What is in it.
#[derive(Clone, Debug)]
pub enum Source {
    /// Debian, by `mmdebstrap`.
    Debian {
        /// As in `bookworm`.
        suite: String,
        /// Packages beside the essential ones.
        packages: Vec<String>,
        /// Where packages come from: URLs, or lines or files as apt's; empty for mmdebstrap's
        /// default.
        mirrors: Vec<String>,
    },
    /// A tar archive of a tree, not compressed.
    Tar(PathBuf),
    Dir(PathBuf),
}

/// A root file system that was made.
#[derive(Clone, Debug, Serialize)]
pub struct Rootfs {
    pub path: PathBuf,
    pub bytes: u64,
    /// Bytes that it takes on this machine's disk.
    pub allocated_bytes: u64,
    /// Files and directories.
    pub files: u64,
    /// Whether it has the small init.
    pub has_small_init: bool,
}

/// Makes it.
///
/// # Errors
/// Nothing is left of the attempt.
pub fn make(options: &Options, progress: &mut dyn Progress) -> Result<Rootfs, ImageError> {
    let parent = match options.to.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent.to_path_buf(),
        _ => PathBuf::from("."),
    };
    let in_parent = || ImageError::file("make a temporary file in", &parent);
    let image =
        tempfile::Builder::new().prefix(".samepage-rootfs-").tempfile_in(&parent).map_err(in_parent())?;
    let work = tempfile::Builder::new().prefix(".samepage-tree-").tempdir_in(&parent).map_err(in_parent())?;
    let tree = match &options.source {
        Source::Dir(dir) => Tree::of_dir(dir, progress)?,
        Source::Tar(path) => Tree::of_tar(path, &work.path().join("tree"), progress)?,
        Source::Debian { suite, packages, mirrors } => {
            let path = work.path().join("debian.tar");
            debootstrap(suite, packages, mirrors, &path, progress)?;
            Tree::of_tar(&path, &work.path().join("tree"), progress)?
        }
    };
    let bytes = options
        .bytes
        .unwrap_or_else(|| (tree.bytes + tree.bytes / 4 + ROOM_BYTES).next_multiple_of(64 << 20));
    progress.stage("making the file system", None);
    let sectors = (bytes / 1024).to_string() + "k";
    // The sizes of `mke2fs` are in its blocks unless they have a unit. Owners of the tree's top are
    // set below.
    let mut mke2fs = Command::new("mke2fs");
    mke2fs.args(["-q", "-F", "-t", "ext4", "-m", "1", "-E", "root_owner=0:0,lazy_itable_init=1"]);
    mke2fs.arg("-d").arg(&tree.dir).arg(image.path()).arg(sectors);
    run("mke2fs", "e2fsprogs", &mut mke2fs, Stdio::null(), progress)?;
    let has_small_init = !INITS.iter().any(|init| fs::symlink_metadata(tree.dir.join(init)).is_ok());
    adjust(&tree, has_small_init, image.path(), work.path(), progress)?;
    if progress.stopped() {
        return Err(ImageError::Stopped);
    }
    publish(image, options, tree.files, has_small_init)
}

fn publish(
    image: NamedTempFile,
    options: &Options,
    files: u64,
    has_small_init: bool,
) -> Result<Rootfs, ImageError> {
    use std::os::unix::fs::{MetadataExt, PermissionsExt};

    let to = &options.to;
    let failed = || ImageError::file("write", to);
    image.as_file().set_permissions(fs::Permissions::from_mode(0o644)).map_err(failed())?;
    image.as_file().sync_all().map_err(failed())?;
    let file = image.persist(to).map_err(|error| failed()(error.error))?;
    let meta = file.metadata().map_err(failed())?;
    Ok(Rootfs {
        path: std::path::absolute(to).map_err(failed())?,
        bytes: meta.len(),
        allocated_bytes: meta.blocks() * 512,
        files,
        has_small_init,
    })
}

/// Has `mmdebstrap` write Debian's tree to `path`. Root has no password: what has the console is
/// root.
fn debootstrap(
    suite: &str,
    packages: &[String],
    mirrors: &[String],
    path: &Path,
    progress: &mut dyn Progress,
) -> Result<(), ImageError> {
    progress.stage(&format!("mmdebstrap {suite}"), None);
    let mut command = Command::new("mmdebstrap");
    command.args(["--quiet", "--variant=minbase", "--format=tar"]);
    command.arg("--customize-hook=chroot \"$1\" passwd --quiet --delete root");
    if !packages.is_empty() {
        command.arg(format!("--include={}", packages.join(",")));
    }
    // Behind `--`, a suite that looks like an option is none.
    command.args(["--", suite, "-"]).args(mirrors);
    let out = File::create(path).map_err(ImageError::file("write", path))?;
    let written = out.try_clone().map_err(ImageError::file("write", path))?;
    let look = move |progress: &mut dyn Progress| {
        progress.at(written.metadata().map_or(0, |meta| meta.len()));
    };
    run_and_look("mmdebstrap", "mmdebstrap", &mut command, out.into(), progress, look).map(drop)
}

/// Gives the files in the image their owners and modes, and the tree what it has not.
fn adjust(
    tree: &Tree,
    adds_init: bool,
    image: &Path,
    work: &Path,
    progress: &mut dyn Progress,
) -> Result<(), ImageError> {
    progress.stage("setting owners and modes", None);
    let failed = || ImageError::file("write", work);
    let mut script = String::new();
    for place in PLACES.iter().filter(|place| fs::symlink_metadata(tree.dir.join(place)).is_err()) {
        script += &format!("mkdir /{place}\n");
        script += &owned(place, 0o040_755, (0, 0))?;
    }
    if adds_init {
        // A directory: a link to one is not followed here.
        let is_dir = |name: &str| fs::symlink_metadata(tree.dir.join(name)).is_ok_and(|meta| meta.is_dir());
        let dir = ["sbin", "usr/sbin"].into_iter().find(|name| is_dir(name));
        if dir.is_none() {
            script += "mkdir /sbin\n";
            script += &owned("sbin", 0o040_755, (0, 0))?;
        }
        let dir = dir.unwrap_or("sbin");
        script += &format!("cd /{dir}\n");
        for (name, text) in PROGRAMS {
            if fs::symlink_metadata(tree.dir.join(dir).join(name)).is_ok() {
                continue;
            }
            let from = work.join(name);
            fs::write(&from, text).map_err(failed())?;
            script += &format!("write {} {name}\n", quoted(&from)?);
            script += &owned(format!("{dir}/{name}"), 0o100_755, (0, 0))?;
        }
    }
    for owner in &tree.owners {
        script += &owned(&owner.path, owner.mode, (owner.uid, owner.gid))?;
    }
    let path = work.join("script");
    File::create(&path).and_then(|mut file| file.write_all(script.as_bytes())).map_err(failed())?;
    let mut debugfs = Command::new("debugfs");
    debugfs.arg("-w").arg("-f").arg(&path).arg(image);
    let words = run("debugfs", "e2fsprogs", &mut debugfs, Stdio::null(), progress)?;
    // It succeeds whatever its commands do, and says its version first.
    match words.lines().find(|line| !line.is_empty() && !line.starts_with("debugfs 1.")) {
        None => Ok(()),
        Some(line) => Err(ImageError::Failed { tool: "debugfs", words: line.into() }),
    }
}

/// The commands that give `path` its mode and owners.
fn owned(path: impl AsRef<Path>, mode: u32, (uid, gid): (u32, u32)) -> Result<String, ImageError> {
    let path = quoted(&Path::new("/").join(path))?;
    Ok(format!("sif {path} mode 0{mode:o}\nsif {path} uid {uid}\nsif {path} gid {gid}\n"))
}

/// A path as `debugfs` takes it.
fn quoted(path: &Path) -> Result<String, ImageError> {
    match path.to_str() {
        Some(text) if !text.contains(['\n', '\r', '\0']) => Ok(format!("\"{}\"", text.replace('"', "\"\""))),
        _ => Err(ImageError::TreeName(path.into())),
    }
}

/// Runs a program that must succeed; returns what it wrote to standard error.
fn run(
    name: &'static str,
    package: &'static str,
    command: &mut Command,
    out: Stdio,
    progress: &mut dyn Progress,
) -> Result<String, ImageError> {
    run_and_look(name, package, command, out, progress, |_| {})
}

fn run_and_look(
    name: &'static str,
    package: &'static str,
    command: &mut Command,
    out: Stdio,
    progress: &mut dyn Progress,
    look: impl FnMut(&mut dyn Progress),
) -> Result<String, ImageError> {
    // Where distributions have it, which an ordinary user's PATH need not have.
    let path = std::env::var("PATH").unwrap_or_default() + ":/usr/sbin:/sbin";
    let ended = tool::run(command.env("PATH", path).env("LC_ALL", "C"), out, progress, look);
    match ended {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            Err(ImageError::NoTool { tool: name, package })
        }
        Err(source) => Err(ImageError::Run { tool: name, source }),
        Ok(None) => Err(ImageError::Stopped),
        Ok(Some(ended)) if ended.status.success() => Ok(ended.words),
        Ok(Some(ended)) => {
            let lines: Vec<_> = ended.words.lines().filter(|line| !line.trim().is_empty()).collect();
            let words = match lines.len() {
                0 => ended.status.to_string(),
                n => lines[n.saturating_sub(3)..].join("; "),
            };
            Err(ImageError::Failed { tool: name, words })
        }
    }
}

#[cfg(test)]
mod tests;
