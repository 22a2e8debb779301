//! What is saved comes back, each page is on the disk once, and what is removed gives its place back.
#![allow(clippy::unwrap_used, reason = "what fails in a test is to be seen")]

mod sample;

use std::os::unix::fs::PermissionsExt;
use std::time::Duration;

use proptest::prelude::*;
use sample::{LIMIT, content, damage, files, later, load, name, names, open, page, save};
use store::{Compression, PAGE, StoreError};

#[test]
fn a_later_checkpoint_is_a_difference_by_itself() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path(), None).unwrap();
    let first = content(1, &[300, 40]);
    let second = later(&first, 2);
    let saved = [save(&store, "first", &first).unwrap(), save(&store, "second", &second).unwrap()];
    // What was absent has been written in part, and nothing else was.
    let changed = first.iter().flatten().zip(second.iter().flatten()).filter(|(a, b)| a != b).count() as u64;
    assert_eq!(saved[1].new_pages, changed);
    assert!(saved[0].new_pages < saved[0].pages, "pages that are there twice are stored once");
    // The same once more costs its list of pages.
    assert_eq!(save(&store, "again", &second).unwrap().new_pages, 0);
    assert_eq!(names(&store), ["again", "first", "second"]);
    // None depends on an earlier one.
    let writing = store.write(LIMIT).unwrap();
    writing.remove(&name("first")).unwrap();
    writing.collect(Compression::Lz4, &mut |_, _| true).unwrap();
    drop(writing);
    assert!(load(&store, "second").unwrap() == second && load(&store, "again").unwrap() == second);
    assert_eq!(damage(&store), []);
}

#[test]
fn sizes_are_told_alone_and_together() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path(), None).unwrap();
    let first = content(1, &[500]);
    save(&store, "a", &first).unwrap();
    save(&store, "b", &first).unwrap();
    let sizes = store.read(LIMIT).unwrap().sizes().unwrap();
    let [a, b] = [0, 1].map(|n| sizes.checkpoints[n].1);
    assert_eq!((a, a.own_bytes), (b, 0), "all of it is in common");
    let packs: u64 = files(dir.path())
        .iter()
        .filter(|file| file.ends_with(".pack"))
        .map(|file| dir.path().join("store").join(file).metadata().unwrap().len())
        .sum();
    assert!(a.bytes.abs_diff(packs) < 100, "{a:?} {packs}");
    save(&store, "c", &content(9, &[10])).unwrap();
    let reading = store.read(LIMIT).unwrap();
    let (_, c) = reading.sizes().unwrap().checkpoints.pop().unwrap();
    assert!(c.own_bytes > 0 && c.own_bytes <= c.bytes);
}

#[test]
fn what_is_removed_gives_its_place_back() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path(), None).unwrap();
    let kept = content(1, &[100]);
    let big = content(2, &[1000]);
    let mut both = big.clone();
    both.extend(kept.clone());
    save(&store, "both", &both).unwrap();
    save(&store, "kept", &kept).unwrap();
    let writing = store.write(LIMIT).unwrap();
    assert!(
        matches!(writing.remove(&name("other")), Err(StoreError::Missing { known, .. }) if known == "both, kept")
    );
    writing.remove(&name("both")).unwrap();
    let collected = writing.collect(Compression::Zstd, &mut |_, _| true).unwrap();
    assert!(collected.moved_pages < 100 && collected.freed_bytes > 300 * PAGE as i64 / 2, "{collected:?}");
    // What is left is what is used.
    assert_eq!(writing.collect(Compression::Lz4, &mut |_, _| true).unwrap().removed_packs, 0);
    drop(writing);
    assert!(load(&store, "kept").unwrap() == kept);
    assert_eq!((damage(&store), names(&store)), (vec![], vec!["kept".to_owned()]));
    let writing = store.write(LIMIT).unwrap();
    writing.remove(&name("kept")).unwrap();
    writing.collect(Compression::Lz4, &mut |_, _| true).unwrap();
    assert_eq!(files(dir.path()), [""; 0]);
}

#[test]
fn many_small_packs_are_put_together() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path(), None).unwrap();
    let mut now = content(1, &[200]);
    let mut all = Vec::new();
    for n in 0..20 {
        now = later(&now, n);
        save(&store, &format!("c{n}"), &now).unwrap();
        all.push(now.clone());
    }
    assert_eq!(files(dir.path()).len(), 60);
    store.write(LIMIT).unwrap().collect(Compression::Lz4, &mut |_, _| true).unwrap();
    assert_eq!(files(dir.path()).len(), 22);
    for (n, content) in all.iter().enumerate() {
        assert!(load(&store, &format!("c{n}")).unwrap() == *content);
    }
    assert_eq!(damage(&store), []);
}

#[test]
fn a_save_that_is_given_up_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path(), None).unwrap();
    let writing = store.write(LIMIT).unwrap();
    let mut given_up = writing.save(&name("a"), Compression::Lz4).unwrap();
    given_up.slab(100).unwrap();
    (0..100).for_each(|n| given_up.page(n, &page(n.into())).unwrap());
    drop(given_up);
    assert_eq!(files(dir.path()), [""; 0]);
    // Out of order, out of the slab.
    let mut save = writing.save(&name("a"), Compression::Lz4).unwrap();
    assert!(save.slab(0).is_err() && save.slab(1 << 19).is_err());
    assert!(save.page(0, &page(1)).is_err(), "there is no slab yet");
    save.slab(10).unwrap();
    save.page(5, &page(1)).unwrap();
    assert!(save.page(5, &page(2)).is_err() && save.page(10, &page(2)).is_err());
}

