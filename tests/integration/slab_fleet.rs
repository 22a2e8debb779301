//! A fleet merged by slabs, whose daemon and guests are killed at bad moments.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use kernel_view::pagemap::Pagemap;
use rustix::process::Signal;
use serde_json::json;
use tests::require_slabs;
use tests::run::Run;
use tests::sandbox::{Process, Sandbox};
use tests::vm::{Client, SOON, eventually, field};

const LIMIT: Duration = Duration::from_secs(240);
const GUESTS: usize = 3;
const FLEET: &str = r#"
name = "slabs"
engine = "slab"
[defaults]
memory = "32M"
fill = { zero = 10, common = 50, duplicate = 20, unique = 20 }
[[guest]]
name = "vm"
count = 3
"#;
/// What maps and descriptors say of a slab.
const SLAB: &str = "/memfd:samepage-slab";

struct Fleet {
    sandbox: Sandbox,
    file: PathBuf,
}

impl Fleet {
    fn new() -> Self {
        let sandbox = Sandbox::new();
        let file = sandbox.file("fleet.toml");
        fs::write(&file, FLEET).expect("a fleet file");
        Self { sandbox, file }
    }

    fn samepage(&self, args: &[&str]) -> Run {
        self.sandbox.samepage(["fleet"].iter().chain(args)).timeout(LIMIT)
    }

    fn up(&self) -> Run {
        self.samepage(&["up", self.file.to_str().expect("UTF-8")])
    }

    fn down(self) {
        let _ = self.samepage(&["down"]).output().success();
        self.sandbox.assert_clean_within(SOON);
    }

    fn processes(&self, subcommand: &str) -> Vec<Process> {
        let is = |p: &Process| p.args.split(' ').nth(1) == Some(subcommand);
        self.sandbox.processes().into_iter().filter(is).collect()
    }

    fn kill_daemon(&self) {
        self.processes("host").iter().for_each(Process::kill);
        eventually("the daemon is gone", || self.processes("host").is_empty());
    }

    fn com2(&self, n: usize) -> Client {
        Client::connect(&self.sandbox.runtime_dir().join(format!("fleets/slabs/vm-{n}.com2")))
    }

    /// Has a guest write all of its pages anew: nothing of it is shared any more. It is what the
    /// daemon has it filled with.
    fn fill(&self, n: usize) {
        let fill = format!("fill seed={} common=7 zero=10 common_pct=50 dup=20 unique=20", 1000 + n);
        let filled = self.com2(n).command(&fill);
        assert!(filled.starts_with("ok command=fill "), "{filled}");
    }

    #[track_caller]
    fn verify(&self, n: usize) {
        let verified = self.com2(n).command("verify");
        assert!(field(&verified, "checked") > 5000 && field(&verified, "mismatched") == 0, "{verified}");
    }

    /// Pages of slabs that a guest has, as its page table says.
    fn slab_pages(&self, n: usize) -> usize {
        let control = self.sandbox.runtime_dir().join(format!("fleets/slabs/vm-{n}.ctl"));
        let status = Client::connect(&control).ask(&json!({"op": "status"}))["status"].clone();
        let number = |of: &serde_json::Value| of.as_u64().expect("a number");
        let mut pagemap = Pagemap::open(number(&status["pid"]) as u32).expect("pagemap");
        let (mut entries, mut pages) = (Vec::new(), 0);
        for extent in status["extents"].as_array().expect("extents") {
            let count = number(&extent["bytes"]) as usize / 4096;
            pagemap.read(memory::Hva(number(&extent["hva"])), count, &mut entries).expect("entries");
            pages += entries.iter().filter(|entry| entry.present() && entry.file_or_shared()).count();
        }
        pages
    }

    #[track_caller]
    fn wait_until_merged(&self) {
        // 50 % are common and 20 % there several times, of more than 7000.
        eventually("all guests are merged", || (0..GUESTS).all(|n| self.slab_pages(n) > 4000));
    }

    /// The slabs that its processes map or hold.
    fn slabs(&self) -> BTreeSet<u64> {
        self.sandbox
            .processes()
            .iter()
            .flat_map(|p| slabs_of(Path::new(&format!("/proc/{}", p.pid))))
            .collect()
    }
}

