//! Checkpoints: guests on the disk, and what goes on from there.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::thread;
use std::time::Duration;

use serde_json::Value;
use splitmix::SplitMix64;
use tests::require_slabs;
use tests::sandbox::Sandbox;
use tests::vm::{eventually, field};

use super::clones::Fleet;

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

fn count(value: &Value) -> u64 {
    value.as_u64().expect("a count")
}

/// Has a guest write, and waits until it has done. How many pages it says it wrote.
fn churn(fleet: &Fleet, guest: &str) -> u64 {
    let churned = fleet.com2(guest).command("churn class=all rate=100000 seconds=1");
    assert!(churned.starts_with("ok command=churn"), "{churned}");
    let mut before = 0;
    eventually("it has written", || {
        let now = field(&fleet.com2(guest).command("report"), "churned");
        let has_done = now > 3000 && now == before;
        before = now;
        has_done
    });
    before
}

/// Has a guest check its pages: by COM2, which its daemon has no more from then on.
fn verified(fleet: &Fleet, guest: &str) {
    let verified = fleet.com2(guest).command("verify");
    assert!(field(&verified, "checked") > 5000 && field(&verified, "mismatched") == 0, "{guest}: {verified}");
}

#[test]
fn a_guest_goes_on_from_the_disk_after_its_fleet_has_ended() {
    require_slabs!();
    let fleet = Fleet::up(FLEET);
    let churned = churn(&fleet, "web");
    let saved = fleet.ok(&["snapshot", "web", "warm", "--disk", "--json"]).json();
    assert_eq!((&saved["where"], &saved["guest"]), (&"disk".into(), &"web".into()));
    assert!(count(&saved["saved"]["new_pages"]) > 4000, "{saved}");
    // What it does afterwards the checkpoint does not know of, nor what is in memory.
    churn(&fleet, "web");
    let list = fleet.ok(&["snapshot", "list", "--json"]).json();
    assert_eq!(list.as_array().map(Vec::len), Some(1), "{list}");
    assert!(count(&list[0]["size"]["own_bytes"]) > 1 << 20, "{list}");
    let _ = fleet.ok(&["fleet", "down"]);
    assert!(fleet.ok(&["snapshot", "verify"]).stdout.contains("1 checkpoints, "));
    // Another daemon, and a guest of the same name that has booted.
    fleet.come_up();
    let restored = fleet.ok(&["restore", "warm", "--count", "3", "--as", "w", "--json"]).json();
    assert_eq!(restored["guests"], serde_json::json!(["w-0", "w-1", "w-2"]));
    for guest in ["w-0", "w-1", "w-2"] {
        assert_eq!(field(&fleet.com2(guest).command("report"), "churned"), churned, "{guest}");
        verified(&fleet, guest);
    }
    let generations: BTreeSet<u64> = fleet.guests().iter().filter_map(|g| g["generation"].as_u64()).collect();
    assert_eq!(generations.len(), 3, "each has said another one");
    // They have the same slabs, and so has one that is restored later.
    let _ = fleet.ok(&["restore", "warm", "--as", "later"]);
    assert!(fleet.slabs("w-0").is_subset(&fleet.slabs("later-0")), "it has slabs of its own");
    fleet.assert_audit();
    // A checkpoint of one that was restored refers to what is there.
    let second = fleet.ok(&["snapshot", "w-0", "second", "--disk", "--json"]).json();
    assert!(count(&second["saved"]["known_pages"]) > 4000, "{second}");
    assert!(count(&second["saved"]["new_pages"]) < 500, "{second}");
    let _ = fleet.ok(&["snapshot", "rm", "warm"]);
    let collected = fleet.ok(&["snapshot", "gc", "--json"]).json();
    assert!(collected[0]["removed_packs"].is_u64(), "{collected}");
    let _ = fleet.ok(&["restore", "second", "--as", "s"]);
    verified(&fleet, "s-0");
    fleet.down();
}

#[test]
fn a_fleet_that_is_saved_goes_on_where_it_was() {
    require_slabs!();
    let fleet = Fleet::up(&format!(
        "{FLEET}[[guest]]\nname = \"other\"\nmemory = \"32M\"\nfill = {{ common = 50, unique = 50 }}\n"
    ));
    let _ = fleet.ok(&["clone", "web", "--count", "2", "--as", "w"]);
    let churned = [churn(&fleet, "web"), churn(&fleet, "w-1")];
    let before = fleet.names();
    let _ = fleet.ok(&["fleet", "down", "--save"]);
    assert!(fleet.sandbox.processes().is_empty());
    let list = fleet.ok(&["snapshot", "list", "--json"]).json();
    assert_eq!(list.as_array().map(Vec::len), Some(4), "{list}");
    assert!(list.as_array().expect("a list").iter().all(|one| one["suspended"] == "clones"), "{list}");
    fleet.come_up();
    assert_eq!(fleet.names(), before);
    for (guest, churned) in ["web", "w-1"].iter().zip(churned) {
        assert_eq!(field(&fleet.com2(guest).command("report"), "churned"), churned, "{guest} began anew");
    }
    before.iter().for_each(|guest| verified(&fleet, guest));
    // It has gone on: there is nothing to go on from any more.
    assert_eq!(fleet.ok(&["snapshot", "list"]).stdout, "no snapshots\n");
    // Once more, and the file says otherwise.
    let _ = fleet.ok(&["fleet", "down", "--save"]);
    let file = fleet.sandbox.file("fleet.toml");
    let text = fs::read_to_string(&file).expect("a fleet file");
    fs::write(&file, text.replacen("32M", "64M", 1)).expect("a fleet file");
    fleet.refused(&["fleet", "up", file.to_str().expect("UTF-8")], 1, "it runs with 32M, the file says 64M");
    fs::write(&file, text).expect("a fleet file");
    fleet.come_up();
    assert_eq!(fleet.names(), before);
    fleet.verify();
    fleet.down();
}

