//! Guests on the host's pool of huge pages, and what else the pool is no longer for.

use std::fs;

use serde_json::{Value, json};
use tests::api::ApiVm;
use tests::huge_pages::{HugePages, field};
use tests::require_kvm;
use tests::sandbox::Sandbox;
use tests::vm::{SOON, Vm, eventually};

const HUGE_PAGES: u64 = 512;

/// The pool, or None, said aloud.
fn pool(test: &str, count: u64) -> Option<HugePages> {
    HugePages::add(count).map_err(|why| tests::host::skipped(test, &why)).ok()
}

fn balloon(vm: &Vm) -> Value {
    vm.ask(&json!({"op": "balloon"}))["balloon"].clone()
}

fn host(vm: &Vm, key: &str) -> u64 {
    balloon(vm)["host"][key].as_u64().unwrap_or_else(|| panic!("no {key}"))
}

/// Asks for a size, and waits until the guest has it, or has no more to give.
fn set(vm: &Vm, pages: u64) {
    vm.ask(&json!({"op": "balloon_target", "pages": pages}));
    let mut last = (u64::MAX, 0);
    eventually("the balloon has stopped", || {
        let held = host(vm, "held_pages");
        last = if held == last.0 { (held, last.1 + 1) } else { (held, 0) };
        held == pages || last.1 > 5
    });
}

#[test]
fn a_balloon_gives_whole_huge_pages_to_the_pool_and_says_what_it_keeps() {
    require_kvm!();
    let Some(_pool) = pool(module_path!(), 66) else { return };
    let sandbox = Sandbox::new();
    let vm = Vm::start(&sandbox, "vm", &["--memory", "128M", "--backing", "hugetlb"]);
    let mut com2 = vm.com2();
    assert!(com2.line().is_some_and(|line| line.starts_with("ready ")));
    let fill = "fill seed=1 common=7 zero=0 common_pct=0 dup=0 unique=100 pages=30000";
    assert_eq!(com2.command(fill), "ok command=fill pages=30000");
    com2.command("free percent=90");
    let free = || field("HugePages_Free");

    // Less than a huge page: nothing is had, nothing is said to be, and no huge page is taken for
    // it.
    let before = free();
    set(&vm, 300);
    assert_eq!((free(), host(&vm, "held_pages"), host(&vm, "reclaimed_bytes")), (before, 300, 0));
    // Those that the guest had never touched are absent, and the others the pool keeps.
    assert_eq!(host(&vm, "kept_pages") + host(&vm, "absent_pages"), 300);

    set(&vm, 26_000);
    let (held, absent) = (host(&vm, "held_pages"), host(&vm, "absent_pages"));
    let gained = free() - before;
    assert!(held > 20_000 && gained > 38, "{held} pages given, {gained} huge pages in the pool");
    // What the guest had never touched is as absent, but was in the pool all the time.
    assert!(absent >= gained * HUGE_PAGES && absent % HUGE_PAGES == 0, "{absent} of {gained}");
    assert_eq!(host(&vm, "reclaimed_bytes"), gained * HUGE_PAGES * 4096);
    assert_eq!((host(&vm, "kept_pages"), host(&vm, "touched_pages")), (held - absent, 0));

    // What was given reads as zeros, what was not is as it was.
    set(&vm, 0);
    let checked = com2.command("balloon check");
    assert_eq!((tests::vm::field(&checked, "nonzero"), host(&vm, "held_pages")), (0, 0), "{checked}");
    assert!(tests::vm::field(&checked, "checked") >= held, "{checked}");
    let verified = com2.command("verify");
    assert_eq!(tests::vm::field(&verified, "mismatched"), 0, "{verified}");
    assert_eq!(vm.ask(&json!({"op": "stop"})), json!("done"));
    let _ = vm.into_running().wait().success();
    sandbox.assert_clean_within(SOON);
}

/// What a process has: descriptors, mappings, and huge pages that are reserved for it.
fn had(pid: u32) -> (usize, usize, u64) {
    let descriptors = fs::read_dir(format!("/proc/{pid}/fd")).expect("its descriptors").count();
    let maps = fs::read_to_string(format!("/proc/{pid}/maps")).expect("its mappings");
    let large = |line: &&str| {
        let range = line.split_once(' ').and_then(|(range, _)| range.split_once('-'));
        let address = |text: &str| u64::from_str_radix(text, 16).unwrap_or(0);
        range.is_some_and(|(from, to)| address(to) - address(from) >= 16 << 20)
    };
    (descriptors, maps.lines().filter(large).count(), field("HugePages_Total") - free_for_all())
}

