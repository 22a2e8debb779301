//! The power is cut before each step: of what was written only that is there which was made durable, or anything of the rest. And each step
//! fails as on a full disk.
//!
//! Every step of the file layer is recorded, and played again on a model of a disk that keeps what is written apart from what is durable: contents
//! by fsync of the file, names by fsync of the directory. Then the store is looked at as it would be found.
#![allow(clippy::unwrap_used, reason = "what fails in a test is to be seen")]

mod sample;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use sample::{Content, LIMIT, content, damage, files, later, load, name, names, open, save};
use splitmix::SplitMix64;
use store::{Compression, Hook, Step, Store, StoreError};

/// A step, kept.
#[derive(Clone, Debug)]
enum Kept {
    MakeDir,
    Create(String),
    Append(String, Vec<u8>),
    Sync(String),
    Rename(String, String),
    Remove(String),
    SyncDir(String),
}

#[derive(Default)]
struct Recorder(Mutex<Vec<Kept>>);

impl Hook for Recorder {
    fn before(&self, step: Step<'_>) -> io::Result<()> {
        self.0.lock().unwrap().push(match step {
            Step::MakeDir(_) => Kept::MakeDir,
            Step::Create(path) => Kept::Create(path.into()),
            Step::Append(path, bytes) => Kept::Append(path.into(), bytes.into()),
            Step::Sync(path) => Kept::Sync(path.into()),
            Step::Rename(from, to) => Kept::Rename(from.into(), to.into()),
            Step::Remove(path) => Kept::Remove(path.into()),
            Step::SyncDir(path) => Kept::SyncDir(path.into()),
        });
        Ok(())
    }
}

/// A disk: files by number, names that lead to them.
#[derive(Clone, Default)]
struct Disk {
    written: Vec<Vec<u8>>,
    durable: Vec<Vec<u8>>,
    names: BTreeMap<String, usize>,
    durable_names: BTreeMap<String, usize>,
}

fn parent(path: &str) -> &str {
    path.rsplit_once('/').map_or("", |(parent, _)| parent)
}

impl Disk {
    fn play(&mut self, step: &Kept) {
        match step {
            // A directory's own name: its store is made of nothing but these, and they are made first.
            Kept::MakeDir => {}
            Kept::Create(path) => {
                self.names.insert(path.clone(), self.written.len());
                self.written.push(Vec::new());
                self.durable.push(Vec::new());
            }
            Kept::Append(path, bytes) => self.written[self.names[path]].extend(bytes),
            Kept::Sync(path) => {
                let file = self.names[path];
                self.durable[file] = self.written[file].clone();
            }
            Kept::Rename(from, to) => {
                let file = self.names.remove(from).unwrap();
                self.names.insert(to.clone(), file);
            }
            Kept::Remove(path) => _ = self.names.remove(path),
            Kept::SyncDir(path) => {
                self.durable_names.retain(|name, _| parent(name) != path);
                let here = self.names.iter().filter(|(name, _)| parent(name) == path);
                self.durable_names.extend(here.map(|(name, file)| (name.clone(), *file)));
            }
        }
    }

    /// As it is found after the power was cut: of names and contents that were not made durable, each is there as `chance` will have it.
    fn put(&self, dir: &Path, chance: &mut dyn FnMut() -> bool) {
        for sub in ["packs", "checkpoints"] {
            std::fs::create_dir_all(dir.join("store").join(sub)).unwrap();
        }
        std::fs::set_permissions(dir.join("store"), std::os::unix::fs::PermissionsExt::from_mode(0o700))
            .unwrap();
        let all: BTreeSet<&String> = self.names.keys().chain(self.durable_names.keys()).collect();
        for path in all {
            let (now, durable) = (self.names.get(path), self.durable_names.get(path));
            let Some(file) = (if now == durable || !chance() { durable } else { now }) else { continue };
            let bytes = match chance() {
                false => self.durable[*file].clone(),
                // The length is there, and the contents in part.
                true => {
                    let mut bytes = self.written[*file].clone();
                    if bytes != self.durable[*file] && chance() {
                        let half = bytes.len() / 2;
                        bytes[half..].fill(0);
                    }
                    bytes
                }
            };
            std::fs::write(dir.join("store").join(path), bytes).unwrap();
        }
    }
}