#[test]
fn a_guest_that_cannot_be_saved_keeps_its_fleet_up() {
    require_slabs!();
    let disk = "[[guest]]\nname = \"disk\"\nmemory = \"16M\"\ndrives = [{ path = \"disk.img\" }]\n";
    let fleet = Fleet::prepared(&format!("{FLEET}{disk}"), |sandbox| {
        fs::write(sandbox.file("disk.img"), vec![0; 1 << 20]).expect("a disk");
    });
    fleet.refused(&["fleet", "down", "--save"], 1, "it has a drive that it may write");
    assert!(fleet.guests().iter().all(|guest| guest["state"] == "running"), "they run on");
    assert_eq!(fleet.ok(&["snapshot", "list"]).stdout, "no snapshots\n", "nothing is left over");
    fleet.verify();
    fleet.down();
}

#[test]
fn a_file_that_is_a_guests_memory_is_to_be_the_one_that_it_was() {
    require_slabs!();
    let files = Sandbox::new();
    let file = files.file("base.img");
    fs::write(&file, vec![7; 1 << 20]).expect("a file");
    let pmem = format!("name = \"web\"\npmem = [{{ path = {file:?}, read_only = true }}]");
    let fleet = Fleet::up(&FLEET.replace("name = \"web\"", &pmem));
    let _ = fleet.ok(&["snapshot", "web", "warm", "--disk"]);
    let _ = fleet.ok(&["restore", "warm", "--as", "r"]);
    verified(&fleet, "r-0");
    fs::write(&file, vec![7; 2 << 20]).expect("a longer file");
    fleet.refused(&["restore", "warm", "--as", "s"], 1, "of 1048576 bytes, and is");
    fleet.down();
}

#[test]
fn checkpoints_move_to_another_store() {
    require_slabs!();
    let fleet = Fleet::up(FLEET);
    let _ = fleet.ok(&["snapshot", "web", "warm", "--disk"]);
    let churned = churn(&fleet, "web");
    let _ = fleet.ok(&["snapshot", "web", "later", "--disk"]);
    let _ = fleet.ok(&["fleet", "down"]);
    let there = fleet.sandbox.file("there");
    let there = there.to_str().expect("UTF-8");
    let program = tests::samepage();
    let receive = ["--", program.to_str().expect("UTF-8"), "receive", "--store", there];
    let said = fleet.ok(&[&["send", "warm"][..], &receive].concat()).stderr;
    let sent =
        |said: &str| -> Vec<u64> { said.split_whitespace().filter_map(|word| word.parse().ok()).collect() };
    let [pages, all] = sent(&said)[..] else { panic!("{said}") };
    assert_eq!(pages, all);
    let said = fleet.ok(&[&["send", "later"][..], &receive].concat()).stderr;
    let [pages, later] = sent(&said)[..] else { panic!("{said}") };
    assert!(pages < later, "{said}");
    fleet.refused(&[&["send", "later"][..], &receive].concat(), 1, "did not take it");
    // Through a pipe that only goes one way: by its name, or by another.
    let aside = fleet.sandbox.file("aside");
    let pipe = |how: &str| {
        let script = format!(
            "set -o pipefail; \"$SAMEPAGE\" send later | \"$SAMEPAGE\" receive --store {} {how}",
            aside.display()
        );
        fleet.sandbox.shell(&script).output().success().stdout
    };
    assert!(pipe("").starts_with("later: in the store"));
    assert!(pipe("--as other").starts_with("other: in the store"));
    // Through a file.
    let file = fleet.sandbox.file("later.checkpoint");
    let file = file.to_str().expect("UTF-8");
    let _ = fleet.ok(&["snapshot", "export", "later", file]);
    fleet.refused(&["snapshot", "export", "later", file], 1, "must not be there yet");
    let imported =
        fleet.ok(&["snapshot", "import", file, "--store", there, "--as", "again", "--json"]).json();
    assert_eq!(imported["new_pages"], 0, "{imported}");
    fleet.refused(
        &["snapshot", "import", file, "--store", there, "--as", "again"],
        1,
        "there is a checkpoint called",
    );
    assert!(fleet.ok(&["snapshot", "verify", "--store", there]).stdout.contains("3 checkpoints"));
    fleet.come_up();
    for (name, prefix) in [("warm", "a"), ("later", "b"), ("again", "c")] {
        let _ = fleet.ok(&["restore", name, "--as", prefix, "--store", there]);
        verified(&fleet, &format!("{prefix}-0"));
    }
    assert_eq!(field(&fleet.com2("c-0").command("report"), "churned"), churned);
    fleet.down();
}

