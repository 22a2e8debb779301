//! Kernel modules: their names, their dependencies, the order in which to load them.
//!
//! Dependencies come from `modules.dep` where depmod has made one, and else from each module's own
//! `depends=`. Soft dependencies, aliases and options are not supported.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use super::elf;
use super::error::ImageError;
use super::unpack;
use os::named_file;

/// The most bytes that a module may unpack to. The largest of Debian's has 10 MB.
const MODULE_CAP_BYTES: u64 = 128 << 20;
/// How deep directories are searched, and chains of dependencies followed.
const DEPTH_CAP: usize = 32;

/// A directory of modules, such as `/lib/modules/6.12.9-amd64`.
#[derive(Debug)]
pub struct Modules {
    root: PathBuf,
    /// Module name, with underscores, to its file.
    files: BTreeMap<String, PathBuf>,
    builtin: BTreeSet<String>,
    /// The dependencies in modules.dep, by name.
    dependencies: BTreeMap<String, Vec<String>>,
}

#[derive(Clone, Debug)]
pub struct Module {
    /// Its name, with underscores.
    pub name: String,
    /// Its ELF file.
    pub bytes: Vec<u8>,
}

/// The modules to load.
#[derive(Clone, Debug, Default)]
pub struct Plan {
    /// In the order of loading: each after those it depends on.
    pub load: Vec<Module>,
    /// Those asked for that are built into the kernel.
    pub builtin: Vec<String>,
}

impl Modules {
    /// Reads what is in `dir`: a modules directory, or one with `lib/modules/VERSION` in it.
    pub fn open(dir: &Path) -> Result<Self, ImageError> {
        let root = find_root(dir)?;
        let mut files = BTreeMap::new();
        collect(&root, 0, &mut files)?;
        let list = |name: &str| fs::read_to_string(root.join(name)).unwrap_or_default();
        let builtin = list("modules.builtin").lines().filter_map(name_of).collect::<BTreeSet<_>>();
        if files.is_empty() && builtin.is_empty() {
            return Err(ImageError::NotModules(dir.into()));
        }
        let dependencies = parse_dep(&list("modules.dep"));
        Ok(Self { root, files, builtin, dependencies })
    }

    /// Whether there is a module of this name, or the kernel has it built in.
    pub fn has(&self, name: &str) -> bool {
        self.files.contains_key(name) || self.builtin.contains(name)
    }

    /// Unpacks the modules in `wanted` and all that they depend on. `kernel` is the version that
    /// every one must be made for, where it is known.
    pub fn plan(&self, wanted: &[String], kernel: Option<&str>) -> Result<Plan, ImageError> {
        let mut plan = Plan::default();
        self.extend(&mut plan, wanted, kernel)?;
        Ok(plan)
    }

    /// Adds those to a plan, behind what it has.
    pub fn extend(
        &self,
        plan: &mut Plan,
        wanted: &[impl AsRef<str>],
        kernel: Option<&str>,
    ) -> Result<(), ImageError> {
        wanted.iter().try_for_each(|name| self.add(&normalise(name.as_ref()), None, kernel, 0, plan))
    }

    fn add(
        &self,
        name: &str,
        needed_by: Option<&str>,
        kernel: Option<&str>,
        depth: usize,
        plan: &mut Plan,
    ) -> Result<(), ImageError> {
        if plan.load.iter().any(|m| m.name == name) || plan.builtin.iter().any(|b| b == name) {
            return Ok(());
        }
        if depth > DEPTH_CAP {
            return Err(ImageError::Depth { name: name.into(), path: self.root.clone(), cap: DEPTH_CAP });
        }
        let Some(path) = self.files.get(name) else {
            if self.builtin.contains(name) {
                plan.builtin.push(name.into());
                return Ok(());
            }
            let near = self.nearest(name);
            // The directory above may be a temporary one, whose name would mean nothing to the
            // reader.
            let place = self.root.file_name().unwrap_or(self.root.as_os_str()).to_string_lossy().into_owned();
            return Err(ImageError::NoModule {
                name: name.into(),
                place,
                needed_by: needed_by.map(Into::into),
                near,
            });
        };
        let packed = named_file::read(path).map_err(ImageError::file("read the module", path))?;
        let bytes = unpack::unpack(&packed, MODULE_CAP_BYTES)
            .map_err(|source| ImageError::Module { path: path.clone(), source })?;
        let info = elf::section(&bytes, ".modinfo").ok_or_else(|| ImageError::NotAModule(path.clone()))?;
        let built_for = info_value(info, "vermagic").and_then(|v| v.split_whitespace().next());
        if let (Some(module), Some(kernel)) = (built_for, kernel)
            && module != kernel
        {
            let (module, kernel) = (module.into(), kernel.into());
            return Err(ImageError::VersionMismatch { path: path.clone(), module, kernel });
        }
        let own = || info_value(info, "depends").unwrap_or_default().split(',').filter(|d| !d.is_empty());
        let depends = self.dependencies.get(name).cloned().unwrap_or_else(|| own().map(normalise).collect());
        for dependency in depends {
            self.add(&dependency, Some(name), kernel, depth + 1, plan)?;
        }
        plan.load.push(Module { name: name.into(), bytes });
        Ok(())
    }

