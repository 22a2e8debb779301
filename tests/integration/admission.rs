//! Admission where other users have memory already: the system, other fleets, a control group's
//! page cache.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::{Value, json};
use tests::host::skipped;
use tests::require_kvm;
use tests::run::{Outcome, Run};
use tests::sandbox::Sandbox;
use tests::vm::{SOON, eventually};

const LIMIT: Duration = Duration::from_secs(240);

/// A fleet of one guest that is not filled.
fn fleet_file(sandbox: &Sandbox, name: &str, mib: u64, more: &str) -> PathBuf {
    let file = sandbox.file(&format!("{name}.toml"));
    let text = format!(
        "name = '{name}'\nengine = 'off'\n[overcommit]\nadmission = 'strict'\n{more}\n\
         [[guest]]\nname = 'g'\nmemory = '{mib}M'\nfill = {{ pages = 2048, unique = 100 }}\n"
    );
    fs::write(&file, text).expect("a file");
    file
}

fn up(sandbox: &Sandbox, file: &Path, more: &[&str]) -> Run {
    let args = [&["fleet", "up", file.to_str().expect("a path in UTF-8")], more].concat();
    sandbox.samepage(args).timeout(LIMIT)
}

fn down(sandbox: &Sandbox, fleet: &str) {
    let _ = sandbox.samepage(["fleet", "down", "--name", fleet]).timeout(LIMIT).output().success();
}

/// The room for a fleet, in MiB, and the whole decision.
fn room(sandbox: &Sandbox) -> (u64, Value) {
    let file = fleet_file(sandbox, "probe", 64, "");
    let dry = up(sandbox, &file, &["--dry-run", "--json"]).output();
    let decided: Value = serde_json::from_str(&dry.stdout).unwrap_or_else(|e| panic!("{e}: {dry}"));
    let term =
        |name: &str| decided["room"][name].as_u64().unwrap_or_else(|| panic!("no {name} in {decided:#}"));
    let taken =
        ["pool_pages", "system_pages", "others_pages", "overhead_pages"].map(term).iter().sum::<u64>();
    (term("total_pages").saturating_sub(taken) / 256, decided)
}

#[test]
fn strict_promises_nobody_what_the_system_or_another_fleet_has() {
    require_kvm!();
    let sandbox = Sandbox::new();
    let (mib, first) = room(&sandbox);
    assert!(first["room"]["system_pages"].as_u64() > Some(0) && mib > 256, "{first:#}");
    // Less than the host has, more than can be had: no kernel does with 64 MiB on a host of some
    // GiB.
    let total = first["room"]["total_pages"].as_u64().expect("pages") / 256;
    let refused = up(&sandbox, &fleet_file(&sandbox, "much", total - 64, ""), &[]).output();
    assert!(refused.code == Some(1) && refused.stderr.contains("more than what is available"), "{refused}");
    for term in [
        "held by the system",
        "in the pool of huge pages",
        "promised by other fleets",
        "for the VMs themselves",
    ] {
        assert!(refused.stderr.contains(term), "{term:?} is missing: {refused}");
    }
    // Two fleets of six tenths each, one after the other.
    let part = mib * 6 / 10;
    let _ = up(&sandbox, &fleet_file(&sandbox, "a", part, "policy = false"), &[]).output().success();
    let (_, second) = room(&sandbox);
    assert_eq!(second["others"][0]["fleet"], "a", "{second:#}");
    assert_eq!(second["others"][0]["promised_pages"], part * 256);
    // Nearly nothing of it is used; all of it is spoken for.
    let term = |name: &str| second["room"][name].as_u64();
    assert_eq!(term("others_pages"), Some(part * 256), "{second:#}");
    assert!(second["others"][0]["held_pages"].as_u64() < Some(part * 64), "{second:#}");
    let refused = up(&sandbox, &fleet_file(&sandbox, "b", part, "policy = false"), &[]).output();
    let named = format!("{part}.0 MiB promised by other fleets");
    assert!(refused.code == Some(1) && refused.stderr.contains(&named), "{refused}");
    // A daemon that is gone takes no promise with it, as long as the VM is there.
    let daemon = sandbox.processes().into_iter().find(|p| p.args.split(' ').nth(1) == Some("host"));
    daemon.expect("a daemon").kill();
    eventually("the daemon is gone", || room(&sandbox).1["others"][0]["ballooned_pages"] == json!(0));
    assert_eq!(room(&sandbox).1["others"][0]["promised_pages"], part * 256);
    down(&sandbox, "a");
    assert_eq!(room(&sandbox).1["others"], json!([]));
    let _ = up(&sandbox, &fleet_file(&sandbox, "b", part, "policy = false"), &[]).output().success();
    down(&sandbox, "b");
    sandbox.assert_clean_within(SOON);
}