#[test]
fn what_cannot_be_restored_is_refused_by_name() {
    require_slabs!();
    let fleet = Fleet::up(FLEET);
    let _ = fleet.ok(&["snapshot", "web", "warm", "--disk"]);
    let long = "x".repeat(81);
    for (args, status, said) in [
        (&["restore", "cold"][..], 1, "there is no checkpoint \"cold\"; there is: warm"),
        (&["restore", "a/b"], 1, "is no name of a checkpoint"),
        (&["restore", &long], 1, "is no name of a checkpoint"),
        (&["restore", "warm", "--domain", "others"], 1, "there is no checkpoint \"warm\"; there is: none"),
        (&["restore", "warm", "--count", "0"], 2, "0 is not in 1..=1024"),
        (&["restore", "warm", "--count", "1024"], 1, "1024 clones are not possible: expected 1 to 1023"),
        (&["restore", "warm", "--as", "a/b"], 1, "is no name"),
        (&["snapshot", "web", "warm", "--disk"], 1, "there is a checkpoint called \"warm\""),
        (&["snapshot", "nobody", "x", "--disk"], 1, "has no guest"),
        (&["snapshot", "web", "x", "--compress", "zstd"], 2, "--disk"),
        (&["snapshot", "web", "x", "--disk", "--compress", "gzip"], 2, "lz4, zstd"),
    ] {
        fleet.refused(args, status, said);
    }
    // Damage is told, and which checkpoint needs what is damaged.
    let packs = fleet.sandbox.store_dir().join("clones/packs");
    let pack = fs::read_dir(&packs)
        .expect("packs")
        .flatten()
        .find(|file| file.path().extension().is_some_and(|end| end == "pack"));
    let pack = pack.expect("a pack").path();
    let mut bytes = fs::read(&pack).expect("a pack");
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&pack, &bytes).expect("a pack");
    let damaged = fleet.run(&["snapshot", "verify", "--json"]).output();
    assert_eq!(damaged.code, Some(1), "{damaged}");
    assert_eq!(damaged.json()[0]["damage"][0]["checkpoints"], serde_json::json!(["warm"]));
    fleet.refused(&["restore", "warm"], 1, "the digest of a frame of pages does not fit");
    bytes[middle] ^= 1;
    fs::write(&pack, &bytes).expect("a pack");
    // A directory that others can write to is not believed.
    let store = fleet.sandbox.store_dir().join("clones");
    fs::set_permissions(&store, PermissionsExt::from_mode(0o777)).expect("a mode");
    fleet.refused(&["restore", "warm"], 1, "its mode is 777");
    fs::set_permissions(&store, PermissionsExt::from_mode(0o700)).expect("a mode");
    assert_eq!(fleet.names(), ["web"]);
    let _ = fleet.ok(&["restore", "warm", "--as", "r"]);
    verified(&fleet, "r-0");
    fleet.down();
}

/// When is up to dice, which fall the same each time; what has been done by then is not.
#[test]
fn a_daemon_that_is_killed_while_it_saves_or_reads_tears_nothing() {
    require_slabs!();
    let fleet = Fleet::up(FLEET);
    let _ = fleet.ok(&["snapshot", "web", "first", "--disk"]);
    let mut dice = SplitMix64::new(5);
    for round in 0..6 {
        churn(&fleet, "web");
        let name = format!("c{round}");
        let args = if round % 2 == 0 {
            vec!["snapshot", "web", &name, "--disk"]
        } else {
            vec!["restore", "first", "--as", &name]
        };
        let client = fleet.run(&args).start();
        thread::sleep(Duration::from_micros(dice.draw() % 150_000));
        fleet.kill_daemon();
        let _ = client.wait();
        fleet.come_up();
        let verify = fleet.ok(&["snapshot", "verify", "--json"]).json();
        assert_eq!(verify[0]["damage"], serde_json::json!([]), "{verify}");
        assert!(fleet.guests().iter().any(|guest| guest["name"] == "web" && guest["state"] == "running"));
    }
    let _ = fleet.ok(&["snapshot", "gc"]);
    let list = fleet.ok(&["snapshot", "list", "--json"]).json();
    for (n, one) in list.as_array().expect("a list").iter().enumerate() {
        let _ = fleet.ok(&["restore", one["name"].as_str().expect("a name"), "--as", &format!("r{n}")]);
        verified(&fleet, &format!("r{n}-0"));
    }
    fleet.down();
}
