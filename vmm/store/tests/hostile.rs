//! Files of a store that were damaged, or forged by a writer that has the key: nothing panics, nothing is allocated beyond what
//! a file may have, no path leads out, and a page that is read is the page that was written or an error.
#![allow(clippy::unwrap_used, reason = "what fails in a test is to be seen")]
#![expect(unsafe_code, reason = "an allocator that remembers its longest block")]

mod sample;

use std::alloc::{GlobalAlloc, Layout, System};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

use proptest::prelude::*;
use sample::{Content, LIMIT, content, files, later, load, name, open, save};
use splitmix::SplitMix64;
use store::{Compression, PAGE, Store};

/// The longest block that may be asked for: the longest section of a file, and again as much for a vector that grows.
const MOST_BYTES: usize = 130 << 20;

struct Remembering;

static LONGEST: AtomicUsize = AtomicUsize::new(0);

// SAFETY: the system's allocator does the work.
unsafe impl GlobalAlloc for Remembering {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        LONGEST.fetch_max(layout.size(), Ordering::Relaxed);
        // SAFETY: as the caller's.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        // SAFETY: as the caller's.
        unsafe { System.dealloc(block, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Remembering = Remembering;

fn checkpoints() -> [(&'static str, Content); 2] {
    let first = content(1, &[70, 9]);
    let second = later(&first, 2);
    [("first", first), ("second", second)]
}

/// A store with two checkpoints.
fn made() -> (tempfile::TempDir, Vec<(&'static str, Content)>) {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path(), None).unwrap();
    for (name, content) in checkpoints() {
        save(&store, name, &content).unwrap();
    }
    (dir, checkpoints().into())
}

/// Does everything with it that reads. What is found was written, unless it was forged.
fn look_at_all(dir: &Path, there: &[(&'static str, Content)], is_forged: bool) {
    let Ok(store) = open(dir, None) else { return };
    for (called, content) in there {
        if let Some(found) = quietly_load(&store, called) {
            assert!(is_forged || found == *content, "{called}: other pages came back");
        }
    }
    let reading = store.read(LIMIT).unwrap();
    let _ = (reading.sizes(), reading.verify(&mut |_, _| true));
    drop(reading);
    assert!(LONGEST.load(Ordering::Relaxed) <= MOST_BYTES);
}

/// As `sample::load`, of which the state may be any.
fn quietly_load(store: &Store, called: &str) -> Option<Content> {
    let reading = store.read(LIMIT).ok()?;
    let checkpoint = reading.load(&name(called)).ok()?;
    let _ = reading.meta(&name(called));
    let mut pages = reading.pages();
    let mut content = Content::new();
    for slab in &checkpoint.slabs {
        let mut found = vec![None; slab.pages as usize];
        for run in &slab.runs {
            let mut read = vec![[0; PAGE]; run.pages as usize];
            pages.read(run.place, &mut read).ok()?;
            (run.page as usize..).zip(read).for_each(|(at, page)| found[at] = Some(page));
        }
        content.push(found);
    }
    Some(content)
}

/// The files of a store, and its key's.
fn paths(dir: &Path) -> Vec<PathBuf> {
    let own = files(dir).into_iter().chain(["store".to_owned()]);
    own.map(|file| dir.join("store").join(file)).collect()
}

#[test]
fn files_that_are_cut_short_anywhere_are_refused() {
    let (dir, there) = made();
    for path in paths(dir.path()) {
        let whole = fs::read(&path).unwrap();
        let ends = (0..whole.len())
            .step_by(4096)
            .chain((0..whole.len().min(4096)).step_by(61))
            .chain([whole.len() - 1]);
        for end in ends {
            fs::write(&path, &whole[..end]).unwrap();
            look_at_all(dir.path(), &there, false);
        }
        // And one that goes on.
        fs::write(&path, [&whole[..], &[0; 5000]].concat()).unwrap();
        look_at_all(dir.path(), &there, false);
        fs::write(&path, &whole).unwrap();
    }
    assert!(
        there
            .iter()
            .all(|(called, content)| load(&open(dir.path(), None).unwrap(), called).unwrap() == *content)
    );
}

#[test]
fn files_with_bits_flipped_are_refused_or_as_they_were() {
    let (dir, there) = made();
    let mut random = SplitMix64::new(3);
    for path in paths(dir.path()) {
        let whole = fs::read(&path).unwrap();
        for _ in 0..150 {
            let mut bytes = whole.clone();
            // As often near the beginning, where the sizes are, as anywhere.
            let within = if random.below(2) == 0 { 300.min(bytes.len()) } else { bytes.len() };
            bytes[random.below(within as u64) as usize] ^= 1 << random.below(8);
            fs::write(&path, bytes).unwrap();
            look_at_all(dir.path(), &there, false);
        }
        fs::write(&path, &whole).unwrap();
    }
}

/// Signs a file anew, as one who has the key can.
fn sign(path: &Path, key: &[u8; 32], bytes: &mut [u8]) {
    let digest = |bytes: &[u8]| *blake3::keyed_hash(key, bytes).as_bytes();
    let name = path.to_str().unwrap();
    if name.ends_with(".idx") {
        if let Some((content, end)) = bytes.split_last_chunk_mut::<32>() {
            *end = digest(content);
        }
    } else if name.contains("/checkpoints/") && bytes.len() >= 208 {
        let lengths: Vec<u64> =
            (0..4).map(|n| u64::from_le_bytes(bytes[16 + n * 8..][..8].try_into().unwrap())).collect();
        let mut at = 208u64;
        for (n, length) in lengths.iter().enumerate() {
            let end = at.saturating_add(*length);
            if end <= bytes.len() as u64 {
                let section = digest(&bytes[at as usize..end as usize]);
                bytes[48 + n * 32..][..32].copy_from_slice(&section);
            }
            at = end;
        }
        let head = digest(&bytes[..176]);
        bytes[176..208].copy_from_slice(&head);
    }
}

#[test]
fn forged_sizes_allocate_nothing_and_lead_nowhere() {
    let (dir, there) = made();
    let key: [u8; 32] = fs::read(dir.path().join("store/store")).unwrap()[16..48].try_into().unwrap();
    let values = [1u64 << 63, u64::MAX, 1 << 32, u64::from(u32::MAX), 1 << 31, 1 << 18, (1 << 18) + 1, 0, 1];
    for path in paths(dir.path()) {
        let whole = fs::read(&path).unwrap();
        let is_signed = path.extension().is_some_and(|end| end == "idx")
            || path.parent().unwrap().ends_with("checkpoints");
        let end = if is_signed { whole.len() } else { 64 };
        for at in (0..end.saturating_sub(8)).step_by(4).filter(|at| *at < 420 || at % 52 == 0) {
            for value in values {
                let mut bytes = whole.clone();
                bytes[at..at + 8].copy_from_slice(&value.to_le_bytes());
                sign(&path, &key, &mut bytes);
                fs::write(&path, bytes).unwrap();
                look_at_all(dir.path(), &there, true);
            }
        }
        fs::write(&path, &whole).unwrap();
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]
    /// Numbers of a map, a list of packs, an index, forged at random, several at once.
    #[test]
    fn forged_files_do_no_harm(which in any::<prop::sample::Index>(), changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u32>(), 0u8..3), 1..12), cut in prop::option::of(any::<prop::sample::Index>())) {
        let (dir, there) = made();
        let key: [u8; 32] = fs::read(dir.path().join("store/store")).unwrap()[16..48].try_into().unwrap();
        let all: Vec<PathBuf> = paths(dir.path()).into_iter().filter(|path| path.extension().is_none_or(|end| end != "pack")).collect();
        let path = &all[which.index(all.len())];
        let mut bytes = fs::read(path).unwrap();
        for (at, value, kind) in changes {
            let at = at.index(bytes.len() / 4) * 4;
            let value = match kind { 0 => value, 1 => value % 300, _ => value % (1 << 19) };
            bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
        }
        if let Some(cut) = cut {
            bytes.truncate(cut.index(bytes.len()));
        }
        sign(path, &key, &mut bytes);
        fs::write(path, bytes).unwrap();
        look_at_all(dir.path(), &there, true);
        if let Ok(store) = open(dir.path(), None) {
            // A store with a file of that kind is still of use, or says what is wrong.
            let writing = store.write(LIMIT).unwrap();
            let _ = writing.collect(Compression::Lz4, &mut |_, _| true);
            drop(writing);
            if save(&store, "after", &checkpoints()[1].1).is_ok() {
                prop_assert!(load(&store, "after").unwrap() == checkpoints()[1].1);
            }
        }
    }
}

#[test]
fn links_and_other_files_are_not_followed() {
    let (dir, there) = made();
    let outside = dir.path().join("outside");
    for path in paths(dir.path()) {
        fs::rename(&path, &outside).unwrap();
        std::os::unix::fs::symlink(&outside, &path).unwrap();
        let store = open(dir.path(), None);
        let opened =
            store.map(|store| there.iter().all(|(called, _)| quietly_load(&store, called).is_some()));
        assert!(!opened.unwrap_or(false), "{} was followed", path.display());
        fs::remove_file(&path).unwrap();
        rustix::fs::mknodat(
            rustix::fs::CWD,
            &path,
            rustix::fs::FileType::Fifo,
            rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR,
            0,
        )
        .unwrap();
        // It does not wait for the other end.
        look_at_all(dir.path(), &there, false);
        fs::remove_file(&path).unwrap();
        fs::rename(&outside, &path).unwrap();
    }
    // A directory of the store, too.
    fs::rename(dir.path().join("store/packs"), &outside).unwrap();
    std::os::unix::fs::symlink(&outside, dir.path().join("store/packs")).unwrap();
    assert!(open(dir.path(), None).is_err());
}
