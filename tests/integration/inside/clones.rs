//! Clones of a Debian guest: each goes on, with numbers and a time of its own, and is a guest as
//! others are.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;

use tests::lab::image_dir;
use tests::vm::{Client, field};

use super::super::clones::Fleet;

/// Pages that each clone has in common with the others, after it went on.
const COMMON: u64 = 4000;
const RESEEDED: &str = "crng reseeded due to virtual machine fork";
/// Where VMClock counts the copies, in guest-physical memory.
const DISRUPTION_MARKER: u64 = 0xe_f000 + 16;

/// A fleet of one Debian guest, called `deb`.
fn debian(cpus: u8) -> Fleet {
    debian_with(cpus, "")
}

/// The same, with more keys.
fn debian_with(cpus: u8, keys: &str) -> Fleet {
    let image = image_dir();
    Fleet::up(&format!(
        r#"
name = "clones"
engine = "slab"
[overcommit]
admission = "off"
policy = false
[[guest]]
name = "deb"
memory = "192M"
cpus = {cpus}
{keys}
kernel = "{image}/vmlinux"
initrd = "{image}/initrd.cpio"
cmdline = "console=ttyS0 loglevel=6 panic=-1"
fill = {{ zero = 10, common = 40, duplicate = 10, unique = 40 }}
"#,
        image = image.display()
    ))
}

/// What the kernel of a guest has said on its console since its VM runs, or since it booted: booting, it
/// does not like what the lab's processor says of its registers.
fn console(fleet: &Fleet, name: &str) -> String {
    let path = fleet.sandbox.runtime_dir().join(format!("fleets/clones/{name}.log"));
    let text = fs::read_to_string(path).expect("its console");
    let text = text.rsplit("samepage agent: init").next().expect("a last part").to_owned();
    for trouble in ["soft lockup", "rcu: INFO", "Call Trace", "BUG:", "WARNING:", "as unstable"] {
        assert!(!text.contains(trouble), "{trouble} in the log of {name}:\n{text}");
    }
    text
}

/// How often a guest's kernel has begun anew with its random numbers.
fn reseeded(fleet: &Fleet, name: &str) -> usize {
    console(fleet, name).matches(RESEEDED).count()
}

/// How often a guest was told that it is a copy, it and those that it is a copy of.
fn disruptions(fleet: &Fleet, name: &str) -> u64 {
    let control = fleet.sandbox.runtime_dir().join(format!("fleets/clones/{name}.ctl"));
    let status = Client::connect(&control).ask(&serde_json::json!({"op": "status"}))["status"].clone();
    let memory = File::open(format!("/proc/{}/mem", status["pid"])).expect("the VM's memory");
    let start = status["extents"][0]["hva"].as_u64().expect("an address");
    let mut word = [0; 8];
    memory.read_exact_at(&mut word, start + DISRUPTION_MARKER).expect("guest memory");
    u64::from_le_bytes(word)
}

/// Clones `deb`. Each says a generation of its own.
fn cloned(fleet: &Fleet, count: usize) -> Vec<String> {
    let made = fleet.ok(&["clone", "deb", "--count", &count.to_string(), "--json"]).json();
    let names: Vec<String> = serde_json::from_value(made["guests"].clone()).expect("names");
    assert_eq!(names.len(), count);
    let generations: BTreeSet<u64> = fleet.guests().iter().filter_map(|g| g["generation"].as_u64()).collect();
    assert_eq!(generations.len(), count, "each clone has said another one: {:?}", fleet.guests());
    names
}

/// Each draws another random number, its timers fire, and no processor's clock is behind another's.
fn have_numbers_and_time_of_their_own(fleet: &Fleet, names: &[String], cpus: u64) {
    let mut drawn = BTreeSet::new();
    for name in names {
        let mut com2 = fleet.com2(name);
        assert!(drawn.insert(field(&com2.command("random"), "number")), "{name} draws what another one drew");
        let clock = com2.command("clock millis=1000");
        assert!(field(&clock, "slept_us") >= 1_000_000, "{name}: {clock}");
        assert_eq!((field(&clock, "cpus"), field(&clock, "backward")), (cpus, 0), "{name}: {clock}");
        assert!(field(&clock, "readings") >= 200 * cpus, "{name}: {clock}");
    }
}

