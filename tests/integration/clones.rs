//! Guests that are captured, and guests that go on from there.

use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use serde_json::Value;
use tests::require_slabs;
use tests::run::{Outcome, Run};
use tests::sandbox::{Process, Sandbox};
use tests::vm::{Client, SOON, eventually, field};

const LIMIT: Duration = Duration::from_secs(240);
const FLEET: &str = r#"
name = "clones"
[overcommit]
admission = "off"
policy = false
[[guest]]
name = "web"
memory = "32M"
fill = { zero = 10, common = 40, duplicate = 10, unique = 40 }
"#;

/// A fleet called `clones`.
pub(super) struct Fleet {
    pub(super) sandbox: Sandbox,
    file: PathBuf,
}

impl Fleet {
    /// One that is up.
    pub(super) fn up(text: &str) -> Self {
        Self::prepared(text, |_| {})
    }

    /// The same, for which something is made before.
    pub(super) fn prepared(text: &str, prepare: impl FnOnce(&Sandbox)) -> Self {
        let sandbox = Sandbox::new();
        prepare(&sandbox);
        let file = sandbox.file("fleet.toml");
        fs::write(&file, text).expect("a fleet file");
        let fleet = Self { sandbox, file };
        fleet.come_up();
        fleet
    }

    pub(super) fn come_up(&self) {
        let _ = self.run(&["fleet", "up", self.file.to_str().expect("UTF-8")]).output().success();
    }

    pub(super) fn run(&self, args: &[&str]) -> Run {
        self.sandbox.samepage(args).timeout(LIMIT)
    }

    pub(super) fn ok(&self, args: &[&str]) -> Outcome {
        self.run(args).output().success()
    }

    #[track_caller]
    pub(super) fn refused(&self, args: &[&str], status: i32, said: &str) {
        let outcome = self.run(args).output();
        assert_eq!(outcome.code, Some(status), "{args:?}: {outcome}");
        assert!(outcome.stderr.contains(said), "{args:?}: {outcome}");
    }

    pub(super) fn down(self) {
        let _ = self.ok(&["fleet", "down"]);
        self.sandbox.assert_clean_within(SOON);
    }

    pub(super) fn status(&self, args: &[&str]) -> Value {
        self.ok(&[&["fleet", "status", "--json"], args].concat()).json()
    }

    pub(super) fn guests(&self) -> Vec<Value> {
        self.status(&[])["guests"].as_array().expect("guests").clone()
    }

    pub(super) fn names(&self) -> Vec<String> {
        self.guests().iter().map(|guest| guest["name"].as_str().expect("a name").to_owned()).collect()
    }

    #[track_caller]
    pub(super) fn verify(&self) {
        eventually("all guests have answered in time to be verified", || {
            let verified = self.ok(&["fleet", "verify", "--json"]).json();
            assert_eq!(verified["mismatched_pages"], 0, "{verified}");
            let skipped = verified["skipped"].as_array().expect("skipped");
            assert!(!skipped.is_empty() || verified["verified_pages"].as_u64() > Some(5000), "{verified}");
            skipped.is_empty()
        });
    }

    pub(super) fn vm(&self, name: &str) -> Process {
        let mark = format!(" --name {name} ");
        let found = self.sandbox.processes().into_iter().find(|process| process.args.contains(&mark));
        found.expect("its process")
    }

    /// Audits until nothing moved meanwhile. A guest that ran would fault between two ways of counting, all the more on a slow host: so all are
    /// paused for that time.
    #[track_caller]
    pub(super) fn assert_audit(&self) {
        let running: Vec<String> = (self.guests().iter())
            .filter(|guest| guest["state"] == "running")
            .map(|guest| guest["name"].as_str().expect("a name").to_owned())
            .collect();
        let have_all = |op: &str| {
            for name in &running {
                let mut control =
                    Client::connect(&self.sandbox.runtime_dir().join(format!("fleets/clones/{name}.ctl")));
                assert_eq!(control.ask(&serde_json::json!({ "op": op })), "done", "{op} {name}");
            }
        };
        have_all("pause");
        eventually("nothing moves during an audit", || {
            let audit = self.status(&["--audit"])["audit"].clone();
            let still = audit["still"] == true;
            assert!(!still || audit["residue_pages"] == 0, "{audit:#}");
            still
        });
        have_all("resume");
    }

    pub(super) fn kill_daemon(&self) {
        let daemon =
            || self.sandbox.processes().into_iter().find(|p| p.args.split(' ').nth(1) == Some("host"));
        daemon().expect("a daemon").kill();
        eventually("the daemon is gone", || daemon().is_none());
    }