#[test]
fn of_fleets_that_come_up_at_once_no_two_get_the_same_memory() {
    require_kvm!();
    let sandbox = Sandbox::new();
    let part = room(&sandbox).0 * 6 / 10;
    let names = ["a", "b", "c"];
    let started =
        names.map(|name| up(&sandbox, &fleet_file(&sandbox, name, part, "policy = false"), &[]).start());
    let outcomes = started.map(|running| running.wait());
    let (mut up, mut refused) = (Vec::new(), 0);
    for (name, outcome) in names.iter().zip(&outcomes) {
        match outcome.code {
            Some(0) => up.push(*name),
            _ => refused += usize::from(outcome.stderr.contains("promised by other fleets")),
        }
    }
    let said = outcomes.iter().map(Outcome::to_string).collect::<String>();
    assert_eq!((up.len(), refused), (1, 2), "{said}");
    down(&sandbox, up[0]);
    sandbox.assert_clean_within(SOON);
}

/// A control group of this test's own, below the one that it is in.
struct Group {
    directory: PathBuf,
    /// Its limit, and its page cache of files.
    limit: &'static str,
    stat: &'static str,
}

impl Group {
    /// With a limit in MiB.
    fn new(mib: u64) -> Result<Self, String> {
        let text = |path: &str| fs::read_to_string(path).unwrap_or_default();
        let (mounts, groups) = (text("/proc/self/mountinfo"), text("/proc/self/cgroup"));
        let mounted = |kind: &str, option: &str| {
            let line = mounts.lines().find(|line| {
                line.split_once(" - ").is_some_and(|(_, kinds)| {
                    let mut kinds = kinds.split(' ');
                    kinds.next() == Some(kind)
                        && kinds
                            .nth(1)
                            .is_some_and(|o| o.split(',').any(|o| o == option || option.is_empty()))
                })
            })?;
            line.split(' ').nth(4).map(PathBuf::from)
        };
        let own = |controller: &str| {
            let is = |line: &&str| {
                line.split(':').nth(1).is_some_and(|names| names.split(',').any(|n| n == controller))
            };
            groups
                .lines()
                .find(is)
                .and_then(|line| line.splitn(3, ':').nth(2))
                .unwrap_or("/")
                .trim_start_matches('/')
                .to_owned()
        };
        let name = format!("samepage-test-{}", std::process::id());
        let (directory, limit, stat) = match (mounted("cgroup", "memory"), mounted("cgroup2", "")) {
            (Some(top), _) => {
                (top.join(own("memory")).join(name), "memory.limit_in_bytes", "total_inactive_file ")
            }
            (None, Some(top)) => {
                // A group below the root: processes and limits are never in the same one.
                let _ = fs::write(top.join("cgroup.subtree_control"), "+memory");
                (top.join(name), "memory.max", "inactive_file ")
            }
            (None, None) => return Err("no hierarchy of control groups is mounted".into()),
        };
        fs::create_dir(&directory).map_err(|e| format!("{}: {e}", directory.display()))?;
        let group = Self { directory, limit, stat };
        let path = group.directory.join(group.limit);
        match fs::write(&path, format!("{}", mib << 20)) {
            Ok(()) => Ok(group),
            Err(error) => Err(format!("{}: {error}", path.display())),
        }
    }

    /// A command in this group, and all that it starts.
    fn run(&self, sandbox: &Sandbox, program: &Path, args: &[&str]) -> Run {
        let script = "echo $$ > \"$1\"/cgroup.procs && shift && exec \"$@\"";
        let mut all = vec!["-c", script, "sh", self.directory.to_str().expect("a path in UTF-8")];
        all.push(program.to_str().expect("a path in UTF-8"));
        all.extend(args);
        Run::program("/bin/sh", all).env("SAMEPAGE_RUNTIME_DIR", sandbox.runtime_dir()).timeout(LIMIT)
    }

    fn inactive_file_mib(&self) -> u64 {
        let stat = fs::read_to_string(self.directory.join("memory.stat")).unwrap_or_default();
        let value = stat.lines().find_map(|line| line.strip_prefix(self.stat)?.parse::<u64>().ok());
        value.unwrap_or(0) >> 20
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        let _ = fs::remove_dir(&self.directory);
    }
}

