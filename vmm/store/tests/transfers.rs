//! Checkpoints that go to another store, through a file or to a process that lacks a part of them.
#![allow(clippy::unwrap_used, reason = "what fails in a test is to be seen")]

mod sample;

use std::io::{self, Write};
use std::os::unix::net::UnixStream;

use proptest::prelude::*;
use sample::{Content, LIMIT, content, damage, later, load, name, open, save};
use store::{Compression, Incoming, Outgoing, Saved, Store, StoreError};

fn exported(store: &Store, called: &str) -> Vec<u8> {
    let (reading, mut file) = (store.read(LIMIT).unwrap(), Vec::new());
    let outgoing = Outgoing::of(&reading, &name(called)).unwrap();
    assert_eq!(outgoing.export(&mut file, Compression::Zstd, &mut |_, _| true).unwrap(), outgoing.pages());
    file
}

fn import(store: &Store, mut file: &[u8]) -> Result<Saved, StoreError> {
    let incoming = Incoming::read(&mut file)?;
    let called = String::from_utf8(incoming.meta().to_vec()).unwrap();
    let meta = (called.clone().into(), Compression::Lz4);
    let saved = incoming.import(&store.write(LIMIT)?, &name(&called), meta, &mut file, &mut |_, _| true)?;
    assert!(file.is_empty());
    Ok(saved)
}

#[test]
fn an_exported_checkpoint_is_the_same_elsewhere() {
    let (dir, there) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (store, other) = (open(dir.path(), None).unwrap(), open(there.path(), None).unwrap());
    let first = content(1, &[300, 40]);
    let second = later(&first, 2);
    save(&store, "first", &first).unwrap();
    let saved = save(&store, "second", &second).unwrap();
    import(&other, &exported(&store, "first")).unwrap();
    // It has the pages of the first one.
    assert_eq!(import(&other, &exported(&store, "second")).unwrap().new_pages, saved.new_pages);
    assert!(load(&other, "first").unwrap() == first && load(&other, "second").unwrap() == second);
    assert_eq!(damage(&other), []);
    assert!(matches!(import(&other, &exported(&store, "first")), Err(StoreError::Taken(_))));
}

/// What a connection carried.
struct Counted(UnixStream, u64);

impl Write for Counted {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.0.write(bytes)?;
        self.1 += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

/// Sends it over a socket. Pages and bytes that were sent.
fn send(from: &Store, to: &Store, called: &str) -> (u64, u64) {
    let (here, mut there) = UnixStream::pair().unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut answers = there.try_clone().unwrap();
            let incoming = Incoming::receive(to, &mut there, &mut answers).unwrap();
            let meta = (incoming.meta().to_vec(), Compression::Lz4);
            let writing = to.write(LIMIT).unwrap();
            incoming
                .import_missing(&writing, &name(called), meta, (&mut there, &mut answers), &mut |_, _| true)
                .unwrap();
        });
        let reading = from.read(LIMIT).unwrap();
        let outgoing = Outgoing::of(&reading, &name(called)).unwrap();
        let mut answers = here.try_clone().unwrap();
        let mut here = Counted(here, 0);
        let pages = outgoing.send(&mut here, &mut answers, Compression::Lz4, &mut |_, _| true).unwrap();
        (pages, here.1)
    })
}

#[test]
fn pages_that_the_other_side_has_are_not_sent() {
    let (dir, there) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (store, other) = (open(dir.path(), None).unwrap(), open(there.path(), None).unwrap());
    let first = content(1, &[600, 40]);
    let second = later(&first, 2);
    let saved = save(&store, "first", &first).unwrap();
    let (pages, bytes) = send(&store, &other, "first");
    assert_eq!(pages, saved.new_pages);
    let later_saved = save(&store, "second", &second).unwrap();
    let (pages, later_bytes) = send(&store, &other, "second");
    assert_eq!(pages, later_saved.new_pages);
    assert!(later_bytes < bytes / 3, "{later_bytes} of {bytes}");
    // Back again, where all of it is.
    store.write(LIMIT).unwrap().remove(&name("second")).unwrap();
    save(&store, "same", &second).unwrap();
    assert_eq!(send(&other, &store, "second").0, 0);
    for (store, called) in [(&other, "first"), (&other, "second"), (&store, "second")] {
        assert!(
            load(store, called).unwrap() == if called == "first" { first.clone() } else { second.clone() }
        );
    }
    assert_eq!((damage(&store), damage(&other)), (vec![], vec![]));
}

#[test]
fn a_stream_that_breaks_off_leaves_nothing() {
    let (dir, there) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (store, other) = (open(dir.path(), None).unwrap(), open(there.path(), None).unwrap());
    save(&store, "first", &content(1, &[100])).unwrap();
    let file = exported(&store, "first");
    for end in (0..file.len()).step_by(997).chain([file.len() - 1]) {
        assert!(import(&other, &file[..end]).is_err(), "{end}");
        assert_eq!(sample::files(there.path()), [""; 0], "{end}");
    }
    import(&other, &file).unwrap();
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn damage_on_the_way_is_noticed(at in any::<prop::sample::Index>(), bit in 0u8..8) {
        let (dir, there) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let (store, other) = (open(dir.path(), None).unwrap(), open(there.path(), None).unwrap());
        let first: Content = content(1, &[20]);
        save(&store, "first", &first).unwrap();
        let mut file = exported(&store, "first");
        let at = at.index(file.len());
        file[at] ^= 1 << bit;
        // What no digest covers says nothing.
        let is_padding = (12..16).contains(&at);
        match import(&other, &file) {
            Ok(_) => prop_assert!(is_padding || load(&other, "first").unwrap() == first),
            Err(_) => prop_assert_eq!(sample::files(there.path()), [""; 0]),
        }
    }

    #[test]
    fn rubbish_is_no_checkpoint(mut bytes in prop::collection::vec(any::<u8>(), 0..2000), with_magic: bool) {
        let there = tempfile::tempdir().unwrap();
        let other = open(there.path(), None).unwrap();
        if with_magic && bytes.len() > 12 {
            bytes[..12].copy_from_slice(b"SPMOVE01\x01\0\0\0");
        }
        prop_assert!(import(&other, &bytes).is_err());
    }

    /// A head whose digest fits: nothing is allocated for what it only says.
    #[test]
    fn sizes_that_are_only_said_are_refused(bytes: u64, pages: u64, rest in prop::collection::vec(any::<u8>(), 0..600)) {
        let there = tempfile::tempdir().unwrap();
        let other = open(there.path(), None).unwrap();
        let mut head = b"SPMOVE01\x01\0\0\0\0\0\0\0".to_vec();
        head.extend([7; 32]);
        head.extend(bytes.to_le_bytes());
        head.extend(pages.to_le_bytes());
        let digest = blake3::hash(&head);
        head.extend(digest.as_bytes());
        head.extend(rest);
        prop_assert!(import(&other, &head).is_err());
        prop_assert!(Incoming::read(&mut io::empty()).is_err());
    }
}