    pub(super) fn com2(&self, name: &str) -> Client {
        Client::connect(&self.sandbox.runtime_dir().join(format!("fleets/clones/{name}.com2")))
    }

    /// The files of slabs that a guest maps.
    pub(super) fn slabs(&self, name: &str) -> BTreeSet<u64> {
        let maps = fs::read_to_string(format!("/proc/{}/maps", self.vm(name).pid)).expect("its maps");
        let inode = |line: &str| line.split_whitespace().nth(4)?.parse().ok();
        maps.lines().filter(|line| line.contains("/memfd:samepage-slab")).filter_map(inode).collect()
    }
}

#[test]
fn clones_go_on_and_are_guests_as_others_are() {
    require_slabs!();
    let fleet = Fleet::up(FLEET);
    let cloned = fleet.ok(&["clone", "web", "--count", "5", "--as", "w", "--json"]).json();
    assert_eq!(cloned["guests"], serde_json::json!(["w-0", "w-1", "w-2", "w-3", "w-4"]));
    assert_eq!(fleet.names(), ["web", "w-0", "w-1", "w-2", "w-3", "w-4"]);
    let generations: BTreeSet<u64> = fleet.guests().iter().filter_map(|g| g["generation"].as_u64()).collect();
    assert_eq!(generations.len(), 5, "each clone has said another one");
    assert!(fleet.guests().iter().skip(1).all(|guest| guest["clone_of"] == "web"));
    fleet.verify();
    // From here on COM2 is the test's: it takes one client at a time.
    let mut com2: Vec<Client> = (0..4).map(|n| fleet.com2(&format!("w-{n}"))).collect();
    // Each writes, and no other sees it.
    for com2 in &mut com2[..3] {
        let churned = com2.command("churn class=all rate=100000 seconds=1");
        assert!(churned.starts_with("ok command=churn"), "{churned}");
    }
    eventually("they have written", || {
        com2[..3].iter_mut().all(|com2| field(&com2.command("report"), "churned") > 3000)
    });
    // What it gives it has no more, whether that was the image's or its own.
    let freed = com2[3].command("free percent=50");
    assert!(field(&freed, "freed") > 3000, "{freed}");
    let _ = fleet.ok(&["balloon", "set", "w-3", "8M", "--wait"]);
    let _ = fleet.ok(&["balloon", "set", "w-3", "0", "--wait"]);
    fleet.vm("w-4").kill();
    eventually("one has ended", || fleet.guests().iter().any(|guest| guest["state"] == "dead"));
    // A clone of one that has written, while it may still write.
    let _ = fleet.ok(&["clone", "w-0", "--count", "2"]);
    assert_eq!(fleet.names()[6..], ["w-0-0", "w-0-1"]);
    com2.push(fleet.com2("w-0-1"));
    for (n, com2) in com2.iter_mut().enumerate() {
        let verified = com2.command("verify");
        let right = field(&verified, "checked") > 3000 && field(&verified, "mismatched") == 0;
        assert!(right, "{n}: {verified}");
    }
    fleet.assert_audit();
    fleet.down();
}

/// More is written while it is captured than copies made before are worth: then it is copied once more, and no more of it is kept.
#[test]
fn a_guest_that_writes_all_the_time_is_captured() {
    require_slabs!();
    let full = FLEET
        .replace("32M", "256M")
        .replace("zero = 10, common = 40, duplicate = 10, unique = 40", "unique = 100");
    let fleet = Fleet::up(&full);
    let churned = fleet.com2("web").command("churn class=all rate=100000000 seconds=600");
    assert!(churned.starts_with("ok command=churn"), "{churned}");
    for name in ["a", "b"] {
        let taken = fleet.ok(&["snapshot", "web", name, "--json"]).json();
        assert!(taken["captured"]["copied_pages"].as_u64() > Some(50_000), "{taken}");
        // A slab of merging's is kept whole for a quarter of its pages.
        let referenced = taken["captured"]["referenced_pages"].as_u64().expect("a count");
        let most = ((256 + 8) << 20) + 3 * 4096 * referenced;
        assert!(taken["slab_bytes"].as_u64() <= Some(most), "{taken}");
    }
    let _ = fleet.ok(&["clone", "b", "--count", "1"]);
    // Both write on; by COM2, which the daemon has no more.
    for name in ["web", "b-0"] {
        let verified = fleet.com2(name).command("verify");
        let right = field(&verified, "checked") > 50_000 && field(&verified, "mismatched") == 0;
        assert!(right, "{name}: {verified}");
    }
    fleet.down();
}

