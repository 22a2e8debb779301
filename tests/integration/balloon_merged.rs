//! A balloon in a guest whose pages are merged with others': frame by frame, what leaves and what
//! stays.
//!
//! Counted here from the kernel's own files and not by Samepage, which is what is tested.

use std::collections::HashMap;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::{Value, json};
use tests::require_ksm;
use tests::sandbox::Sandbox;
use tests::vm::{Client, SOON, field};

const LIMIT: Duration = Duration::from_secs(240);
const FLEET: &str = r#"
name = "merged"
engine = "ksm"
[defaults]
memory = "32M"
fill = { zero = 10, common = 50, duplicate = 20, unique = 20 }
[[guest]]
name = "vm"
count = 3
"#;
const PRESENT: u64 = 1 << 63;
const FRAME: u64 = (1 << 55) - 1;
/// Bits of /proc/kpageflags.
const KSM: u64 = 1 << 21;
const ZERO: u64 = 1 << 24;

/// The frame of each page of a guest, 0 for one that has none.
fn frames(control: &Path) -> Vec<u64> {
    let status = Client::connect(control).ask(&json!({"op": "status"}))["status"].clone();
    let number = |value: &Value| value.as_u64().expect("a number");
    let pagemap = File::open(format!("/proc/{}/pagemap", status["pid"])).expect("pagemap");
    let mut frames = Vec::new();
    for extent in status["extents"].as_array().expect("extents") {
        let (at, pages) = (number(&extent["hva"]) / 4096, number(&extent["bytes"]) / 4096);
        frames.extend(words(&pagemap, at, pages).map(|e| if e & PRESENT == 0 { 0 } else { e & FRAME }));
    }
    frames
}

/// Some 64-bit numbers of a file.
fn words(file: &File, first: u64, count: u64) -> impl Iterator<Item = u64> {
    let mut bytes = vec![0; count as usize * 8];
    file.read_exact_at(&mut bytes, first * 8).expect("entries");
    bytes
        .chunks_exact(8)
        .map(|b| u64::from_le_bytes(b.try_into().expect("eight bytes")))
        .collect::<Vec<_>>()
        .into_iter()
}

/// The kernel's flags of a frame, and by how many page table entries it is mapped.
fn frame(number: u64) -> (u64, u64) {
    let word = |path| words(&File::open(path).expect("root"), number, 1).next().expect("a word");
    (word("/proc/kpageflags"), word("/proc/kpagecount"))
}

#[test]
fn a_balloon_of_merged_pages_gives_back_the_frames_that_nobody_else_has() {
    let _ksm = require_ksm!();
    let sandbox = Sandbox::new();
    let file = sandbox.file("fleet.toml");
    fs::write(&file, FLEET).expect("a fleet file");
    let fleet = |args: &[&str]| sandbox.samepage(args).timeout(LIMIT).output().success();
    let up = ["fleet", "up", file.to_str().expect("UTF-8")];
    let _ = fleet(&up);
    let _ = fleet(&["fleet", "status", "--settle"]);
    // With its daemon dead, a fleet is not merged any further, and its guests take commands from
    // others.
    for process in sandbox.processes().iter().filter(|p| p.args.split(' ').nth(1) == Some("host")) {
        process.kill();
    }
    let socket = |name: &str| -> PathBuf { sandbox.runtime_dir().join("fleets/merged").join(name) };
    let all = || -> Vec<Vec<u64>> { (0..3).map(|n| frames(&socket(&format!("vm-{n}.ctl")))).collect() };
    tests::vm::eventually("merging has stopped", || {
        fs::read_to_string("/sys/kernel/mm/ksm/run").is_ok_and(|run| run.trim() != "1")
    });

    let mut com2 = Client::connect(&socket("vm-0.com2"));
    let freed = field(&com2.command("free percent=60"), "freed");
    drop(com2);
    let before = all();
    let counted: HashMap<u64, (u64, u64)> =
        before.iter().flatten().filter(|f| **f != 0).map(|f| (*f, frame(*f))).collect();

    let size = format!("{}K", freed / 2 * 4);
    let control = socket("vm-0.ctl");
    let set = ["balloon", "set", control.to_str().expect("UTF-8"), &size, "--wait", "--json"];
    let reached = fleet(&set).json();
    let after = all();

    // Nothing moved but the ballooned guest's pages, and those are gone.
    assert_eq!((&after[1], &after[2]), (&before[1], &before[2]));
    let mut taken: HashMap<u64, u64> = HashMap::new();
    let mut written = 0;
    for (was, is) in before[0].iter().zip(&after[0]).filter(|(was, is)| was != is) {
        // What the guest keeps in mind it writes down, here and there in a page that was shared.
        written += u64::from(*is != 0);
        *taken.entry(*was).or_default() += 1;
    }
    assert!(written < 32, "{written} pages have moved");
    assert_eq!(taken.values().sum::<u64>() - written, freed / 2, "{reached:#}");

    // A frame that only those pages had is free; one that others have too lost just the pages that
    // went.
    let (mut gone, mut kept) = (0, 0);
    for (number, pages) in &taken {
        let (flags, mapped) = counted[number];
        if flags & ZERO != 0 {
            continue;
        }
        let (flags_now, mapped_now) = frame(*number);
        if mapped == *pages {
            // The kernel may have reused the frame, but not for its own merging, which is stopped.
            assert_eq!(flags_now & KSM, 0, "frame {number:#x}, mapped {mapped} times, was not freed");
            gone += 1;
        } else {
            assert_eq!((flags_now & KSM, mapped_now), (KSM, mapped - pages), "frame {number:#x}");
            kept += 1;
        }
    }
    assert!(gone > 100 && kept > 100, "{gone} frames are gone, {kept} are kept: neither may be few");

    // The fleet goes on: no guest has lost anything, and what the balloon held comes back as zeros.
    let _ = fleet(&["balloon", "set", control.to_str().expect("UTF-8"), "0", "--wait"]);
    let mut com2 = Client::connect(&socket("vm-0.com2"));
    let checked = com2.command("balloon check");
    assert_eq!(field(&checked, "nonzero"), 0, "{checked}");
    drop(com2);
    let _ = fleet(&up);
    let _ = fleet(&["fleet", "verify"]);
    let _ = fleet(&["fleet", "down"]);
    sandbox.assert_clean_within(SOON);
}
