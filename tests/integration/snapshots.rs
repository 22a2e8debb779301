//! Snapshots on disk by the API, with the built-in guest: what Firecracker's own tests of the same
//! endpoints hold it to, and files that are not what they should be.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use rustix::fs::{SeekFrom, seek};
use rustix::process::{Pid, Resource, Rlimit, prlimit};
use serde_json::{Value, json};
use tests::api::{Answer, ApiVm};
use tests::sandbox::Sandbox;
use tests::vm::{Client, SOON, eventually, field};
use tests::{require_kvm, require_slabs};

const MIB: u32 = 32;
const BYTES: u64 = (MIB as u64) << 20;
const NO_ARGS: &[&str] = &[];
const FILL: &str = "fill seed=1 common=2 zero=10 common_pct=40 dup=10 unique=40 pages=4000";
pub(super) const VERIFIED: &str = "ok command=verify checked=4000 mismatched=0 first=none";

/// A VM in a place of its own, and COM2 once its guest is ready.
pub(super) struct Guest {
    pub(super) sandbox: Sandbox,
    pub(super) vm: ApiVm,
}

impl Guest {
    pub(super) fn new() -> Self {
        let sandbox = Sandbox::new();
        let vm = ApiVm::start(&sandbox, NO_ARGS);
        Self { sandbox, vm }
    }

    /// One that has filled its memory, with whatever was said before.
    pub(super) fn filled(track_dirty_pages: bool, before: &[(&str, Value)]) -> (Self, Client) {
        let guest = Self::new();
        let machine = json!({"vcpu_count": 1, "mem_size_mib": MIB, "track_dirty_pages": track_dirty_pages});
        guest.vm.put("/machine-config", &machine);
        guest.vm.put("/boot-source", &json!({"kernel_image_path": "builtin"}));
        before.iter().for_each(|(path, body)| guest.vm.put(path, body));
        guest.vm.put("/actions", &json!({"action_type": "InstanceStart"}));
        let mut com2 = Client::connect(&guest.vm.com2);
        assert!(com2.line().expect("the ready line").starts_with("ready "));
        assert_eq!(com2.command(FILL), "ok command=fill pages=4000");
        (guest, com2)
    }

    pub(super) fn file(&self, name: &str) -> PathBuf {
        self.sandbox.file(name)
    }

    pub(super) fn pause(&self) {
        self.vm.patch("/vm", &json!({"state": "Paused"}));
    }

    pub(super) fn resume(&self) {
        self.vm.patch("/vm", &json!({"state": "Resumed"}));
    }

    pub(super) fn create(&self, kind: &str, name: &str) -> (PathBuf, PathBuf) {
        let (state, memory) = (self.file(&format!("{name}.state")), self.file(&format!("{name}.memory")));
        self.vm.put(
            "/snapshot/create",
            &json!({"snapshot_type": kind, "snapshot_path": state, "mem_file_path": memory}),
        );
        (state, memory)
    }

    #[track_caller]
    pub(super) fn refused(&self, path: &str, body: &Value, said: &str) {
        let answer = self.vm.ask("PUT", path, body);
        assert!(answer.fault().contains(said), "{body}: {answer:?}\nexpected: {said}");
    }

    pub(super) fn end(self) {
        self.vm.running().kill(rustix::process::Signal::TERM);
        let _ = self.vm.into_running().wait().success();
        self.sandbox.assert_clean_within(SOON);
    }
}

/// What loads these files.
pub(super) fn load(state: &Path, memory: &Path) -> Value {
    json!({"snapshot_path": state, "mem_backend": {"backend_type": "File", "backend_path": memory}})
}

/// With one key more.
pub(super) fn with(mut object: Value, key: &str, value: impl Into<Value>) -> Value {
    object[key] = value.into();
    object
}

/// COM2 of a VM that went on from elsewhere: it says so first.
pub(super) fn loaded(guest: &Guest) -> Client {
    let mut com2 = Client::connect(&guest.vm.com2);
    let line = com2.line().expect("the generation");
    assert!(line.starts_with("generation number="), "{line}");
    com2
}