#[test]
fn guests_of_a_fleet_file_go_on_from_one_of_it() {
    require_slabs!();
    let fleet = Fleet::up(&format!("{FLEET}[[guest]]\nname = \"c\"\ncount = 3\nfrom = \"web\"\n"));
    assert_eq!(fleet.names(), ["web", "c-0", "c-1", "c-2"]);
    assert!(fleet.guests()[1..].iter().all(|guest| guest["clone_of"] == "web"));
    fleet.verify();
    // One that has ended goes on, under the next daemon, from where the guest is then.
    fleet.vm("c-1").kill();
    fleet.kill_daemon();
    fleet.come_up();
    assert_eq!(fleet.names(), ["web", "c-0", "c-1", "c-2"]);
    fleet.verify();
    fleet.down();
}

/// What was copied is a guest's own no longer: it is merged with the image. The next capture refers to it, and copies next to nothing.
#[test]
fn a_snapshot_is_shared_with_its_guest() {
    require_slabs!();
    let fleet = Fleet::up(FLEET);
    let taken = fleet.ok(&["snapshot", "web", "warm", "--json"]).json();
    assert!(taken["captured"]["copied_pages"].as_u64() > Some(5000), "{taken}");
    // What is left are bridged gaps, and what the guest wrote meanwhile.
    eventually("the guest has merged with its image", || {
        fleet.status(&[])["ledger"]["overhead"]["held_by_images"].as_u64() < Some(1000)
    });
    let again = fleet.ok(&["snapshot", "web", "again", "--json"]).json();
    let pages = |key: &str| again["captured"][key].as_u64();
    assert!(pages("copied_pages") < Some(500) && pages("referenced_pages") > Some(5000), "{again}");
    let _ = fleet.ok(&["clone", "again", "--count", "2"]);
    fleet.assert_audit();
    fleet.verify();
    // What no image has is merging's again, and what is used of it stays.
    for name in ["warm", "again"] {
        let _ = fleet.ok(&["snapshot", "rm", name]);
    }
    fleet.verify();
    fleet.assert_audit();
    fleet.down();
}

#[test]
fn the_first_random_numbers_of_a_hundred_clones_differ() {
    require_slabs!();
    let fleet = Fleet::up(&FLEET.replace("32M", "16M"));
    let _ = fleet.ok(&["clone", "web", "--count", "100", "--as", "w"]);
    let generations: BTreeSet<u64> = fleet.guests().iter().filter_map(|g| g["generation"].as_u64()).collect();
    assert_eq!(generations.len(), 100, "each clone has said another one");
    let names = fleet.names();
    let draw = |name: &String| field(&fleet.com2(name).command("random"), "number");
    let drawn: BTreeSet<u64> = names.iter().map(draw).collect();
    assert_eq!(drawn.len(), 101, "two guests drew the same number");
    fleet.down();
}

#[test]
fn snapshots_are_kept_listed_cloned_and_removed() {
    require_slabs!();
    let fleet = Fleet::up(FLEET);
    let taken = fleet.ok(&["snapshot", "web", "warm", "--json"]).json();
    assert!(taken["captured"]["copied_pages"].as_u64() > Some(5000), "{taken}");
    assert!(taken["slab_bytes"].as_u64() <= Some(32 << 20), "{taken}");
    // What it does afterwards the snapshot does not know of.
    let filled = fleet.com2("web").command("fill seed=1000 common=7 zero=100 common_pct=0 dup=0 unique=0");
    assert!(filled.starts_with("ok command=fill"), "{filled}");
    let _ = fleet.ok(&["clone", "warm", "--count", "2"]);
    let verified = fleet.com2("warm-0").command("verify");
    assert!(field(&verified, "checked") > 5000 && field(&verified, "mismatched") == 0, "{verified}");
    let list = fleet.ok(&["snapshot", "list", "--json"]).json();
    assert_eq!((&list[0]["name"], &list[0]["clones"]), (&"warm".into(), &2.into()));
    assert!(fleet.ok(&["snapshot", "info", "warm"]).stdout.contains("warm: guest web, domain clones"));
    // A copy of a copy has the pages of the first one's slabs.
    let second = fleet.ok(&["snapshot", "warm-0", "second", "--json"]).json();
    let pages = |key: &str| second["captured"][key].as_u64().expect("pages");
    assert!(pages("referenced_pages") > 5000 && pages("copied_pages") < 500, "{second}");
    for snapshot in ["warm", "second"] {
        let _ = fleet.ok(&["snapshot", "rm", snapshot]);
    }
    assert!(fleet.ok(&["snapshot", "list"]).stdout.contains("no snapshots"));
    // Clones live on without it, and can be cloned.
    let third = fleet.ok(&["clone", "warm-1", "--json"]).json();
    assert!(third["image"]["captured"]["referenced_pages"].as_u64() > Some(5000), "{third}");
    let verified = fleet.com2("warm-1-0").command("verify");
    assert!(field(&verified, "mismatched") == 0, "{verified}");
    fleet.down();
}

