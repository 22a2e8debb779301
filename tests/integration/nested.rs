//! In the nested-paging lab: AMD SVM with nested paging, where Linux guests run too.

use std::fs::{self, File};
use std::path::Path;
use std::sync::Mutex;
use std::time::Duration;

use tests::lab::{image_dir, lab_run, lab_run_on_one, lab_script};
use tests::run::Run;

use super::demo::check_report;

fn samepage() -> String {
    tests::samepage().to_str().expect("a path in UTF-8").to_owned()
}

#[test]
fn lab_doctor_sees_nested_paging() {
    let outcome = lab_run(Duration::from_secs(120), [samepage().as_str(), "doctor", "--json"]).success();
    let report = outcome.json().to_string().to_lowercase();
    assert!(report.contains("svm") && report.contains("npt"), "{outcome}");
}

#[test]
fn lab_demo_merges_and_loses_nothing() {
    let outcome =
        lab_run_on_one(Duration::from_secs(300), [samepage().as_str(), "demo", "--engine", "ksm", "--json"])
            .success();
    check_report(&outcome.json(), 4.0);
}

#[test]
fn lab_slabs_merge_and_lose_nothing() {
    // Slabs are memory that belongs to no process. The lab has no other user, so that leftovers are
    // seen: of some 30 MiB less than 4.
    let script = r#"
        shmem() { awk '$1 == "Shmem:" { print $2 }' /proc/meminfo; }
        before=$(shmem)
        "$1" demo --engine slab --json
        left=$(($(shmem) - before))
        [ "$left" -lt 4096 ]
    "#;
    let samepage = samepage();
    let args = ["bash", "-euxo", "pipefail", "-c", script, "lab", samepage.as_str()];
    let outcome = lab_run_on_one(Duration::from_secs(300), args).success();
    check_report(&outcome.json(), 4.0);
}

/// The tests of this binary that these words choose, inside the lab, on one processor: nearly all
/// are about memory that is given back or merged.
#[track_caller]
fn inside(tests: &[&str], seconds: u64) {
    let this = std::env::current_exe().expect("this binary");
    let this = this.to_str().expect("a path in UTF-8");
    let args = [&[this], tests, &["--test-threads=1", "--nocapture"]].concat();
    let outcome = lab_run_on_one(Duration::from_secs(seconds), args).success();
    let passed = outcome.stdout.lines().find(|line| line.starts_with("test result: ok."));
    let passed = passed.unwrap_or_else(|| panic!("no result: {outcome}"));
    assert!(!passed.contains(" 0 passed") && !outcome.stderr.contains("SKIPPED"), "{outcome}");
}

static IMAGE: Mutex<()> = Mutex::new(());

/// The kernel and the initrd that the lab's guests boot, made again after the agent in them may
/// have changed.
pub(super) fn need_image() {
    // A second test finds it made.
    let _alone = os::lock(&IMAGE);
    let image = image_dir();
    let modified = |path: &Path| path.metadata().and_then(|m| m.modified()).ok();
    if modified(&image.join("image.json")) <= modified(&tests::samepage()) {
        let _ =
            Run::program(tests::samepage(), ["image"]).timeout(Duration::from_secs(300)).output().success();
    }
}

/// What the built-in guest's balloon does with memory on the local KVM, it does with nested paging.
#[test]
fn lab_balloon_of_the_built_in_guest() {
    let tests = [
        "what_the_guest_gives",
        "a_fill_takes_pages_back",
        "freed_pages_are_reported",
        "a_guest_that_writes",
    ];
    let tests = tests.map(|name| format!("balloon::{name}"));
    inside(&tests.each_ref().map(String::as_str), 300);
}

#[test]
fn lab_balloon_of_a_linux_guest() {
    need_image();
    inside(&["inside::", "--skip", "inside::drives::", "--skip", "inside::clones::"], 400);
}

/// Ten clones of a Debian guest: each has a generation, random numbers and clocks of its own, and
/// balloons and merges on.
#[test]
fn lab_clones_of_a_debian_guest() {
    need_image();
    inside(&["inside::clones::ten_clones"], 540);
}

#[test]
fn lab_a_debian_guest_goes_on_from_the_disk() {
    need_image();
    inside(&["inside::clones::a_debian_guest_with_two"], 540);
}