/// What must be there once so many steps are made, and what may be.
struct Milestone {
    steps: usize,
    there: Vec<(&'static str, Content)>,
}

/// Everything that a store goes through.
fn life(store: &Store, mut done: impl FnMut(Vec<(&'static str, Content)>)) {
    let first = content(5, &[80, 10]);
    let second = later(&first, 6);
    let mut big = content(8, &[170]);
    big.extend(later(&second, 9));
    let last = later(&second, 9);
    save(store, "big", &big).unwrap();
    done(vec![("big", big.clone())]);
    save(store, "first", &first).unwrap();
    done(vec![("big", big.clone()), ("first", first.clone())]);
    save(store, "second", &second).unwrap();
    save(store, "last", &last).unwrap();
    done(vec![("big", big), ("first", first.clone()), ("second", second.clone()), ("last", last.clone())]);
    let writing = store.write(LIMIT).unwrap();
    writing.remove(&name("big")).unwrap();
    let rest = vec![("first", first), ("second", second.clone()), ("last", last.clone())];
    done(rest.clone());
    assert!(writing.collect(Compression::Lz4, &mut |_, _| true).unwrap().moved_pages > 0);
    done(rest);
    writing.remove(&name("first")).unwrap();
    writing.collect(Compression::Lz4, &mut |_, _| true).unwrap();
    done(vec![("second", second), ("last", last)]);
}

#[test]
fn whatever_was_committed_survives_a_power_cut_at_any_step() {
    let made = tempfile::tempdir().unwrap();
    let recorder = Arc::new(Recorder::default());
    let store = open(made.path(), Some(recorder.clone())).unwrap();
    let count = || recorder.0.lock().unwrap().len();
    let mut milestones = vec![Milestone { steps: count(), there: Vec::new() }];
    life(&store, |there| milestones.push(Milestone { steps: count(), there }));
    let steps = recorder.0.lock().unwrap().clone();
    let mut disk = Disk::default();
    let mut random = SplitMix64::new(1);
    for (n, step) in steps.iter().enumerate() {
        let reached = milestones.iter().rev().find(|milestone| milestone.steps <= n);
        let next = milestones.iter().find(|milestone| milestone.steps > n);
        for luck in 0..3 {
            let dir = tempfile::tempdir().unwrap();
            disk.put(dir.path(), &mut || luck == 1 || (luck == 2 && random.below(2) == 0));
            let found = open(dir.path(), None);
            let Some(reached) = reached else {
                // Not even its key was durable: then it is made anew, or was damaged before it was ever used.
                continue;
            };
            let store = found.unwrap_or_else(|error| panic!("step {n} {step:?}: {error}"));
            let there = names(&store);
            let stays =
                |name: &str| next.is_none_or(|next| next.there.iter().any(|(other, _)| *other == name));
            for (name, content) in reached.there.iter().filter(|(name, _)| stays(name)) {
                let found = load(&store, name).unwrap_or_else(|error| panic!("step {n} {step:?}: {error}"));
                assert!(found == *content, "step {n} {step:?}: {name} is another one");
            }
            for name in &there {
                let expected = milestones.iter().flat_map(|m| &m.there).find(|(other, _)| other == name);
                let (_, expected) = expected.unwrap_or_else(|| panic!("step {n}: {name}"));
                assert!(load(&store, name).unwrap() == *expected, "step {n} {step:?}: {name} is torn");
            }
            assert_eq!(damage(&store), [], "step {n} {step:?}");
            // It is of use: what was left over is no hindrance.
            save(&store, "after", &later(&content(5, &[80, 10]), n as u64)).unwrap();
            store.write(LIMIT).unwrap().collect(Compression::Lz4, &mut |_, _| true).unwrap();
            assert!(load(&store, "after").unwrap() == later(&content(5, &[80, 10]), n as u64));
            assert_eq!(damage(&store), [], "step {n} {step:?}, after collecting");
        }
        disk.play(step);
    }
    assert!(steps.len() > 100, "{}", steps.len());
}

/// Fails once at a step, or from there on.
struct Full {
    from: u64,
    steps: AtomicU64,
    for_ever: bool,
}

impl Hook for Full {
    fn before(&self, step: Step<'_>) -> io::Result<()> {
        let now = self.steps.fetch_add(1, Ordering::Relaxed);
        // On a full disk files can be removed.
        let takes_room = !matches!(step, Step::Remove(_));
        match takes_room && (now == self.from || (self.for_ever && now > self.from)) {
            true => Err(rustix::io::Errno::NOSPC.into()),
            false => Ok(()),
        }
    }
}

#[test]
fn a_disk_that_is_full_at_any_step_loses_nothing() {
    let first = content(5, &[80, 10]);
    let second = later(&first, 6);
    for for_ever in [false, true] {
        let mut failed = 0;
        for from in 0.. {
            let dir = tempfile::tempdir().unwrap();
            save(&open(dir.path(), None).unwrap(), "first", &first).unwrap();
            let before = files(dir.path());
            let hook = Arc::new(Full { from, steps: AtomicU64::new(0), for_ever });
            let store = open(dir.path(), Some(hook)).unwrap();
            let saved = save(&store, "second", &second);
            drop(store);
            let store = open(dir.path(), None).unwrap();
            assert!(load(&store, "first").unwrap() == first && damage(&store).is_empty());
            match saved {
                Ok(_) => {
                    assert!(load(&store, "second").unwrap() == second);
                    break;
                }
                Err(StoreError::File { source, path, .. }) => {
                    failed += 1;
                    assert_eq!(source.raw_os_error(), Some(rustix::io::Errno::NOSPC.raw_os_error()));
                    assert!(path.starts_with(dir.path()));
                }
                Err(other) => panic!("{other}"),
            }
            // It was renamed, and the fsync after that failed: then it is there, as after a power cut it may be.
            if names(&store).len() == 2 {
                assert!(load(&store, "second").unwrap() == second);
                continue;
            }
            assert_eq!(files(dir.path()), before, "step {from}: nothing is left over");
            save(&store, "second", &second).unwrap();
            assert!(load(&store, "second").unwrap() == second);
        }
        assert!(failed >= 8, "{failed}");
    }
}

/// A file system of a size.
struct Mount(tempfile::TempDir);

impl Mount {
    /// None where this user may not mount.
    fn new(kib: u64) -> Option<Self> {
        let dir = tempfile::tempdir().unwrap();
        let size = format!("size={kib}k");
        let mounted = std::process::Command::new("mount")
            .args(["-t", "tmpfs", "-o", &size, "tmpfs"])
            .arg(dir.path())
            .output();
        mounted.is_ok_and(|output| output.status.success()).then_some(Self(dir))
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let _ = std::process::Command::new("umount").arg(self.0.path()).status();
    }
}

#[test]
fn a_file_system_of_any_size_holds_what_it_held() {
    let first = content(5, &[60]);
    let second = later(&first, 6);
    let (mut fits, mut full) = (0, 0);
    for kib in (60..240).step_by(4) {
        let Some(mount) = Mount::new(kib) else {
            println!(
                "SKIPPED a_file_system_of_any_size_holds_what_it_held: this user may not mount a file system"
            );
            return;
        };
        let dir = mount.0.path();
        let Ok(store) = open(dir, None) else { continue };
        let Ok(_) = save(&store, "first", &first) else { continue };
        match save(&store, "second", &second) {
            Ok(_) => fits += 1,
            Err(_) => full += 1,
        }
        let there = names(&store);
        assert!(load(&store, "first").unwrap() == first, "{kib} KiB");
        assert!(!there.contains(&"second".into()) || load(&store, "second").unwrap() == second);
        assert_eq!(damage(&store), []);
        // What fails gives back what it took.
        store.write(LIMIT).unwrap().remove(&name("first")).unwrap();
        store.write(LIMIT).unwrap().collect(Compression::Lz4, &mut |_, _| true).unwrap();
    }
    assert!(fits > 0 && full > 0, "{fits} fit, {full} did not");
}
