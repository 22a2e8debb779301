//! A process that changes a store is killed before each step it makes: what it was at has happened or has not, and nothing else is touched.
//!
//! The child is this program. It counts the steps of the file layer and sends itself SIGKILL before step N, so no step is left out, also
//! within a frame, and none depends on time.
#![allow(clippy::unwrap_used, reason = "what fails in a test is to be seen")]

mod sample;

use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, ExitStatus};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use sample::{Content, LIMIT, content, damage, files, later, load, name, names, open, save};
use store::{Compression, Hook, Step, Store};

/// What a child does.
const WORKS: [&str; 5] = ["make", "save", "save-later", "remove", "collect"];
/// How often by default, each time with other pages; `SAMEPAGE_KILL_SEEDS=15` makes it more than 1,000 kills.
const SEEDS: u64 = 4;
const SIGKILL: i32 = 9;

struct KilledAt {
    step: u64,
    steps: AtomicU64,
}

impl Hook for KilledAt {
    fn before(&self, _: Step<'_>) -> std::io::Result<()> {
        if self.steps.fetch_add(1, Ordering::Relaxed) == self.step {
            let this = rustix::process::getpid();
            let _ = rustix::process::kill_process(this, rustix::process::Signal::KILL);
            loop {
                std::thread::park();
            }
        }
        Ok(())
    }
}

fn first(seed: u64) -> Content {
    content(seed, &[150, 20])
}

/// What is there before the child does its work.
fn prepare(work: &str, dir: &Path, seed: u64) -> Vec<(&'static str, Content)> {
    if work == "make" {
        return Vec::new();
    }
    let store = open(dir, None).unwrap();
    if work == "save" {
        return Vec::new();
    }
    let mut there = vec![("first", first(seed))];
    if work == "remove" || work == "collect" {
        // Most of the pack of `gone` is of no use afterwards, and some is moved.
        let mut gone = content(seed + 1000, &[300]);
        gone.extend(later(&first(seed), 7));
        there.insert(0, ("gone", gone));
        there.push(("moved", later(&first(seed), 7)));
    }
    for (name, content) in &there {
        save(&store, name, content).unwrap();
    }
    if work == "collect" {
        store.write(LIMIT).unwrap().remove(&name("gone")).unwrap();
        there.remove(0);
    }
    there
}

fn work(work: &str, store: &Store, seed: u64) {
    match work {
        "save" => drop(save(store, "new", &first(seed)).unwrap()),
        "save-later" => drop(save(store, "new", &later(&first(seed), seed)).unwrap()),
        "remove" => store.write(LIMIT).unwrap().remove(&name("gone")).unwrap(),
        "collect" => {
            let collected = store.write(LIMIT).unwrap().collect(Compression::Lz4, &mut |_, _| true).unwrap();
            assert!(collected.moved_pages > 0 && collected.removed_packs > 0, "{collected:?}");
        }
        _ => {}
    }
}

fn child(arguments: &[String]) {
    let [what, dir, seed, step] = arguments else { panic!("four arguments") };
    let hook = Arc::new(KilledAt { step: step.parse().unwrap(), steps: AtomicU64::new(0) });
    let store = open(Path::new(dir), Some(hook)).unwrap();
    work(what, &store, seed.parse().unwrap());
}

fn run(what: &str, dir: &Path, seed: u64, step: u64) -> ExitStatus {
    let program = std::env::current_exe().unwrap();
    let arguments = [what, dir.to_str().unwrap(), &seed.to_string(), &step.to_string()];
    Command::new(program).arg("child").args(arguments).status().unwrap()
}

/// Whether there is another step: the child was killed, and not done.
fn kill(what: &str, seed: u64, step: u64) -> bool {
    let dir = tempfile::tempdir().unwrap();
    let before = prepare(what, dir.path(), seed);
    let status = run(what, dir.path(), seed, step);
    let was_killed = status.signal() == Some(SIGKILL);
    assert!(was_killed || status.success(), "{what}, step {step}: {status}");
    let store = open(dir.path(), None).unwrap();
    assert_eq!(damage(&store), [], "{what}, step {step}");
    let there = names(&store);
    let may_be_new = |there: &str| match what {
        "save" => first(seed) == load(&store, there).unwrap(),
        "save-later" => later(&first(seed), seed) == load(&store, there).unwrap(),
        _ => false,
    };
    for name in &there {
        let known = before.iter().find(|(known, _)| known == name);
        let is_whole = known.map_or_else(
            || name == "new" && may_be_new(name),
            |(_, content)| *content == load(&store, name).unwrap(),
        );
        assert!(is_whole, "{what}, step {step}: {name} is another one");
    }
    for (name, _) in &before {
        assert!(
            there.iter().any(|there| there == name) || (what == "remove" && *name == "gone"),
            "{what}, step {step}: {name} is gone"
        );
    }
    // Everything goes on from there, and nothing is left over.
    if !there.iter().any(|name| name == "new") {
        save(&store, "new", &first(seed)).unwrap();
    }
    let writing = store.write(LIMIT).unwrap();
    writing.names().unwrap().iter().for_each(|name| writing.remove(name).unwrap());
    writing.collect(Compression::Lz4, &mut |_, _| true).unwrap();
    assert_eq!(files(dir.path()), [""; 0], "{what}, step {step}");
    was_killed
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if arguments.first().is_some_and(|first| first == "child") {
        return child(&arguments[1..]);
    }
    let seeds =
        std::env::var("SAMEPAGE_KILL_SEEDS").ok().and_then(|seeds| seeds.parse().ok()).unwrap_or(SEEDS);
    let mut kills = 0;
    for (what, seed) in WORKS.iter().flat_map(|what| (0..seeds).map(move |seed| (what, seed))) {
        let steps = (0..1000).find(|step| !kill(what, seed, *step)).expect("it ends");
        assert!(steps >= if *what == "remove" { 2 } else { 5 }, "{what} has {steps} steps");
        kills += steps;
    }
    println!("kills: {kills} kills, 0 torn");
}