#[test]
fn lab_clones_of_a_debian_guest_with_two_processors() {
    need_image();
    inside(&["inside::clones::clones_of_a_debian_guest_with_two"], 400);
}

#[test]
fn lab_clones_of_debian_guests_have_addresses_of_their_own() {
    need_image();
    inside(&["inside::clones::clones_of_a_debian_guest_have_addresses"], 400);
}

/// What a Linux guest reads from its drive, and that two page caches of one file are merged.
#[test]
fn lab_drives_of_linux_guests() {
    need_image();
    inside(&["inside::drives::"], 300);
}

/// Memory for 1.4 of two Debian guests: the balloon takes it from the idle one, and from the other
/// when they have changed roles.
#[test]
fn lab_idle_tax_moves_memory_between_debian_guests() {
    need_image();
    let scenario = tests::workspace().join("resources/scenarios/idle-tax-linux.toml");
    let scenario = scenario.to_str().expect("a path in UTF-8");
    let args = [samepage(), "stress".into(), scenario.to_owned(), "--json".into()];
    let outcome = lab_run_on_one(Duration::from_secs(480), args).success();
    let verdict = outcome.json();
    assert_eq!((&verdict["held"], &verdict["mismatched_pages"]), (&true.into(), &0.into()), "{outcome}");
    let phases = verdict["phases"].as_array().expect("phases");
    let samples = verdict["series"].as_array().expect("samples");
    // At the end of a phase.
    let balloons = |phase: &str| {
        let number = phases.iter().position(|p| p["name"] == phase).expect(phase);
        let last = samples.iter().rfind(|sample| sample["phase"] == number).expect("a sample of the phase");
        ["first", "second"].map(|guest| last["guests"][guest]["ballooned_pages"].as_u64().expect("a balloon"))
    };
    let ([idle, busy], [busy_again, idle_then]) =
        (balloons("second is busy"), balloons("first is busy again"));
    // The second time it is 8 to 88 MiB, which of these goes with how fast the lab is.
    let more = 4 << 8;
    assert!(idle > busy + more && idle_then > busy_again + more, "{idle} {busy}, {busy_again} {idle_then}");
    let mib = |pages: u64| pages >> 8;
    eprintln!(
        "balloons in MiB, of the idle and of the busy guest: {} and {}; then {} and {}; {} pages verified in {:.0} s",
        mib(idle),
        mib(busy),
        mib(idle_then),
        mib(busy_again),
        verdict["verified_pages"],
        verdict["seconds"].as_f64().expect("a number"),
    );
}

/// Two Debian guests, with kernels at the same addresses and at random ones: the latter need more
/// frames.
#[test]
fn lab_kaslr_leaves_less_to_share_between_debian_guests() {
    need_image();
    let [kernel, initrd] = ["vmlinux", "initrd.cpio"].map(|name| image_dir().join(name));
    let (kernel, initrd) = (kernel.to_str().expect("UTF-8"), initrd.to_str().expect("UTF-8"));
    let mut args = vec![samepage()];
    args.extend(
        ["experiment", "run", "identical-vms", "--guests", "2", "--engine", "slab"].map(String::from),
    );
    args.extend(["--repeat", "1", "--json", "--kernel", kernel, "--initrd", initrd].map(String::from));
    let outcome = lab_run_on_one(Duration::from_secs(240), args).success();
    let result = outcome.json();
    assert_eq!(result["complete"], true, "{outcome}");
    let frames = |variant: &str| {
        let point = result["summary"].as_array().expect("a summary").iter().find(|p| p["variant"] == variant);
        let figure = |name: &str| {
            let pointer = format!("/figures/{name}/median");
            point.and_then(|p| p.pointer(&pointer)).and_then(serde_json::Value::as_f64).unwrap_or_default()
        };
        let (saved, ideal) = (figure("freed_pages"), figure("ideal_pages"));
        assert!(saved > 0.8 * ideal && saved > 1000.0, "{variant}: {saved} of {ideal}: {outcome}");
        figure("frames_pages")
    };
    let (off, on) = (frames("KASLR off"), frames("KASLR on"));
    assert!(on > 1.02 * off, "{on} frames with KASLR, {off} without: {outcome}");
}