    /// The module whose name is most like `name`, if any is.
    fn nearest(&self, name: &str) -> Option<String> {
        let names = self.files.keys().chain(&self.builtin);
        let scored = names.map(|n| (strsim::jaro_winkler(name, n), n));
        let best = scored.max_by(|a, b| a.0.total_cmp(&b.0)).filter(|(score, _)| *score > 0.8);
        best.map(|(_, n)| n.clone())
    }
}

/// Follows `lib/modules/VERSION` below `dir`, or a single VERSION, where `dir` itself is no modules
/// directory.
fn find_root(dir: &Path) -> Result<PathBuf, ImageError> {
    fs::read_dir(dir).map_err(ImageError::file("read the modules directory", dir))?;
    let is_root = |d: &Path| ["modules.builtin", "modules.dep", "kernel"].iter().any(|f| d.join(f).exists());
    if is_root(dir) {
        return Ok(dir.into());
    }
    let below = ["lib/modules", "usr/lib/modules"].map(|d| dir.join(d));
    let dir_of_versions = below.into_iter().find(|d| d.is_dir()).unwrap_or_else(|| dir.into());
    let entries = fs::read_dir(&dir_of_versions)
        .map_err(ImageError::file("read the modules directory", &dir_of_versions))?;
    let mut roots: Vec<_> = entries.flatten().map(|e| e.path()).filter(|p| is_root(p)).collect();
    roots.sort();
    match roots.len() {
        // Perhaps a plain directory of .ko files.
        0 => Ok(dir.into()),
        1 => Ok(roots.remove(0)),
        _ => {
            let name = |p: &PathBuf| p.file_name().unwrap_or_default().to_string_lossy().into_owned();
            Err(ImageError::SeveralModules { path: dir_of_versions, found: roots.iter().map(name).collect() })
        }
    }
}

fn collect(dir: &Path, depth: usize, files: &mut BTreeMap<String, PathBuf>) -> Result<(), ImageError> {
    let read = || ImageError::file("read the modules directory", dir);
    for entry in fs::read_dir(dir).map_err(read())? {
        let entry = entry.map_err(read())?;
        let (kind, path) = (entry.file_type().map_err(read())?, entry.path());
        // Links are not followed: `build` and `source` lead to whole kernel trees.
        if kind.is_dir() && depth < DEPTH_CAP {
            collect(&path, depth + 1, files)?;
        } else if kind.is_file()
            && let Some(name) = path.to_str().and_then(name_of)
        {
            files.insert(name, path);
        }
    }
    Ok(())
}

/// The dependencies in modules.dep: `path/a.ko.xz: path/b.ko.xz path/c.ko.xz`, where a needs b and
/// c.
fn parse_dep(text: &str) -> BTreeMap<String, Vec<String>> {
    let line = |line: &str| {
        let (module, needs) = line.split_once(':')?;
        // The one to be loaded first comes last.
        Some((name_of(module)?, needs.split_whitespace().rev().filter_map(name_of).collect()))
    };
    text.lines().filter_map(line).collect()
}

/// The name of the module in the file at `path`, or `None` where the file is called otherwise.
fn name_of(path: &str) -> Option<String> {
    let file = path.rsplit('/').next()?;
    let (name, packing) = file.split_once(".ko")?;
    (matches!(packing, "" | ".xz" | ".zst" | ".gz") && !name.is_empty()).then(|| normalise(name))
}

/// The kernel takes `-` and `_` in module names for the same, and shows `_`.
fn normalise(name: &str) -> String {
    name_without_suffix(name).replace('-', "_")
}

fn name_without_suffix(name: &str) -> &str {
    name.split_once(".ko").map_or(name, |(stem, _)| stem)
}