#[test]
fn ten_clones_of_a_debian_guest_go_on_and_balloon_and_merge() {
    let fleet = debian(1);
    let names = cloned(&fleet, 10);
    fleet.verify();
    for name in &names {
        let _ = fleet.ok(&["balloon", "set", name, "48M", "--wait"]);
        let _ = fleet.ok(&["balloon", "set", name, "0", "--wait"]);
    }
    // From here on COM2 is the test's: it takes one client at a time.
    let all: Vec<String> = std::iter::once("deb".to_owned()).chain(names.iter().cloned()).collect();
    have_numbers_and_time_of_their_own(&fleet, &all, 1);
    // What they write now they have in common, and shall have but once.
    for (seed, name) in all.iter().enumerate() {
        let fill = format!(
            "fill seed={} common=77 zero=0 common_pct=100 dup=0 unique=0 pages={COMMON}",
            1000 + seed
        );
        assert_eq!(fleet.com2(name).command(&fill), format!("ok command=fill pages={COMMON}"));
    }
    let status = fleet.status(&["--settle"]);
    for guest in status["guests"].as_array().expect("guests").iter().skip(1) {
        let own = guest["pages"]["private"].as_u64().expect("pages");
        assert!(own < COMMON / 2, "{own} pages of {} are its own: {status:#}", guest["name"]);
    }
    fleet.assert_audit();
    for name in &all {
        let verified = fleet.com2(name).command("verify");
        assert_eq!(verified, format!("ok command=verify checked={COMMON} mismatched=0 first=none"), "{name}");
    }
    assert_eq!((reseeded(&fleet, "deb"), disruptions(&fleet, "deb")), (0, 0));
    for name in &names {
        assert_eq!((reseeded(&fleet, name), disruptions(&fleet, name)), (1, 1), "{name}");
    }
    // A copy of a copy.
    let _ = fleet.ok(&["clone", "deb-0"]);
    assert_eq!((reseeded(&fleet, "deb-0-0"), disruptions(&fleet, "deb-0-0")), (1, 2));
    fleet.down();
}

#[test]
fn clones_of_a_debian_guest_with_two_processors_keep_their_clocks_together() {
    let fleet = debian(2);
    let names = cloned(&fleet, 4);
    fleet.verify();
    have_numbers_and_time_of_their_own(&fleet, &names, 2);
    for name in &names {
        assert_eq!(reseeded(&fleet, name), 1, "{name}");
    }
    fleet.down();
}

/// Its driver read the address of the guest that it is a copy of; it has its own when it is asked for anything.
#[test]
fn clones_of_a_debian_guest_have_addresses_of_their_own() {
    let fleet = debian_with(1, "net = [{ tap = \"auto\" }]");
    let names = cloned(&fleet, 3);
    fleet.verify();
    // From here on COM2 is the test's.
    let all: Vec<String> = std::iter::once("deb".to_owned()).chain(names).collect();
    let mut addresses = BTreeSet::new();
    for name in &all {
        let path = fleet.sandbox.runtime_dir().join(format!("fleets/clones/{name}.json"));
        let saved: serde_json::Value =
            serde_json::from_slice(&fs::read(path).expect("what it was started with")).expect("JSON");
        let own = saved["started"]["guest"]["vm"]["net"][0]["mac"].as_str().expect("an address").to_owned();
        let has = fleet.com2(name).command(&format!("mac was={own} is={own}"));
        assert_eq!(has, "ok command=mac interfaces=1", "{name} is not {own}");
        assert!(addresses.insert(own), "{name} has the address of another one");
    }
    // A copy of a copy.
    let _ = fleet.ok(&["clone", &all[1], "--as", "again"]);
    for own in &addresses {
        let has = fleet.com2("again-0").command(&format!("mac was={own} is={own}"));
        assert_eq!(has, "ok command=mac interfaces=0", "again-0 is {own}");
    }
    fleet.down();
}

/// Its fleet ends and comes up again from the disk; then guests go on from a checkpoint beside it.
#[test]
fn a_debian_guest_with_two_processors_goes_on_from_the_disk() {
    let fleet = debian(2);
    let _ = fleet.ok(&["snapshot", "deb", "warm", "--disk", "--compress", "zstd"]);
    let _ = fleet.ok(&["fleet", "down", "--save"]);
    assert!(fleet.sandbox.processes().is_empty());
    fleet.come_up();
    assert_eq!(reseeded(&fleet, "deb"), 1, "it booted");
    fleet.verify();
    let restored = fleet.ok(&["restore", "warm", "--count", "3", "--as", "r", "--json"]).json();
    let mut names: Vec<String> = serde_json::from_value(restored["guests"].clone()).expect("names");
    fleet.verify();
    names.push("deb".into());
    have_numbers_and_time_of_their_own(&fleet, &names, 2);
    for name in &names {
        assert_eq!((reseeded(&fleet, name), disruptions(&fleet, name)), (1, 1), "{name}");
    }
    let second = fleet.ok(&["snapshot", "r-0", "second", "--disk", "--json"]).json();
    let pages = |key: &str| second["saved"][key].as_u64().expect("pages");
    assert!(pages("new_pages") < pages("known_pages") / 2, "{second}");
    fleet.assert_audit();
    fleet.down();
}