/// The size of the file that is read in the group, of 512 MiB.
pub(super) const CACHED_MIB: u64 = 440;

/// Beside the program: a file for the lab, where everything that is written is in a tmpfs, whose
/// pages could not be dropped. It is a hole.
pub(super) fn file_for_the_lab() -> PathBuf {
    tests::samepage().with_file_name("large-file-for-the-lab")
}

/// A file that nearly fills the group, and does not make it drop anything yet.
fn large_file(sandbox: &Sandbox, mib: u64) -> PathBuf {
    let for_the_lab = file_for_the_lab();
    if for_the_lab.metadata().is_ok_and(|meta| meta.len() >= mib << 20) {
        return for_the_lab;
    }
    let path = sandbox.file("large");
    let mut file = File::create(&path).expect("a file");
    let piece = vec![7; 1 << 20];
    (0..mib).for_each(|_| file.write_all(&piece).expect("a mebibyte"));
    file.sync_all().expect("a file on disk");
    // A page is charged to its first reader, which must be the group.
    rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).expect("its pages are dropped");
    path
}

#[test]
fn page_cache_in_a_control_group_is_memory_to_be_had() {
    require_kvm!();
    let sandbox = Sandbox::new();
    let group = match Group::new(512) {
        Ok(group) => group,
        Err(why) => return skipped("page_cache_in_a_control_group_is_memory_to_be_had", &why),
    };
    let large = large_file(&sandbox, CACHED_MIB);
    let cat = Path::new("/bin/cat");
    let read = group.run(&sandbox, cat, &[large.to_str().expect("a path in UTF-8")]).start();
    let _ = read.wait();
    let cached = group.inactive_file_mib();
    if cached < 200 {
        return skipped(
            "page_cache_in_a_control_group_is_memory_to_be_had",
            &format!("{cached} MiB are cached"),
        );
    }
    // Nearly all of the group is page cache. 320 MiB of guests fit all the same, strictly, and
    // nothing is short.
    let file = sandbox.file("cached.toml");
    fs::write(
        &file,
        // How others stall is not asked: version 1 tells of the whole host only.
        "name = 'cached'\nengine = 'off'\n[overcommit]\nadmission = 'strict'\n\
         knobs = { psi_soft_percent = 100, psi_hard_percent = 100, psi_low_percent = 100 }\n[defaults]\nmemory = '80M'\n\
         fill = { unique = 100 }\n[[guest]]\nname = 'g'\ncount = 4\n",
    )
    .expect("a file");
    let file = file.to_str().expect("a path in UTF-8");
    let samepage = &tests::samepage();
    let dry = group.run(&sandbox, samepage, &["fleet", "up", file, "--dry-run"]).output();
    assert!(dry.code == Some(0) && dry.stdout.contains("our control group"), "{dry}");
    let _ = group.run(&sandbox, samepage, &["fleet", "up", file]).output().success();
    let socket = sandbox.runtime_dir().join("fleets/cached/host.sock");
    let management = || -> Option<Value> {
        let stream = fleet::client::connect(&socket, SOON).ok()?;
        let answer: Value = fleet::client::ask(stream, &json!({"op": "management"}), SOON).ok()?;
        Some(answer["management"].clone())
    };
    // Filling is fast, and what falls fast is soft for a while.
    let host = |key: &str| management().and_then(|now| now["host"][key].as_u64());
    eventually("the memory state is high", || management().is_some_and(|now| now["memory_state"] == "high"));
    for _ in 0..20 {
        std::thread::sleep(Duration::from_millis(100));
        let now = management().expect("an answer");
        assert_eq!(now["memory_state"], "high", "{:#}", now["host"]);
    }
    // Most of what is free is page cache.
    assert!(host("free_pages") > Some(100 * 256), "{:?} of {:?}", host("free_pages"), host("capacity_pages"));
    // Too much is still too much: of the limit, less what the processes in the group have.
    let much = fs::read_to_string(file).expect("the file").replace("80M", "140M").replace("cached", "much");
    fs::write(file, much).expect("a file");
    let refused = group.run(&sandbox, samepage, &["fleet", "up", file]).output();
    assert!(refused.code == Some(1) && refused.stderr.contains("our control group's 512.0 MiB"), "{refused}");
    down(&sandbox, "cached");
    sandbox.assert_clean_within(SOON);
    eventually("the group is empty", || fs::remove_dir(&group.directory).is_ok());
}