/// The first `key=value` of a .modinfo section with that key.
fn info_value<'a>(info: &'a [u8], key: &str) -> Option<&'a str> {
    info.split(|&b| b == 0)
        .find_map(|entry| std::str::from_utf8(entry).ok()?.strip_prefix(key)?.strip_prefix('='))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The smallest ELF file with a .modinfo section.
    fn module(info: &str) -> Vec<u8> {
        let names = b"\0.modinfo\0";
        let (info_at, names_at) = (64, 64 + info.len());
        let table_at = names_at + names.len();
        let mut file = vec![0u8; 64];
        file[..6].copy_from_slice(b"\x7fELF\x02\x01");
        file[40..48].copy_from_slice(&(table_at as u64).to_le_bytes());
        file[58] = 64;
        file[60] = 2;
        file.extend_from_slice(info.as_bytes());
        file.extend_from_slice(names);
        for (name, at, len) in [(0u32, names_at, names.len()), (1, info_at, info.len())] {
            let mut header = [0u8; 64];
            header[..4].copy_from_slice(&name.to_le_bytes());
            header[24..32].copy_from_slice(&(at as u64).to_le_bytes());
            header[32..40].copy_from_slice(&(len as u64).to_le_bytes());
            file.extend_from_slice(&header);
        }
        file
    }

    fn tree(files: &[(&str, Vec<u8>)]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for (path, bytes) in files {
            let path = dir.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, bytes).unwrap();
        }
        dir
    }

    fn names(plan: &Plan) -> Vec<&str> {
        plan.load.iter().map(|m| m.name.as_str()).collect()
    }

    fn xz(bytes: &[u8]) -> Vec<u8> {
        use std::io::Write;
        let mut out = lzma_rust2::XzWriter::new(Vec::new(), lzma_rust2::XzOptions::with_preset(0)).unwrap();
        out.write_all(bytes).unwrap();
        out.finish().unwrap()
    }

    #[test]
    fn dependencies_come_first_and_once() {
        let dir = tree(&[
            ("kernel/a/virtio-rng.ko.xz", xz(&module("vermagic=6.1 SMP\0depends=rng-core,virtio\0"))),
            ("kernel/b/rng-core.ko", module("depends=virtio_ring\0")),
            ("kernel/b/virtio_ring.ko", module("depends=\0")),
            ("modules.builtin", b"kernel/drivers/virtio/virtio.ko\n".to_vec()),
        ]);
        let modules = Modules::open(dir.path()).unwrap();
        let wanted = ["virtio_rng".into(), "rng-core".into(), "virtio".into()];
        let plan = modules.plan(&wanted, Some("6.1")).unwrap();
        assert_eq!(names(&plan), ["virtio_ring", "rng_core", "virtio_rng"]);
        assert_eq!(plan.builtin, ["virtio"]);
        let other = modules.plan(&wanted, Some("6.2")).unwrap_err();
        assert!(matches!(other, ImageError::VersionMismatch { .. }), "{other}");
    }

    #[test]
    fn modules_dep_is_believed_and_cycles_end() {
        let dir = tree(&[
            ("kernel/a.ko", module("x=y\0")),
            ("kernel/b.ko", module("x=y\0")),
            ("kernel/c.ko", module("x=y\0")),
            ("kernel/d.ko", module("depends=e\0")),
            ("kernel/e.ko", module("depends=d\0")),
            (
                "modules.dep",
                b"kernel/a.ko: kernel/b.ko kernel/c.ko\nkernel/b.ko: kernel/c.ko\nkernel/c.ko:\n".to_vec(),
            ),
        ]);
        let modules = Modules::open(dir.path()).unwrap();
        assert_eq!(names(&modules.plan(&["a".into()], None).unwrap()), ["c", "b", "a"]);
        assert!(matches!(modules.plan(&["d".into()], None), Err(ImageError::Depth { .. })));
    }

    #[test]
    fn what_is_missing_is_named() {
        let dir = tree(&[
            ("kernel/virtio_balloon.ko", module("depends=nowhere\0")),
            ("kernel/bad.ko", b"no module".to_vec()),
        ]);
        let modules = Modules::open(dir.path()).unwrap();
        let text = |name: &str| modules.plan(&[name.into()], None).unwrap_err().to_string();
        assert!(text("virtio_baloon").ends_with("did you mean virtio_balloon?"), "{}", text("virtio_baloon"));
        assert!(
            text("virtio-balloon").contains("nowhere")
                && text("virtio-balloon").contains("virtio_balloon needs it")
        );
        assert!(text("bad").contains("not a kernel module"));
        let empty = tempfile::tempdir().unwrap();
        assert!(matches!(Modules::open(empty.path()), Err(ImageError::NotModules(_))));
        let gone = Modules::open(&empty.path().join("gone"));
        assert!(matches!(gone, Err(ImageError::File { .. })));
        let two = tree(&[("lib/modules/1/modules.dep", vec![]), ("lib/modules/2/modules.dep", vec![])]);
        assert!(matches!(Modules::open(two.path()), Err(ImageError::SeveralModules { .. })));
    }
}
