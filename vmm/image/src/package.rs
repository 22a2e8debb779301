//! Reads Debian packages: takes the kernel and its modules out of one, in this process.
//!
//! A package is an `ar` archive of `debian-binary`, `control.tar.*` and `data.tar.*`. Source:
//! deb(5). Links, devices, owners and times in the archive are left out, and nothing is run.

use std::fs::{self, File};
use std::io::{self, BufReader, Read, Seek, SeekFrom, Write};
use std::path::{Component, Path, PathBuf};

use super::error::ImageError;
use super::progress::{Progress, Watched};
use super::unpack::{Compression, UnpackError};
use os::named_file;

/// The most that a package may unpack to. The largest kernel package of Debian has half a GB.
const UNPACKED_CAP_BYTES: u64 = 4 << 30;
/// The same where the package is unpacked in memory, as zstd is.
const ZSTD_CAP_BYTES: u64 = 1 << 30;
/// A control file has a few KB.
const CONTROL_CAP_BYTES: u64 = 1 << 20;
/// How much is copied at once.
const COPY_BYTES: usize = 1 << 18;
const AR_MAGIC: &[u8; 8] = b"!<arch>\n";
const AR_HEADER_BYTES: usize = 60;
/// `debian-binary`, `control.tar.*`, `data.tar.*`, and room for signatures.
const AR_MEMBERS_CAP: usize = 16;

/// The name and version in a package's control file.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct PackageId {
    /// As in `linux-image-6.12.9+deb12-cloud-amd64`.
    pub name: String,
    /// As in `6.12.9-1~deb12u1`.
    pub version: String,
}

/// A kernel package, taken apart.
#[derive(Clone, Debug)]
pub struct Unpacked {
    /// Its name and version.
    pub id: Option<PackageId>,
    /// The kernel, still compressed.
    pub kernel: PathBuf,
    /// The directory that holds `lib/modules/VERSION`.
    pub root: PathBuf,
}

/// Takes the kernel and the modules in the package `deb` out into the directory `into`.
pub fn unpack(deb: &Path, into: &Path, progress: &mut dyn Progress) -> Result<Unpacked, ImageError> {
    let read = || ImageError::file("read the package", deb);
    let (mut file, meta) = named_file::any(deb).map_err(read())?;
    if meta.is_dir() {
        return Err(ImageError::NotADeb {
            path: deb.into(),
            expected: "it is a directory; expected a .deb file",
        });
    }
    if !meta.is_file() {
        return Err(ImageError::NotADeb {
            path: deb.into(),
            expected: "it is not a regular file; expected a .deb file",
        });
    }
    let members = members(&mut file, deb)?;
    let find = |prefix, expected| {
        let found = members.iter().find(|m| m.name.starts_with(prefix));
        found.ok_or(ImageError::NotADeb { path: deb.into(), expected })
    };
    let data = find("data.tar", "expected a member data.tar.*")?;
    let control = find("control.tar", "expected a member control.tar.*")?;
    // A package whose description cannot be read may still have a kernel.
    let id = control_fields(&mut file, control).unwrap_or(None);

    progress.stage("unpacking the package", Some(data.bytes));
    let kernel = extract(&mut file, data, deb, into, progress)?;
    let package = id.as_ref().map(|id: &PackageId| id.name.clone());
    match kernel {
        Some(kernel) => Ok(Unpacked { id, kernel, root: into.into() }),
        None => Err(ImageError::NoKernel { path: deb.into(), package }),
    }
}

/// A member of an ar archive.
#[derive(Debug, PartialEq, Eq)]
struct Member {
    name: String,
    at: u64,
    bytes: u64,
}

fn members<F: Read + Seek>(file: &mut F, path: &Path) -> Result<Vec<Member>, ImageError> {
    let bad = |expected| ImageError::NotADeb { path: path.into(), expected };
    let read = || ImageError::file("read the package", path);
    let len = file.seek(SeekFrom::End(0)).map_err(read())?;
    file.rewind().map_err(read())?;
    let mut magic = [0; 8];
    if file.read_exact(&mut magic).is_err() || magic != *AR_MAGIC {
        return Err(bad("expected it to begin with !<arch>"));
    }
    let (mut found, mut at) = (Vec::new(), AR_MAGIC.len() as u64);
    while at < len && found.len() < AR_MEMBERS_CAP {
        let mut header = [0; AR_HEADER_BYTES];
        file.seek(SeekFrom::Start(at)).map_err(read())?;
        file.read_exact(&mut header).map_err(|_| bad("it is cut short; download it again"))?;
        if header[58..] != *b"`\n" {
            return Err(bad("its archive headers are damaged"));
        }
        let text = |range: std::ops::Range<usize>| std::str::from_utf8(&header[range]).map(str::trim).ok();
        let size = text(48..58).and_then(|t| t.parse::<u64>().ok());
        let (Some(name), Some(bytes)) = (text(0..16), size) else {
            return Err(bad("its archive headers are damaged"));
        };
        at += AR_HEADER_BYTES as u64;
        if at + bytes > len {
            return Err(bad("it is cut short; download it again"));
        }
        found.push(Member { name: name.trim_end_matches('/').into(), at, bytes });
        at += bytes.next_multiple_of(2);
    }
    Ok(found)
}

/// Opens a tar member, whatever it is compressed with.
fn tar<'a, R: Read + 'a>(source: R, name: &str) -> Result<tar::Archive<Box<dyn Read + 'a>>, UnpackError> {
    let mut source = BufReader::with_capacity(1 << 20, source);
    let first = io::BufRead::fill_buf(&mut source).unwrap_or_default();
    let compression = if name.ends_with(".tar") { None } else { Compression::of(first) };
    Ok(tar::Archive::new(match compression {
        Some(compression) => compression.reader(source, ZSTD_CAP_BYTES)?,
        None => Box::new(source),
    }))
}