pub(super) fn churn(com2: &mut Client) {
    let before = field(&com2.command("report"), "churned");
    assert!(com2.command("churn class=all rate=2000 seconds=1").starts_with("ok command=churn"));
    eventually("it has written", || field(&com2.command("report"), "churned") > before + 500);
    assert_eq!(com2.command("churn class=all rate=0"), "ok command=churn rate=0");
}

/// Blocks of 512 bytes on disk.
fn blocks(path: &Path) -> u64 {
    fs::metadata(path).expect("a file").blocks()
}

/// Lays what a file has over another, as Firecracker's snapshot-editor does.
fn rebase(base: &Path, diff: &Path) {
    let (to, from) =
        (OpenOptions::new().write(true).open(base).expect("base"), File::open(diff).expect("diff"));
    let mut at = 0;
    while let Ok(data) = seek(&from, SeekFrom::Data(at)) {
        let hole = seek(&from, SeekFrom::Hole(data)).expect("an end");
        let mut bytes = vec![0; (hole - data) as usize];
        from.read_exact_at(&mut bytes, data).expect("data");
        to.write_all_at(&bytes, data).expect("data");
        at = hole;
    }
}

/// Where a memory file has the number that its state file has.
const PAIR: std::ops::Range<usize> = 0xe_e010..0xe_e020;

/// But for their numbers.
#[track_caller]
fn assert_same(a: &Path, b: &Path) {
    let contents = |path: &Path| {
        let mut bytes = fs::read(path).expect("a file");
        bytes[PAIR].fill(0);
        bytes
    };
    let (one, other) = (contents(a), contents(b));
    assert_eq!(one.len(), other.len());
    let pages = one.chunks(4096).zip(other.chunks(4096)).enumerate();
    let different: Vec<usize> = pages.filter(|(_, (a, b))| a != b).map(|(page, _)| page).collect();
    assert!(different.is_empty(), "{} and {}: pages {different:?}", a.display(), b.display());
}

#[test]
fn a_vm_goes_on_where_it_was_saved_paused_or_running() {
    require_kvm!();
    let (first, _com2) = Guest::filled(false, &[]);
    let (state, memory) = (first.file("s"), first.file("m"));
    let create = json!({"snapshot_path": state, "mem_file_path": memory});
    first.refused("/snapshot/create", &create, "save/restore unavailable while running");
    first.pause();
    first.vm.put("/snapshot/create", &create);
    for path in [&state, &memory] {
        assert_eq!(fs::metadata(path).expect("a file").permissions().mode() & 0o777, 0o600);
    }
    assert_eq!(fs::metadata(&memory).expect("a file").len(), BYTES);
    let info = first.sandbox.samepage(["snapshot", "info", "--json", state.to_str().expect("UTF-8")]);
    let info = info.output().success().json();
    assert_eq!((&info["memory_bytes"], &info["vcpus"]), (&json!(BYTES), &json!(1)), "{info}");
    let kinds: Vec<&Value> =
        info["sections"].as_array().expect("sections").iter().map(|s| &s["kind"]).collect();
    assert_eq!(kinds, ["machine", "chips", "vcpu", "devices", "setup", "pair"], "{info}");
    let printed = |args: &[&str]| first.sandbox.samepage([&["run"], args].concat()).output().success().stdout;
    assert_eq!(printed(&["--snapshot-version"]), "v1.0.0\n");
    assert_eq!(printed(&["--describe-snapshot", state.to_str().expect("UTF-8")]), "v1.0.0\n");
    // What is saved lives on.
    first.resume();
    for resume in [false, true] {
        let next = Guest::new();
        next.vm.put("/snapshot/load", &with(load(&state, &memory), "resume_vm", resume));
        assert_eq!(next.vm.get("/")["state"], if resume { "Running" } else { "Paused" });
        if !resume {
            next.resume();
        }
        assert_eq!(loaded(&next).command("verify"), VERIFIED);
        let config = next.vm.get("/vm/config");
        assert_eq!(config["machine-config"]["mem_size_mib"], MIB, "{config}");
        assert_eq!(config["boot-source"]["kernel_image_path"], "builtin", "{config}");
        for (path, body) in [
            ("/machine-config", json!({"vcpu_count": 1, "mem_size_mib": 64})),
            ("/boot-source", json!({"kernel_image_path": "builtin"})),
            ("/balloon", json!({"amount_mib": 1, "deflate_on_oom": true})),
            ("/actions", json!({"action_type": "InstanceStart"})),
            ("/metrics", json!({"metrics_path": "/dev/null"})),
            ("/logger", json!({})),
            ("/snapshot/load", load(&state, &memory)),
        ] {
            next.refused(path, &body, "not supported after starting the microVM");
        }
        next.end();
    }
    first.end();
}