#[test]
fn what_cannot_be_is_refused_and_leaves_nothing() {
    require_slabs!();
    let disk = "\n[[guest]]\nname = \"disk\"\nmemory = \"16M\"\ndrives = [{ path = \"disk.img\" }]\n";
    let sandbox = Sandbox::new();
    let file = sandbox.file("fleet.toml");
    fs::write(sandbox.file("disk.img"), vec![0; 1 << 20]).expect("a disk");
    fs::write(&file, format!("{FLEET}{disk}")).expect("a fleet file");
    let fleet = Fleet { sandbox, file };
    fleet.come_up();
    let _ = fleet.ok(&["snapshot", "web", "warm"]);
    let before = fleet.sandbox.processes().len();
    for (args, status, said) in [
        (&["clone", "web", "--count", "0"][..], 2, "0 is not in 1..=1024"),
        (&["clone", "web", "--count", "1000000"], 2, "1000000 is not in 1..=1024"),
        (&["clone", "web", "--count", "1023"], 1, "1023 clones are not possible: expected 1 to 1022"),
        (&["clone", "nobody"], 1, "has no guest \"nobody\"; it has: web, disk"),
        (&["clone", "web", "--as", "a/b"], 1, "is no name"),
        (&["clone", "web", "--as", "x".repeat(31).as_str()], 1, "is no name"),
        (&["snapshot", "web", "a/b"], 1, "is no name"),
        (&["snapshot", "web", ""], 1, "is no name"),
        (&["snapshot", "web", "warm"], 1, "there is a snapshot called"),
        (&["snapshot", "web", "disk"], 1, "there is a guest called"),
        (&["snapshot", "nobody", "x"], 1, "has no guest"),
        (&["snapshot", "disk", "x"], 1, "it has a drive that it may write"),
        (&["clone", "disk"], 1, "it has a drive that it may write"),
        (&["snapshot", "rm", "x"], 1, "has no snapshot \"x\"; it has: warm"),
        (&["snapshot", "info", "x"], 1, "there is: warm"),
        (&["snapshot", "web"], 2, "required"),
    ] {
        fleet.refused(args, status, said);
    }
    assert_eq!(fleet.sandbox.processes().len(), before);
    assert_eq!(fleet.names(), ["web", "disk"]);
    assert!(fleet.guests().iter().all(|guest| guest["state"] == "running"));
    let files = fs::read_dir(fleet.sandbox.runtime_dir().join("fleets/clones")).expect("its directory");
    let names: Vec<_> =
        files.flatten().map(|entry| entry.file_name().into_string().expect("UTF-8")).collect();
    assert!(names.iter().all(|name| !name.contains("-0") && !name.ends_with(".cap")), "{names:?}");
    fleet.verify();
    fleet.down();
}

/// What it wrote to an overlay goes with it; Linux guests do that in the lab. The image stays as it is, and nothing is left beside it.
#[test]
fn a_guest_with_an_overlay_is_cloned() {
    require_slabs!();
    let disk = "\n[[guest]]\nname = \"disk\"\nmemory = \"16M\"\ndrives = [{ path = \"disk.img\", overlay = true }, \
                { path = \"disk.img\", overlay = \"kept.disk\" }]\n";
    let sandbox = Sandbox::new();
    let (file, image) = (sandbox.file("fleet.toml"), sandbox.file("disk.img"));
    fs::write(&image, vec![7; 1 << 20]).expect("a disk");
    fs::write(&file, format!("pool = 2\n{FLEET}{disk}")).expect("a fleet file");
    let fleet = Fleet { sandbox, file };
    fleet.come_up();
    let _ = fleet.ok(&["snapshot", "disk", "warm"]);
    eventually("processes stand by", || fleet.status(&[])["pool"]["standing_by"] == 2);
    let _ = fleet.ok(&["clone", "warm", "--count", "3"]);
    let _ = fleet.ok(&["clone", "warm-1", "--as", "again"]);
    assert_eq!(fleet.names()[2..], ["warm-0", "warm-1", "warm-2", "again-0"]);
    let files = fs::read_dir(image.parent().expect("a directory")).expect("its files").count();
    assert_eq!(files, 3, "the fleet file, the image, and what is kept");
    // Another file at the image's place is none that the guest has seen.
    let moved = image.with_extension("moved");
    fs::rename(&image, &moved).expect("it is moved");
    fs::write(&image, vec![7; 1 << 20]).expect("another disk");
    fleet.refused(&["clone", "warm"], 1, "was written or replaced since the capture");
    fs::rename(&moved, &image).expect("it is moved back");
    let _ = fleet.ok(&["clone", "warm"]);
    fleet.verify();
    fleet.down();
}