/// Huge pages that another could have.
fn free_for_all() -> u64 {
    field("HugePages_Free") - field("HugePages_Rsvd")
}

#[test]
fn starts_that_fail_give_everything_back() {
    require_kvm!();
    let Some(_pool) = pool(module_path!(), 66) else { return };
    let sandbox = Sandbox::new();
    let vm = ApiVm::start(&sandbox, &["--id", "again"]);
    let pid = vm.running().pid();
    let (kernel, disk) = (sandbox.file("kernel"), sandbox.file("disk"));
    fs::write(&kernel, "no kernel at all").expect("a file");
    fs::write(&disk, [0; 4096]).expect("a file");
    vm.put(
        "/drives/root",
        &json!({"drive_id": "root", "path_on_host": disk, "is_root_device": false, "is_read_only": false}),
    );
    let start = json!({"action_type": "InstanceStart"});
    // Before the first one, when the last request's connection is gone.
    let mut before = had(pid);
    eventually("it is at rest", || std::mem::replace(&mut before, had(pid)) == before);
    let eventually_as_before = |what: &str| {
        eventually(&format!("{what} gives everything back: {before:?} {:?}", had(pid)), || {
            let now = had(pid);
            now.0 <= before.0 && (now.1, now.2) == (before.1, before.2)
        })
    };
    for n in 0..12 {
        // Of another size each time, from the pool and not.
        let (mib, huge) = ([32, 64, 128][n % 3], ["2M", "None"][n % 2]);
        vm.put("/machine-config", &json!({"vcpu_count": 2, "mem_size_mib": mib, "huge_pages": huge}));
        vm.put("/boot-source", &json!({"kernel_image_path": kernel}));
        let answer = vm.ask("PUT", "/actions", &start);
        assert!(answer.fault().contains("the kernel cannot be used"), "{answer:?}");
        assert!(!vm.control.exists() && !vm.com2.exists(), "sockets of a VM that is not there");
        eventually_as_before(&format!("start {n}"));
    }
    // One that the pool is too small for keeps no part of it: RAM above 4 GiB is mapped in two
    // pieces, of which the first may fit.
    vm.put("/machine-config", &json!({"vcpu_count": 1, "mem_size_mib": 8192, "huge_pages": "2M"}));
    assert!(vm.ask("PUT", "/actions", &start).fault().contains("vm.nr_hugepages"));
    eventually_as_before("one that does not fit");
    // The drive is not locked, and a good start finds all that it needs.
    vm.put("/machine-config", &json!({"vcpu_count": 2, "mem_size_mib": 128, "huge_pages": "2M"}));
    vm.put("/boot-source", &json!({"kernel_image_path": "builtin", "boot_args": ""}));
    vm.put("/actions", &start);
    assert_eq!(vm.get("/")["state"], "Running");
    vm.running().kill(rustix::process::Signal::TERM);
    let outcome = vm.into_running().wait().success();
    assert_eq!(outcome.stderr, "note: SIGTERM: the VM ends\n", "{outcome}");
    sandbox.assert_clean_within(SOON);
}

/// A fleet's guests are not on the pool: what is in it is none of theirs, and a refusal says so.
#[test]
fn what_is_in_the_pool_is_promised_to_no_fleet() {
    let Some(_pool) = pool(module_path!(), 512) else { return };
    let sandbox = Sandbox::new();
    let mib = field("MemTotal") / 1024 - 1000;
    let file = sandbox.file("fleet.toml");
    let fleet = format!(
        "name = 'f'\nengine = 'off'\n[overcommit]\nadmission = 'strict'\n[[guest]]\nname = 'g'\nmemory = '{mib}M'\n"
    );
    fs::write(&file, fleet).expect("a file");
    let args = ["fleet".as_ref(), "up".as_ref(), file.as_os_str(), "--dry-run".as_ref()];
    let refused = sandbox.samepage(args).output();
    assert_eq!(refused.code, Some(1), "{refused}");
    assert!(refused.stdout.contains("1024.0 MiB in the pool of huge pages"), "{refused}");
}