#[test]
fn a_person_loads_by_the_command_line() {
    require_kvm!();
    let (first, _com2) = Guest::filled(false, &[]);
    first.pause();
    let (state, memory) = first.create("Full", "a");
    let files = ["--load", state.to_str().expect("UTF-8"), "--memory-file", memory.to_str().expect("UTF-8")];
    let refused = |args: &[&str], said: &str| {
        let run = first.sandbox.samepage([&["run"], args].concat()).timeout(SOON).output();
        assert!(run.code != Some(0) && run.stderr.contains(said), "{args:?}: {run}");
    };
    refused(&files, "--resume");
    refused(&files[..2], "--memory-file");
    refused(&[&files[..], &["--resume", "--memory", "64M"]].concat(), "cannot be used with");
    refused(&["--load", "/none", "--memory-file", "/none", "--resume"], "No such file");
    let sandbox = Sandbox::new();
    let vm = tests::vm::Vm::start(&sandbox, "b", &files);
    assert_eq!(vm.status()["paused"], true);
    assert_eq!(vm.ask(&json!({"op": "resume"})), json!("done"));
    let mut com2 = vm.com2();
    assert!(com2.line().expect("the generation").starts_with("generation number="));
    assert_eq!(com2.command("verify"), VERIFIED);
    com2.send(b"poweroff\n");
    let _ = vm.into_running().wait().success();
    sandbox.assert_clean_within(SOON);
    first.end();
}

#[test]
fn full_is_the_first_diff_and_diffs_over_their_base_are_full() {
    require_kvm!();
    let (guest, mut com2) = Guest::filled(true, &[]);
    guest.pause();
    let (_, first) = guest.create("Diff", "first");
    let (_, full) = guest.create("Full", "full");
    assert_same(&full, &first);
    // Nothing has changed since but its number: the rest is a hole, as after Firecracker's.
    let (_, none) = guest.create("Diff", "none");
    assert_eq!((fs::metadata(&none).expect("a file").len(), blocks(&none)), (BYTES, 8));
    guest.resume();
    churn(&mut com2);
    // Given back: what the base has there is to be zeros.
    assert!(field(&com2.command("free percent=20"), "freed") > 500);
    guest.pause();
    let (_, second) = guest.create("Diff", "second");
    assert!(blocks(&second) > 0 && blocks(&second) < blocks(&full), "{} {}", blocks(&second), blocks(&full));
    guest.resume();
    assert!(com2.command("verify").contains("mismatched=0"));
    churn(&mut com2);
    guest.pause();
    let (_, third) = guest.create("Diff", "third");
    let (_, last) = guest.create("Full", "last");
    rebase(&full, &second);
    rebase(&full, &third);
    assert_same(&full, &last);
    // Laid over a copy of the base by itself.
    let (_, over) = (fs::copy(&first, guest.file("over.memory")).expect("a copy"), guest.file("over.memory"));
    rebase(&over, &second);
    rebase(&over, &third);
    guest.resume();
    churn(&mut com2);
    guest.pause();
    let (state, _) = guest.create("Diff", "over");
    let (_, last) = guest.create("Full", "last");
    assert_same(&over, &last);
    let next = Guest::new();
    next.vm.put("/snapshot/load", &with(load(&state, &over), "resume_vm", true));
    let verified = loaded(&next).command("verify");
    assert!(verified.contains("mismatched=0") && field(&verified, "checked") > 2000, "{verified}");
    next.end();
    guest.end();
}