/// A snapshot outlives its guest, and the guest's lock on its drive does not.
#[test]
fn a_clone_whose_drive_is_in_use_does_not_start() {
    require_slabs!();
    let disk = "\n[[guest]]\nname = \"disk\"\nmemory = \"16M\"\ndrives = [{ path = \"disk.img\", read_only = true }]\n";
    let sandbox = Sandbox::new();
    let (file, image) = (sandbox.file("fleet.toml"), sandbox.file("disk.img"));
    fs::write(&image, vec![0; 1 << 20]).expect("a disk");
    fs::write(&file, format!("{FLEET}{disk}")).expect("a fleet file");
    let fleet = Fleet { sandbox, file };
    fleet.come_up();
    let _ = fleet.ok(&["snapshot", "disk", "warm"]);
    fleet.vm("disk").kill();
    let image = fs::File::open(&image).expect("a disk");
    let locks = || rustix::fs::flock(&image, rustix::fs::FlockOperation::NonBlockingLockExclusive).is_ok();
    eventually("its VM is gone", locks);
    let before = fleet.sandbox.processes().len();
    fleet.refused(&["clone", "warm", "--count", "3"], 1, "disk.img");
    assert_eq!((fleet.names(), fleet.sandbox.processes().len()), (vec!["web".into(), "disk".into()], before));
    drop(image);
    let _ = fleet.ok(&["clone", "warm", "--count", "3"]);
    fleet.down();
}

#[test]
fn clones_come_in_all_or_none() {
    require_slabs!();
    let strict = "admission = \"strict\"\ncapacity = \"128M\"";
    let fleet = Fleet::up(&FLEET.replace("admission = \"off\"\npolicy = false", strict));
    fleet.refused(&["clone", "web", "--count", "20"], 1, "20 clones are not admitted, ");
    assert_eq!(fleet.names(), ["web"]);
    let _ = fleet.ok(&["clone", "web", "--count", "2"]);
    fleet.verify();
    fleet.down();
}

#[test]
fn a_later_daemon_takes_clones_over() {
    require_slabs!();
    let fleet = Fleet::up(FLEET);
    let _ = fleet.ok(&["clone", "web", "--count", "3"]);
    fleet.kill_daemon();
    let before: BTreeSet<i32> = fleet.sandbox.processes().iter().map(|p| p.pid).collect();
    fleet.come_up();
    assert_eq!(fleet.names().len(), 4);
    let after: BTreeSet<i32> = fleet.sandbox.processes().iter().map(|p| p.pid).collect();
    assert!(after.is_superset(&before), "no VM was started anew");
    fleet.verify();
    let _ = fleet.ok(&["clone", "web-1"]);
    fleet.verify();
    fleet.down();
}

#[test]
fn domains_share_no_slab() {
    require_slabs!();
    let other = "\n[[guest]]\nname = \"other\"\nmemory = \"32M\"\ndomain = \"else\"\nfill = { common = 60, duplicate = 40 }\n";
    let fleet = Fleet::up(&format!("{FLEET}{other}"));
    let _ = fleet.ok(&["clone", "web", "--count", "2"]);
    let _ = fleet.ok(&["clone", "other", "--count", "2"]);
    let of = |names: [&str; 3]| names.iter().flat_map(|name| fleet.slabs(name)).collect::<BTreeSet<_>>();
    let (one, two) = (of(["web", "web-0", "web-1"]), of(["other", "other-0", "other-1"]));
    assert!(!one.is_empty() && !two.is_empty());
    assert!(one.is_disjoint(&two));
    fleet.verify();
    fleet.down();
}
