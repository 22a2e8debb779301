//! `samepage measure`: what it must leave as it was, and what it says where it cannot go on or may
//! not look.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::{FileExt, PermissionsExt, symlink};
use std::path::Path;
use std::process::Command;

use kernel_view::pagemap::PagemapEntry;
use serde_json::json;
use tests::host::{KsmSettings, skipped};
use tests::require_ksm;
use tests::run::{Run, Running};
use tests::sandbox::Sandbox;
use tests::vm::{SOON, Vm, eventually};

use super::measure::{LIMIT, counts, image, pages, text};

const PAGE_BYTES: u64 = 4096;
const KSM: &str = "/sys/kernel/mm/ksm";
/// Nobody's user and group, which own nothing.
const NOBODY: &str = "65534";

/// Pages that are not alone on their frame.
fn shared(vms: &[Vm]) -> Vec<Vec<PagemapEntry>> {
    let of = |vm: &Vm| {
        let entries = vm.page_entries().into_iter();
        entries.filter(|entry| entry.present() && !entry.exclusive()).collect()
    };
    vms.iter().map(of).collect()
}

/// Reading a page by pinning it would give it a frame of its own. KSM is stopped meanwhile, so that
/// it cannot merge it again.
#[test]
fn what_ksm_has_merged_stays_merged() {
    let _ksm = require_ksm!();
    let sandbox = Sandbox::new();
    let settings = KsmSettings::now();
    let set = |name: &str, value: &str| fs::write(Path::new(KSM).join(name), value).expect("a KSM setting");
    let vms = ["a", "b"].map(|name| Vm::start(&sandbox, name, &["--memory", "48M"]));
    for (seed, vm) in (1..).zip(&vms) {
        let mut com2 = vm.com2();
        assert!(com2.line().is_some_and(|line| line.starts_with("ready ")));
        let common = std::process::id();
        let fill =
            format!("fill seed={seed} common={common} zero=0 common_pct=50 dup=20 unique=30 pages=6000");
        assert_eq!(com2.command(&fill), "ok command=fill pages=6000");
        assert_eq!(vm.ask(&json!({"op": "mergeable", "on": true})), json!("done"));
        assert_eq!(vm.ask(&json!({"op": "pause"})), json!("done"));
    }
    set("pages_to_scan", "20000");
    set("sleep_millisecs", "10");
    set("run", "1");
    // All that is in both, and nearly all that is in one more than once.
    eventually("KSM has merged the guests", || shared(&vms).concat().len() > 8000);
    set("run", "0");
    let lengths = |guests: &[Vec<PagemapEntry>]| guests.iter().map(Vec::len).collect::<Vec<_>>();
    // A page that the kernel is just moving is in no entry.
    let mut before = shared(&vms);
    eventually("no page is being moved", || {
        let was = std::mem::replace(&mut before, shared(&vms));
        lengths(&was) == lengths(&before)
    });
    let pids = vms.each_ref().map(|vm| vm.running().pid().to_string());
    let measure = || {
        let args = ["measure", "--json", "--pid", &pids[0], "--pid", &pids[1], "--beyond", "100"];
        sandbox.samepage(args).timeout(LIMIT).output().success().json()
    };
    let [first, second] = [measure(), measure()];
    // One that was unshared stays so: KSM is off.
    let mut after = Vec::new();
    eventually("what was merged before it was measured is merged", || {
        after = shared(&vms);
        lengths(&after) == lengths(&before)
    });
    // The kernel may have moved a frame to make room, with all that was on it: then they are
    // together on another one.
    let (before, after) = (before.concat(), after.concat());
    let frames =
        |pages: &[PagemapEntry]| pages.iter().filter_map(|page| page.pfn()).collect::<BTreeSet<_>>().len();
    let pairs: BTreeSet<_> = before.iter().zip(&after).map(|(was, is)| (was.pfn(), is.pfn())).collect();
    assert_eq!([pairs.len(), frames(&after)], [frames(&before); 2], "pages were parted by measuring them");
    assert!(first["shared_now"]["saved_pages"].as_u64() > Some(4000), "{:#}", first["shared_now"]);
    assert_eq!(first["shared_now"], second["shared_now"]);
    assert_eq!(counts(&first), counts(&second));
    settings.restore();
    for vm in vms {
        assert_eq!(vm.ask(&json!({"op": "stop"})), json!("done"));
        let _ = vm.into_running().wait().success();
    }
    sandbox.assert_clean_within(SOON);
}