#[test]
fn what_was_given_to_the_balloon_is_zeros_in_the_next_diff() {
    require_kvm!();
    let (guest, mut com2) = Guest::filled(
        true,
        &[("/balloon", json!({"amount_mib": 0, "deflate_on_oom": false, "stats_polling_interval_s": 1}))],
    );
    guest.pause();
    let (_, base) = guest.create("Full", "base");
    guest.resume();
    assert!(field(&com2.command("free percent=60"), "freed") > 2000);
    guest.vm.patch("/balloon", &json!({"amount_mib": 8}));
    eventually("a balloon of 8 MiB", || guest.vm.get("/balloon/statistics")["actual_mib"] == 8);
    guest.pause();
    let (_, diff) = guest.create("Diff", "diff");
    let (_, full) = guest.create("Full", "full");
    rebase(&base, &diff);
    assert_same(&base, &full);
    guest.end();
}

#[test]
fn a_create_that_fails_costs_the_guest_nothing() {
    require_kvm!();
    let (guest, mut com2) = Guest::filled(true, &[]);
    guest.pause();
    let (state, full) = guest.create("Full", "full");
    guest.resume();
    churn(&mut com2);
    guest.pause();
    let (old_state, old_memory) = (fs::read(&state).expect("state"), fs::read(&full).expect("memory"));
    let pid = Pid::from_raw(guest.vm.running().pid() as i32);
    let limit = |most: Option<u64>| {
        let limit = Rlimit { current: most, maximum: None };
        prlimit(pid, Resource::Fsize, limit).expect("a limit");
    };
    // A disk with room for a part of it, with the same error's consequences.
    limit(Some(BYTES - 4096));
    for kind in ["Diff", "Full"] {
        let body = json!({"snapshot_type": kind, "snapshot_path": state, "mem_file_path": full});
        guest.refused("/snapshot/create", &body, "File too large");
    }
    limit(None);
    for (state, memory, said) in [
        (guest.file("none/s"), guest.file("m"), "No such file or directory"),
        (guest.file("s"), guest.file("none/m"), "No such file or directory"),
        (guest.file("s"), guest.file("s"), "are the same file"),
        (guest.file(""), guest.file("m"), "directory"),
    ] {
        let body = json!({"snapshot_type": "Diff", "snapshot_path": state, "mem_file_path": memory});
        guest.refused("/snapshot/create", &body, said);
    }
    assert_eq!((fs::read(&state).expect("state"), fs::read(&full).expect("memory")), (old_state, old_memory));
    let left: Vec<_> =
        fs::read_dir(guest.file("")).expect("a directory").flatten().map(|e| e.file_name()).collect();
    assert_eq!(left.len(), 2, "{left:?}");
    let (_, diff) = guest.create("Diff", "diff");
    let (_, last) = guest.create("Full", "last");
    rebase(&full, &diff);
    assert_same(&full, &last);
    guest.resume();
    assert_eq!(com2.command("verify"), VERIFIED);
    // Without a log there is no Diff.
    let (other, _com2) = Guest::filled(false, &[]);
    other.pause();
    let body =
        json!({"snapshot_type": "Diff", "snapshot_path": other.file("s"), "mem_file_path": other.file("m")});
    other.refused("/snapshot/create", &body, "track_dirty_pages");
    other.end();
    guest.end();
}