#[test]
fn names_are_taken_once() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path(), None).unwrap();
    save(&store, "a", &content(1, &[10])).unwrap();
    assert!(matches!(save(&store, "a", &content(2, &[10])), Err(StoreError::Taken(name)) if name == "a"));
    assert!(load(&store, "a").unwrap() == content(1, &[10]));
}

#[test]
fn what_a_save_said_is_where_pages_are_can_be_referred_to() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path(), None).unwrap();
    let writing = store.write(LIMIT).unwrap();
    let mut save = writing.save(&name("a"), Compression::Lz4).unwrap();
    save.slab(3).unwrap();
    (0..3).for_each(|n| save.page(n, &page(n.into())).unwrap());
    let (_, slabs) = save.commit(Vec::new(), Vec::new()).unwrap();
    let mut save = writing.save(&name("b"), Compression::Lz4).unwrap();
    save.slab(3).unwrap();
    assert!(save.refer(&slabs[0].runs).unwrap());
    let mut wrong = slabs[0].runs.clone();
    wrong[0].place.page += 1;
    save.slab(3).unwrap();
    assert!(!save.refer(&wrong).unwrap(), "the pack has fewer pages");
    wrong[0].place.pack ^= 1;
    assert!(!save.refer(&wrong).unwrap(), "there is no such pack");
    let (saved, _) = save.commit(Vec::new(), Vec::new()).unwrap();
    assert_eq!((saved.known_pages, saved.new_pages, saved.pages), (3, 0, 3));
    assert_eq!(writing.load(&name("b")).unwrap().slabs[0], slabs[0]);
}

#[test]
fn one_changes_it_at_a_time() {
    let dir = tempfile::tempdir().unwrap();
    let (store, other) = (open(dir.path(), None).unwrap(), open(dir.path(), None).unwrap());
    let brief = Duration::from_millis(1);
    let reading = store.read(LIMIT).unwrap();
    let _second = other.read(LIMIT).unwrap();
    assert!(matches!(other.write(brief), Err(StoreError::Busy { .. })));
    drop((reading, _second));
    let _writing = store.write(LIMIT).unwrap();
    assert!(matches!(other.read(brief), Err(StoreError::Busy { .. })));
    assert!(matches!(store.write(brief), Err(StoreError::Busy { .. })));
}

#[test]
fn two_that_save_at_once_both_do() {
    let dir = tempfile::tempdir().unwrap();
    let first = content(1, &[200]);
    std::thread::scope(|scope| {
        for n in 0..4 {
            let (dir, first) = (dir.path(), &first);
            scope.spawn(move || save(&open(dir, None).unwrap(), &format!("c{n}"), first).unwrap());
        }
    });
    let store = open(dir.path(), None).unwrap();
    assert!((0..4).all(|n| load(&store, &format!("c{n}")).unwrap() == first));
    assert_eq!(files(dir.path()).iter().filter(|file| file.ends_with(".pack")).count(), 1, "each page once");
}

#[test]
fn a_store_is_its_user_s_alone() {
    let dir = tempfile::tempdir().unwrap();
    drop(open(dir.path(), None).unwrap());
    let mode = |path: &str| dir.path().join(path).metadata().unwrap().permissions().mode() & 0o777;
    assert_eq!((mode("store"), mode("store/packs"), mode("store/store")), (0o700, 0o700, 0o600));
    std::fs::set_permissions(dir.path().join("store"), PermissionsExt::from_mode(0o750)).unwrap();
    let refused = open(dir.path(), None).err().unwrap().to_string();
    assert!(refused.contains("750") && refused.contains("0700"), "{refused}");
}

#[test]
fn a_key_is_not_made_anew_for_what_is_there() {
    let dir = tempfile::tempdir().unwrap();
    save(&open(dir.path(), None).unwrap(), "a", &content(1, &[10])).unwrap();
    std::fs::remove_file(dir.path().join("store/store")).unwrap();
    assert!(open(dir.path(), None).is_err());
}

#[test]
fn the_file_of_another_store_is_refused() {
    let (dir, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    save(&open(dir.path(), None).unwrap(), "a", &content(1, &[10])).unwrap();
    let there = open(other.path(), None).unwrap();
    for file in files(dir.path()) {
        std::fs::copy(dir.path().join("store").join(&file), other.path().join("store").join(&file)).unwrap();
    }
    let refused = load(&there, "a").unwrap_err().to_string();
    assert!(refused.contains("of another store"), "{refused}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn any_pages_come_back(
        slabs in prop::collection::vec(prop::collection::vec(prop::option::of(0u64..40), 1..150), 0..4),
        more in prop::collection::vec(prop::option::of(20u64..60), 1..150),
        zstd: bool,
    ) {
        let dir = tempfile::tempdir().unwrap();
        let store = open(dir.path(), None).unwrap();
        let pages = |slab: &Vec<Option<u64>>| slab.iter().map(|number| number.map(page)).collect::<Vec<_>>();
        let first: sample::Content = slabs.iter().map(pages).collect();
        let second = vec![pages(&more)];
        save(&store, "first", &first).unwrap();
        save(&store, "second", &second).unwrap();
        let compression = if zstd { Compression::Zstd } else { Compression::Lz4 };
        store.write(LIMIT).unwrap().collect(compression, &mut |_, _| true).unwrap();
        prop_assert!(load(&store, "first").unwrap() == first);
        prop_assert!(load(&store, "second").unwrap() == second);
    }
}