/// Starts measuring a sparse image, and waits until it is well into it.
fn reading(sandbox: &Sandbox, file: &str) -> Running {
    let mut running = sandbox.samepage(["measure", "--json", "--file", file]).timeout(LIMIT).start();
    let io = format!("/proc/{}/io", running.pid());
    eventually("the image is being read", || {
        let text = fs::read_to_string(&io).unwrap_or_default();
        let read = text.lines().find_map(|line| line.strip_prefix("rchar: ")?.parse::<u64>().ok());
        assert!(running.is_running(), "it ended before it could be disturbed");
        read.is_some_and(|bytes| bytes > 4 << 20)
    });
    running
}

/// An image that is zeros but for its last pages, and takes no room.
fn sparse(sandbox: &Sandbox, bytes: u64) -> String {
    let file = image(sandbox, "sparse.mem", &[]);
    fs::File::options().write(true).open(&file).and_then(|file| file.set_len(bytes)).expect("a sparse file");
    file
}

#[test]
fn an_image_that_is_cut_short_while_it_is_read_is_an_error() {
    let sandbox = Sandbox::new();
    // Minutes of reading.
    let file = sparse(&sandbox, 1 << 40);
    let running = reading(&sandbox, &file);
    let short = fs::File::options().write(true).open(&file).expect("the image");
    short.set_len(8 * PAGE_BYTES).expect("a shorter image");
    let outcome = running.wait();
    assert_eq!(outcome.code, Some(1), "{outcome}");
    for words in [file.as_str(), "cut short", "0x10000000000", "measure a copy"] {
        assert!(outcome.stderr.contains(words), "the error does not say {words:?}: {outcome}");
    }
    assert!(outcome.stdout.is_empty(), "{outcome}");
}

#[test]
fn an_image_that_is_removed_while_it_is_read_is_measured_whole() {
    let sandbox = Sandbox::new();
    let (bytes, last) = (6 << 30, pages(1..=9));
    let file = sparse(&sandbox, bytes);
    let at_end = fs::File::options().write(true).open(&file).expect("the image");
    let at = bytes - last.as_flattened().len() as u64;
    at_end.write_all_at(last.as_flattened(), at).expect("its last pages");
    let running = reading(&sandbox, &file);
    fs::remove_file(&file).expect("the image");
    let found = running.wait().success().json();
    assert_eq!(counts(&found), [bytes / PAGE_BYTES - 9, 0, 0, 9], "{found:#}");
    // Before it is opened is another matter, and so is a link that leads nowhere.
    symlink(&file, sandbox.file("link")).expect("a link");
    for gone in [file.as_str(), text(&sandbox.file("link"))] {
        let outcome = sandbox.samepage(["measure", "--file", gone]).timeout(LIMIT).output();
        assert!(outcome.code == Some(1) && outcome.stderr.contains(gone), "{outcome}");
    }
}

/// A copy of a guest's /proc/kpageflags.
fn page_flags(sandbox: &Sandbox, name: &str, flags: &[u64]) -> String {
    let path = sandbox.file(name);
    fs::write(&path, flags.iter().flat_map(|flags| flags.to_le_bytes()).collect::<Vec<_>>()).expect("a file");
    text(&path).to_owned()
}