/// Saved and loaded again and again, each VM from the one before, with a disk, a balloon and
/// statistics.
#[test]
fn cycles_keep_devices_balloon_and_statistics() {
    require_kvm!();
    let disks = Sandbox::new();
    let disk = disks.file("disk");
    fs::write(&disk, [7; 1 << 16]).expect("a disk");
    let before = [
        ("/balloon", json!({"amount_mib": 2, "deflate_on_oom": false, "stats_polling_interval_s": 1})),
        ("/drives/d", json!({"drive_id": "d", "path_on_host": disk, "is_root_device": false})),
    ];
    let (mut guest, mut com2) = Guest::filled(true, &before);
    eventually("a balloon of 2 MiB", || guest.vm.get("/balloon/statistics")["actual_mib"] == 2);
    let mut base: Option<PathBuf> = None;
    for cycle in 0..4u32 {
        churn(&mut com2);
        guest.vm.patch("/balloon", &json!({"amount_mib": 3 + cycle}));
        eventually("the balloon follows", || guest.vm.get("/balloon/statistics")["actual_mib"] == 3 + cycle);
        guest.pause();
        let (state, memory) = guest.create("Diff", "cycle");
        // The first has everything.
        let memory = match &base {
            None => memory,
            Some(base) => {
                rebase(base, &memory);
                base.clone()
            }
        };
        let copy = disks.file(&format!("base{cycle}"));
        fs::copy(&memory, &copy).expect("a copy");
        let (_, full) = guest.create("Full", "full");
        assert_same(&copy, &full);
        let copied_state = disks.file("state");
        fs::copy(&state, &copied_state).expect("a copy");
        drop(com2);
        guest.end();
        guest = Guest::new();
        let body = with(load(&copied_state, &copy), "track_dirty_pages", true);
        guest.vm.put("/snapshot/load", &with(body, "resume_vm", true));
        base = Some(copy);
        com2 = loaded(&guest);
        let verified = com2.command("verify");
        assert!(verified.contains("mismatched=0"), "cycle {cycle}: {verified}");
        let statistics = guest.vm.get("/balloon/statistics");
        assert_eq!(statistics["actual_mib"], 3 + cycle, "{statistics}");
        assert_eq!(guest.vm.get("/balloon")["amount_mib"], 3 + cycle);
        eventually("fresh statistics", || {
            guest.vm.get("/balloon/statistics")["free_memory"].as_u64() > Some(0)
        });
        assert_eq!(guest.vm.get("/vm/config")["drives"][0]["drive_id"], "d");
    }
    guest.end();
}

/// Each is answered 400, and nothing was started: the same process then loads the right files.
#[test]
fn files_that_are_not_what_they_should_be_are_refused() {
    require_kvm!();
    let disks = Sandbox::new();
    let disk = disks.file("disk");
    fs::write(&disk, [7; 1 << 16]).expect("a disk");
    let drive = json!({"drive_id": "d", "path_on_host": disk, "is_root_device": false, "is_read_only": true});
    let (first, _com2) = Guest::filled(false, &[("/drives/d", drive)]);
    first.pause();
    let (state, memory) = first.create("Full", "a");
    let guest = Guest::new();
    let refused = |body: Value, said: &str| {
        guest.refused("/snapshot/load", &body, said);
        assert_eq!(guest.vm.get("/")["state"], "Not started");
    };
    let bad = |name: &str, bytes: &[u8]| {
        let path = first.file(name);
        fs::write(&path, bytes).expect("a file");
        path
    };
    let whole = fs::read(&state).expect("the state");
    for length in (0..whole.len()).step_by(4096).chain([1, 15, 47, whole.len() - 1]) {
        refused(load(&bad("cut", &whole[..length]), &memory), "cannot be used: ");
    }
    for at in (0..whole.len()).step_by(97) {
        let mut flipped = whole.clone();
        flipped[at] ^= 1 << (at % 8);
        refused(load(&bad("flipped", &flipped), &memory), "cannot be used: ");
    }
    let mut other = whole.clone();
    other[8] = 9;
    refused(load(&bad("version", &other), &memory), "it is of format 9, and this build of samepage reads 1");
    let mut long = File::create(first.file("long")).expect("a file");
    long.set_len(1 << 40).expect("a long file");
    refused(load(&first.file("long"), &memory), "expected 0 to 16777216");
    std::io::Write::write_all(&mut long, &whole).expect("a beginning");
    // Memory of another length, at every 4 KiB and not.
    for bytes in [0, 1, 4096, 8192, BYTES / 2, BYTES - 4096, BYTES - 1, BYTES + 1, BYTES * 2, 1 << 40] {
        let short = File::create(first.file("short")).expect("a file");
        short.set_len(bytes).expect("a length");
        refused(load(&state, &first.file("short")), &format!("the memory file has {bytes} bytes"));
    }
    // What is no file.
    let (fifo, link) = (first.file("fifo"), first.file("loop"));
    rustix::fs::mknodat(rustix::fs::CWD, &fifo, rustix::fs::FileType::Fifo, 0o600.into(), 0).expect("a FIFO");
    symlink(&link, &link).expect("a link");
    for (path, said) in [
        (fifo, "FIFO"),
        (first.file(""), "directory"),
        (link, "Too many levels of symbolic links"),
        (first.file("missing"), "No such file or directory"),
        (PathBuf::from("/dev/zero"), "device"),
        (PathBuf::new(), "No such file or directory"),
    ] {
        refused(load(&path, &memory), said);
        refused(load(&state, &path), said);
    }
    refused(load(&memory, &state), "expected 0 to 16777216");
    // A disk that is another file, another size, none, or in use by a writer.
    let saved = disks.file("saved");
    fs::rename(&disk, &saved).expect("a name");
    refused(load(&state, &memory), "the drive");
    fs::write(&disk, [7; 1 << 16]).expect("a disk");
    refused(load(&state, &memory), "is another file than when the snapshot was taken");
    fs::rename(&saved, &disk).expect("a name");
    OpenOptions::new().write(true).open(&disk).expect("a disk").set_len(1 << 15).expect("a length");
    refused(load(&state, &memory), "it has 32768 bytes");
    OpenOptions::new().write(true).open(&disk).expect("a disk").set_len(1 << 16).expect("a length");
    for (body, said) in [
        (json!({"snapshot_path": state}), "missing field: either `mem_backend` or `mem_file_path`"),
        (with(load(&state, &memory), "mem_file_path", "m"), "too many fields"),
        (with(load(&state, &memory), "huge_pages", "1G"), "unknown variant"),
    ] {
        refused(body, said);
    }
    let answer: Answer =
        guest.vm.ask("PUT", "/snapshot/load", &with(load(&state, &memory), "resume_vm", true));
    assert_eq!(answer.status, 204, "{answer:?}");
    assert_eq!(loaded(&guest).command("verify"), VERIFIED);
    guest.end();
    first.end();
}