fn control_fields(file: &mut File, member: &Member) -> Result<Option<PackageId>, UnpackError> {
    let damaged = |e| UnpackError::Damaged(Compression::Xz, e);
    file.seek(SeekFrom::Start(member.at)).map_err(damaged)?;
    let mut archive = tar(file.take(member.bytes), &member.name)?;
    for entry in archive.entries().map_err(damaged)? {
        let mut entry = entry.map_err(damaged)?;
        if entry.path().is_ok_and(|p| p.file_name().is_some_and(|n| n == "control")) {
            let mut text = String::new();
            entry.by_ref().take(CONTROL_CAP_BYTES).read_to_string(&mut text).map_err(damaged)?;
            let field = |name: &str| {
                let line = text.lines().find_map(|l| l.strip_prefix(name)?.strip_prefix(':'));
                line.map(|value| value.trim().to_string())
            };
            return Ok(field("Package")
                .zip(field("Version"))
                .map(|(name, version)| PackageId { name, version }));
        }
    }
    Ok(None)
}

/// Extracts the files that matter from the data member; returns the path of the kernel.
fn extract(
    file: &mut File,
    member: &Member,
    deb: &Path,
    into: &Path,
    progress: &mut dyn Progress,
) -> Result<Option<PathBuf>, ImageError> {
    let mut buffer = vec![0; COPY_BYTES];
    file.seek(SeekFrom::Start(member.at)).map_err(ImageError::file("read the package", deb))?;
    let watched = Watched { inner: file.take(member.bytes), bytes: 0, progress };
    let mut archive =
        tar(watched, &member.name).map_err(|source| ImageError::Deb { path: deb.into(), source })?;
    // The decoder's own error may quote any bytes of the file.
    let damaged = |_| ImageError::DebDamaged { path: deb.into() };
    let (mut kernel, mut unpacked) = (None, 0);
    for entry in archive.entries().map_err(damaged)? {
        let mut entry = entry.map_err(damaged)?;
        unpacked += entry.size();
        if unpacked > UNPACKED_CAP_BYTES {
            return Err(ImageError::DebTooLarge { path: deb.into(), cap: UNPACKED_CAP_BYTES });
        }
        let path = entry.path().map_err(damaged)?.into_owned();
        let Some(path) = wanted(&path).filter(|_| entry.header().entry_type().is_file()) else {
            continue;
        };
        let to = into.join(&path);
        let parent = to.parent().unwrap_or(into);
        fs::create_dir_all(parent).map_err(ImageError::file("make the directory", parent))?;
        let mut out = File::create(&to).map_err(ImageError::file("write", &to))?;
        loop {
            let got = entry.read(&mut buffer).map_err(damaged)?;
            if got == 0 {
                break;
            }
            out.write_all(&buffer[..got]).map_err(ImageError::file("write", &to))?;
        }
        if path.starts_with("boot") {
            kernel = Some(to);
        }
    }
    // To the very end, where the checksums are.
    io::copy(&mut archive.into_inner(), &mut io::sink()).map_err(damaged)?;
    Ok(kernel)
}

/// Where a file of the package goes below the output directory: kernel and modules keep their
/// paths, with `usr/` removed; None for the rest, and for paths that lead out of the directory.
fn wanted(path: &Path) -> Option<PathBuf> {
    let mut parts = Vec::new();
    for part in path.components() {
        match part {
            Component::Normal(part) => parts.push(part.to_str()?),
            Component::CurDir | Component::RootDir => {}
            Component::ParentDir | Component::Prefix(_) => return None,
        }
    }
    let parts = parts.strip_prefix(&["usr"]).unwrap_or(&parts);
    match parts {
        ["boot", file] if file.starts_with("vmlinuz") => {}
        ["lib", "modules", _, _, ..] => {}
        _ => return None,
    }
    Some(parts.iter().collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::io::Cursor;

    #[test]
    fn only_the_kernel_and_its_modules_are_wanted() {
        let to = |path: &str| wanted(Path::new(path)).map(|p| p.display().to_string());
        assert_eq!(to("./boot/vmlinuz-6.12").as_deref(), Some("boot/vmlinuz-6.12"));
        assert_eq!(to("./usr/lib/modules/6.12/kernel/a.ko").as_deref(), Some("lib/modules/6.12/kernel/a.ko"));
        assert_eq!(
            to("/lib/modules/6.12/modules.builtin").as_deref(),
            Some("lib/modules/6.12/modules.builtin")
        );
        for path in
            ["./boot/config-6.12", "lib/modules/../../etc/passwd", "etc/passwd", "boot/vmlinuz/..", ""]
        {
            assert_eq!(to(path), None, "{path}");
        }
    }

    proptest! {
        #[test]
        fn archive_members_lie_inside(bytes in proptest::collection::vec(any::<u8>(), 0..300), cut in 0usize..300) {
            let mut file = AR_MAGIC.to_vec();
            file.extend_from_slice(format!("{:<48}{:<10}`\n", "debian-binary", 4).as_bytes());
            file.extend_from_slice(b"2.0\n");
            file.extend_from_slice(&bytes);
            file.truncate(cut.max(8));
            if let Ok(found) = members(&mut Cursor::new(&file), Path::new("x.deb")) {
                for m in found {
                    prop_assert!(m.at + m.bytes <= file.len() as u64);
                }
            }
        }
    }
}