#[test]
fn pages_of_images_are_told_by_what_they_are_for() {
    let sandbox = Sandbox::new();
    let (free, slab, reserved) = (1 << 10, 1 << 7, 1 << 32);
    let a = image(&sandbox, "a", &pages([0, 0, 1, 1, 2]));
    let b = image(&sandbox, "b", &pages([1, 2, 3, 0, 0]));
    // There are a few frames behind a guest's RAM that firmware has reserved.
    let flags_a = page_flags(&sandbox, "a.flags", &[free, free, slab, slab, 0, reserved, reserved]);
    let flags_b = page_flags(&sandbox, "b.flags", &[slab, slab, slab, free, free]);
    let run = |args: &[&str]| {
        let args = [&["measure", "--json", "--file", &a, "--file", &b], args].concat();
        sandbox.samepage(args).timeout(LIMIT).output()
    };
    let named = [format!("{a}={flags_a}"), format!("{b}={flags_b}")];
    let found = run(&["--page-flags", &named[0], "--page-flags", &named[1]]).success().json();
    let row = |name: &str, [pages, zero, within, between, distinct]: [u64; 5]| {
        json!({"type": name, "pages": pages, "zero": zero, "self_duplicates": within,
               "cross_duplicates": between, "distinct": distinct, "shared_now": 0})
    };
    let all = json!([
        row("free", [4, 4, 0, 0, 0]),
        row("slab", [5, 0, 1, 2, 2]),
        row("kernel, other", [1, 0, 0, 0, 1])
    ]);
    assert_eq!(found["by_type"]["types"], all, "{found:#}");
    let second = json!([row("free", [2, 2, 0, 0, 0]), row("slab", [3, 0, 0, 2, 1])]);
    assert_eq!(found["by_type"]["guests"][1], json!({"guest": b, "types": second}));
    assert!(run(&[]).success().json()["by_type"].is_null());

    let small = format!("{a}={}", page_flags(&sandbox, "small", &[free; 4]));
    let large = format!("{a}={}", page_flags(&sandbox, "large", &[free; 6]));
    for (args, expected) in [
        (vec!["--page-flags", &flags_a], "write PID=FLAGS"),
        (vec!["--page-flags", &named[0], "--page-flags", &named[0]], "twice"),
        (vec!["--page-flags", &small], "has 4 frames"),
        (vec!["--page-flags", &large], "frame 0x5 is used (free)"),
        (vec!["--page-flags", &named[0], "--low-memory", "3"], "no unit"),
        (vec!["--page-types"], "--page-flags"),
    ] {
        let outcome = run(&args);
        assert!(matches!(outcome.code, Some(1 | 2)) && outcome.stderr.contains(expected), "{outcome}");
    }
}

/// A program run by nobody.
fn by_nobody(program: &[&str]) -> Run {
    let become_nobody = ["--reuid", NOBODY, "--regid", NOBODY, "--clear-groups"];
    Run::program("setpriv", [&become_nobody[..], program].concat()).timeout(LIMIT)
}

#[test]
fn without_root_ones_own_process_is_measured_and_anothers_is_not() {
    if !rustix::process::geteuid().is_root() {
        return skipped(module_path!(), "only root can become nobody");
    }
    let yama = fs::read_to_string("/proc/sys/kernel/yama/ptrace_scope").unwrap_or_default();
    let sandbox = Sandbox::new();
    let binary = sandbox.file("samepage");
    fs::copy(tests::samepage(), &binary).expect("a copy of the binary");
    let directory = binary.parent().expect("the sandbox");
    fs::set_permissions(directory, fs::Permissions::from_mode(0o755)).expect("a directory for all");

    // 32 MB and more that it shares with a child, so that not all of its frames are its own.
    let script = "x=$(head -c 32M /dev/zero | tr '\\0' x); (sleep 600; :) & echo ready; wait";
    let own = by_nobody(&["bash", "-c", script]).start();
    eventually("its memory is filled", || own.stdout_so_far().contains("ready"));
    let measure =
        |pid: u32| by_nobody(&[text(&binary), "measure", "--json", "--pid", &pid.to_string()]).output();
    let outcome = measure(own.pid());
    if yama.trim().parse::<u32>().unwrap_or(0) > 0 {
        skipped(module_path!(), "kernel.yama.ptrace_scope: nobody may read but his own children");
        assert!(outcome.stderr.contains("ptrace_scope"), "{outcome}");
    } else {
        let found = outcome.success().json();
        let [zero, within, between, distinct] = counts(&found);
        assert!(within > 7000 && between == 0 && zero + distinct < within, "{found:#}");
        // On which frames they are the kernel does not tell him.
        assert_eq!(found["shared_now"]["estimated"], json!(true), "{found:#}");
        assert!(found["notes"].to_string().contains("run as root"), "{found:#}");
    }

    let mut of_root = Command::new("sleep").arg("600").spawn().expect("sleep");
    let outcome = measure(of_root.id());
    of_root.kill().expect("a child of ours");
    of_root.wait().expect("a child of ours");
    assert_eq!(outcome.code, Some(1), "{outcome}");
    for words in [of_root.id().to_string().as_str(), "CAP_SYS_PTRACE", "--file"] {
        assert!(outcome.stderr.contains(words), "the error does not say {words:?}: {outcome}");
    }
}