/// Merging and snapshots read one log of KVM's: while pages are merged, written and merged again,
/// no Diff misses one.
#[test]
fn pages_that_are_merged_meanwhile_are_in_the_diffs_all_the_same() {
    require_slabs!();
    let sandbox = Sandbox::new();
    let daemon = sandbox.samepage(["host", "--open", "open"]).timeout(SOON * 4).start();
    let socket = sandbox.runtime_dir().join("fleets/open/merge.sock");
    eventually("the daemon listens", || socket.exists());
    let start = |name: &str| {
        let own = Sandbox::new();
        let vm = ApiVm::start(&own, &["--merge", socket.to_str().expect("UTF-8"), "--id", name]);
        vm.put("/machine-config", &json!({"vcpu_count": 1, "mem_size_mib": MIB, "track_dirty_pages": true}));
        vm.put("/boot-source", &json!({"kernel_image_path": "builtin"}));
        vm.put("/actions", &json!({"action_type": "InstanceStart"}));
        let mut com2 = Client::connect(&vm.com2);
        assert!(com2.line().expect("the ready line").starts_with("ready "));
        assert_eq!(com2.command(FILL), "ok command=fill pages=4000");
        (Guest { sandbox: own, vm }, com2)
    };
    let ((guest, mut com2), (other, _other_com2)) = (start("one"), start("two"));
    let maps = || {
        let maps = fs::read_to_string(format!("/proc/{}/maps", guest.vm.running().pid())).expect("its maps");
        maps.matches("/memfd:samepage-slab").count()
    };
    eventually("pages are merged", || maps() > 0);
    guest.pause();
    let (_, base) = guest.create("Full", "base");
    guest.resume();
    for round in 0..4 {
        churn(&mut com2);
        // Time in which the agent clears bits, and replaces what was quiet.
        assert!(com2.command("verify").contains("mismatched=0"));
        guest.pause();
        let (state, diff) = guest.create("Diff", &format!("diff{round}"));
        let (_, full) = guest.create("Full", "full");
        assert!(blocks(&diff) < blocks(&full), "round {round}");
        rebase(&base, &diff);
        assert_same(&base, &full);
        if round == 3 {
            let next = Guest::new();
            next.vm.put("/snapshot/load", &with(load(&state, &base), "resume_vm", true));
            assert!(loaded(&next).command("verify").contains("mismatched=0"));
            next.end();
        }
        guest.resume();
    }
    assert!(maps() > 0, "it was merged to the end");
    guest.end();
    other.end();
    let _ = sandbox.samepage(["fleet", "down"]).timeout(SOON).output().success();
    let _ = daemon.wait().success();
}