/// The slabs that a process maps or holds, by inode; none if it is gone.
fn slabs_of(process: &Path) -> BTreeSet<u64> {
    let maps = fs::read_to_string(process.join("maps")).unwrap_or_default();
    // Address, protection, offset, device, inode, name.
    let inode = |line: &str| line.split_whitespace().nth(4)?.parse::<u64>().ok();
    let mapped = maps.lines().filter(|line| line.contains(SLAB)).filter_map(inode);
    let descriptors = fs::read_dir(process.join("fd")).into_iter().flatten().flatten();
    let is_slab = |path: &PathBuf| fs::read_link(path).is_ok_and(|to| to.to_string_lossy().starts_with(SLAB));
    let held = descriptors.map(|entry| entry.path()).filter(is_slab);
    mapped.chain(held.filter_map(|path| Some(fs::metadata(path).ok()?.ino()))).collect()
}

/// All processes of this machine that map or hold one of `slabs`.
fn users_of(slabs: &BTreeSet<u64>) -> Vec<PathBuf> {
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten().map(|entry| entry.path());
    processes.filter(|process| !slabs_of(process).is_disjoint(slabs)).collect()
}

#[test]
fn a_daemon_killed_at_any_moment_takes_nothing_with_it() {
    require_slabs!();
    let fleet = Fleet::new();
    let _ = fleet.up().output().success();
    // At rest, and at several moments while it merges what was filled just before.
    for millis in [None, Some(0), Some(60), Some(150), Some(400)] {
        fleet.wait_until_merged();
        if let Some(millis) = millis {
            (0..GUESTS).for_each(|n| fleet.fill(n));
            thread::sleep(Duration::from_millis(millis));
        }
        fleet.kill_daemon();
        (0..GUESTS).for_each(|n| fleet.verify(n));
        (0..GUESTS).for_each(|n| fleet.fill(n));
        let pids = |fleet: &Fleet| fleet.processes("run").iter().map(|p| p.pid).collect::<Vec<_>>();
        let before = pids(&fleet);
        let _ = fleet.up().output().success();
        assert_eq!(pids(&fleet), before, "the guests are taken over");
    }
    fleet.wait_until_merged();
    let _ = fleet.samepage(&["verify"]).output().success();
    fleet.down();
}

/// Also while it brings the fleet up: the next one takes over what there is.
#[test]
fn a_daemon_killed_while_the_fleet_comes_up_is_followed_by_the_next() {
    require_slabs!();
    for (millis, with_client) in [(0, false), (5, true), (30, false), (60, true), (100, false), (250, true)] {
        let fleet = Fleet::new();
        let up = fleet.up().start();
        eventually("there is a daemon", || !fleet.processes("host").is_empty());
        thread::sleep(Duration::from_millis(millis));
        if with_client {
            up.kill(Signal::KILL);
        }
        fleet.kill_daemon();
        let _ = up.wait();
        let again = fleet.up().output();
        assert_eq!(again.code, Some(0), "killed after {millis} ms: {again}");
        assert_eq!(fleet.processes("run").len(), GUESTS, "killed after {millis} ms");
        fleet.wait_until_merged();
        let _ = fleet.samepage(&["verify"]).output().success();
        fleet.down();
    }
}

/// A slab is memory until its last user goes.
#[test]
fn slabs_go_with_their_last_user() {
    require_slabs!();
    let fleet = Fleet::new();
    let _ = fleet.up().output().success();
    fleet.wait_until_merged();
    let slabs = fleet.slabs();
    assert!(slabs.len() > 1, "{slabs:?}");
    // A guest that is killed takes nothing from the others.
    let vms = fleet.processes("run");
    vms[0].kill();
    eventually("it is gone", || fleet.processes("run").len() == GUESTS - 1);
    (1..GUESTS).for_each(|n| fleet.verify(n));
    fleet.kill_daemon();
    vms[1].kill();
    eventually("it is gone", || fleet.processes("run").len() == 1);
    fleet.verify(2);
    let last = PathBuf::from(format!("/proc/{}", vms[2].pid));
    assert_eq!(users_of(&slabs), [last], "no other process has slabs of this fleet");
    vms[2].kill();
    eventually("no process has any", || users_of(&slabs).is_empty());
    fleet.down();
}