/// Four Debian guests: each boots to its agent, fills, is merged, verified and reported.
#[test]
fn lab_linux_fleet() {
    need_image();
    let script = r#"
        samepage=$1 fleet=$2
        "$samepage" fleet up "$fleet" >&2
        "$samepage" fleet status --settle --content --json
        "$samepage" fleet status --kvm >&2
        "$samepage" fleet verify >&2
        "$samepage" fleet down >&2
        if pgrep -x samepage >&2; then exit 1; fi
    "#;
    let fleet = tests::workspace().join("resources/fleets/linux.toml");
    let script = format!("set -- '{}' '{}'\n{script}", samepage(), fleet.display());
    let outcome = lab_script(Duration::from_secs(580), &script).success();
    let status = outcome.json();
    let guests = status["guests"].as_array().map_or(&[][..], Vec::as_slice);
    assert_eq!(guests.len(), 4, "{outcome}");
    assert!(guests.iter().all(|guest| guest["state"] == "running"), "{outcome}");
    assert_eq!(status["engine"], "slab", "{outcome}");
    // Zeros were given back: what is still to be saved is what merging has not got.
    let number =
        |pointer: &str| status.pointer(pointer).and_then(serde_json::Value::as_f64).unwrap_or_default();
    let shared = number("/merge/host/shared_now") + number("/merge/host/zero_pages");
    let left = number("/content/ideal_saved_pages") - number("/saved_pages");
    assert!(shared > 50_000.0 && left < 0.03 * shared, "{left} pages are left of {shared}: {outcome}");
}

/// The agent reports the use of all frames by a Debian guest's kernel.
#[test]
fn lab_pages_of_a_debian_guest_by_their_type() {
    need_image();
    let script = r#"
        samepage=$1 image=$2
        cat > /tmp/typed.toml <<END
name = "typed"
engine = "off"
[defaults]
memory = "192M"
fill = { zero = 10, common = 40, duplicate = 10, unique = 40 }
[[guest]]
name = "debian"
kernel = "$image/vmlinux"
initrd = "$image/initrd.cpio"
[[guest]]
name = "built-in"
memory = "32M"
END
        "$samepage" fleet up /tmp/typed.toml >&2
        "$samepage" measure --page-types --json
        "$samepage" fleet down >&2
    "#;
    let script = format!("set -- '{}' '{}'\n{script}", samepage(), image_dir().display());
    let outcome = lab_script(Duration::from_secs(300), &script).success();
    let found = outcome.json();
    let of = |name: &str, what: &str| {
        let types = found["by_type"]["types"].as_array().expect("types");
        let row = types.iter().find(|row| row["type"] == name);
        row.map_or(0, |row| row[what].as_u64().expect("a number"))
    };
    let names = ["free", "slab", "page tables", "anonymous", "page cache", "kernel, other", "not in its map"];
    assert_eq!(names.iter().map(|name| of(name, "pages")).sum::<u64>(), 192 << 8, "{found:#}");
    assert!(of("not in its map", "pages") < 1024, "{found:#}");
    // What the agent has filled is a process's memory, a tenth of it zeros.
    let filled = of("anonymous", "pages");
    assert!(filled > 15_000 && of("anonymous", "zero") * 9 > filled / 2, "{found:#}");
    assert!(of("anonymous", "self_duplicates") * 20 > filled, "{found:#}");
    for name in ["slab", "page tables", "page cache", "kernel, other"] {
        assert!(of(name, "pages") > 20, "{name}: {found:#}");
    }
    let guests = found["by_type"]["guests"].as_array().map(Vec::len);
    let notes = found["notes"].to_string();
    assert!(guests == Some(1) && notes.contains("built-in") && notes.contains("no map"), "{found:#}");
}

/// There the control groups are of version 2.
#[test]
fn lab_page_cache_in_a_control_group_is_memory_to_be_had() {
    let path = super::admission::file_for_the_lab();
    let file = File::create(&path).expect("a file");
    file.set_len(super::admission::CACHED_MIB << 20).expect("a hole");
    let _gone = Removed(&path);
    inside(&["admission::page_cache"], 300);
}

struct Removed<'a>(&'a Path);

impl Drop for Removed<'_> {
    fn drop(&mut self) {
        let _ = fs::remove_file(self.0);
    }
}
