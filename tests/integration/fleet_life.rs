//! A fleet's life: what commands do to it that come at a bad moment, and what they must not do to
//! anything else.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Signal, getuid};
use serde_json::{Value, json};
use tests::require_kvm;
use tests::run::{Outcome, Run};
use tests::sandbox::{Process, Sandbox};
use tests::vm::{Client, SOON, Vm, eventually};

const LIMIT: Duration = Duration::from_secs(240);
const FLEET: &str = r#"
name = "life"
engine = "off"
[defaults]
memory = "16M"
fill = { common = 50, unique = 50, pages = 400 }
"#;

struct Fleet {
    sandbox: Sandbox,
    file: PathBuf,
}

impl Fleet {
    /// A fleet of guests called `vm-0` and so on.
    fn of(guests: u32) -> Self {
        let sandbox = Sandbox::new();
        let file = sandbox.file("fleet.toml");
        let fleet = Self { sandbox, file };
        fleet.write(&with_guests(guests));
        fleet
    }

    fn write(&self, text: &str) {
        fs::write(&self.file, text).expect("a fleet file");
    }

    fn fleet(&self, args: &[&str]) -> Run {
        self.sandbox.samepage(["fleet"].iter().chain(args)).timeout(LIMIT)
    }

    fn up_with(&self, args: &[&str]) -> Run {
        self.fleet(&[&["up", self.file.to_str().expect("UTF-8")], args].concat())
    }

    #[track_caller]
    fn up(&self) -> Outcome {
        self.up_with(&[]).output().success()
    }

    /// `up` fails, and says all of this.
    #[track_caller]
    fn up_refused(&self, parts: &[&str]) -> Outcome {
        let up = self.up_with(&[]).output();
        assert_eq!(up.code, Some(1), "{up}");
        for part in parts {
            assert!(up.stderr.contains(part), "{part:?} is not in {up}");
        }
        up
    }

    #[track_caller]
    fn down(&self) -> Outcome {
        self.fleet(&["down", "--name", "life"]).output().success()
    }

    #[track_caller]
    fn status(&self) -> Value {
        self.fleet(&["status", "--name", "life", "--json"]).output().success().json()
    }

    /// The directory of its sockets.
    fn dir(&self) -> PathBuf {
        self.sandbox.runtime_dir().join("fleets/life")
    }

    fn processes(&self, subcommand: &str) -> Vec<Process> {
        let is = |p: &Process| p.args.split(' ').nth(1) == Some(subcommand);
        self.sandbox.processes().into_iter().filter(is).collect()
    }

    fn vms(&self) -> Vec<i32> {
        self.processes("run").iter().map(|vm| vm.pid).collect()
    }

    /// All guests answer the daemon, and every page is as it was written.
    #[track_caller]
    fn assert_lives(&self, guests: usize) {
        let status = self.status();
        let running = status["guests"].as_array().map(|guests| {
            guests
                .iter()
                .filter(|guest| guest["state"] == "running")
                .filter_map(|guest| guest["pid"].as_i64())
                .count()
        });
        assert_eq!(running, Some(guests), "{status:#}");
        assert_eq!(
            (self.vms().len(), self.processes("host").len()),
            (guests, 1),
            "{:?}",
            self.sandbox.processes()
        );
        let _ = self.fleet(&["verify", "--name", "life"]).output().success();
    }

    fn kill_daemon(&self) {
        self.processes("host").iter().for_each(Process::kill);
        eventually("the daemon is gone", || self.processes("host").is_empty());
    }

    #[track_caller]
    fn end(self) {
        let _ = self.down();
        // Nothing comes after `down`: neither a process nor a file.
        let leaks = self.sandbox.leaks();
        assert!(leaks.is_empty(), "left behind:\n{}", leaks.join("\n"));
    }
}

fn with_guests(guests: u32) -> String {
    format!("{FLEET}[[guest]]\nname = \"vm\"\ncount = {guests}\n")
}

/// Removes a directory at once: in the middle of it things would come back.
fn remove(directory: &Path) {
    let gone = directory.with_extension("gone");
    fs::rename(directory, &gone).expect("a directory");
    fs::remove_dir_all(&gone).expect("a directory");
}

/// A process that has nothing to do with any of this.
struct Bystander(Child);

impl Bystander {
    fn new() -> Self {
        Self(Command::new("sleep").arg("600").spawn().expect("sleep"))
    }

    fn lives(&mut self) -> bool {
        matches!(self.0.try_wait(), Ok(None))
    }
}

impl Drop for Bystander {
    fn drop(&mut self) {
        let _ = self.0.kill().and_then(|()| self.0.wait());
    }
}

/// Answers at `path` as a VM called `vm-0` does, whose process is `pid`.
fn pretend(path: &Path, pid: u32) {
    let listener = UnixListener::bind(path).expect("a socket");
    let status = json!({"status": {"name": "vm-0", "pid": pid, "paused": false, "vcpus": 1, "memory_bytes": 16 << 20,
                                   "backend": "none", "extents": []}});
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let mut line = String::new();
            let _ = BufReader::new(&stream).read_line(&mut line);
            let answer = if line.contains("status") { status.to_string() } else { "\"done\"".into() };
            let _ = (&stream).write_all(format!("{answer}\n").as_bytes());
        }
    });
}

#[test]
fn a_fleet_that_goes_down_and_comes_up_at_once_lives() {
    require_kvm!();
    let fleet = Fleet::of(2);
    let _ = fleet.up();
    for _ in 0..30 {
        let _ = fleet.down();
        assert!(fleet.sandbox.processes().is_empty(), "after `down`: {:?}", fleet.sandbox.processes());
        let _ = fleet.up();
        fleet.assert_lives(2);
    }
    fleet.end();
}

#[test]
fn of_two_that_come_up_at_once_one_does_and_the_other_touches_nothing() {
    require_kvm!();
    for _ in 0..5 {
        let fleet = Fleet::of(4);
        let both = [fleet.up_with(&[]).start(), fleet.up_with(&[]).start()].map(|up| up.wait());
        let (won, lost): (Vec<_>, Vec<_>) = both.iter().partition(|up| up.code == Some(0));
        assert!(won.len() == 1 && lost[0].code == Some(1), "{} {}", both[0], both[1]);
        assert!(lost[0].stderr.contains("up already"), "{}", lost[0]);
        fleet.assert_lives(4);
        fleet.end();
    }
}

#[test]
fn an_up_that_fails_ends_only_what_it_started() {
    require_kvm!();
    let fleet = Fleet::of(2);
    let _ = fleet.up();
    let before = fleet.vms();
    fleet.kill_daemon();
    // Guests that come after those that run: a kernel that is none, too little memory for the rule,
    // too much for the host.
    let kernel = fleet.sandbox.file("kernel");
    fs::write(&kernel, "no kernel").expect("a file");
    let unstartable = format!("{}[[guest]]\nname = \"bad\"\nkernel = {kernel:?}\n", with_guests(2));
    let rule = "[overcommit]\nadmission = \"strict\"\n";
    let too_many = format!("{}{rule}capacity = \"40M\"\n", with_guests(3));
    let too_much = format!("{}{rule}capacity = \"999G\"\n", with_guests(2));
    for (text, part) in
        [(&unstartable, "bad"), (&too_many, "vm-2 is not admitted"), (&too_much, "this host has")]
    {
        fleet.write(text);
        let up = fleet.up_with(&[]).output();
        assert_eq!(up.code, Some(1), "{up}");
        assert!(up.stderr.contains(part), "{part:?} is not in {up}");
        assert!(up.stderr.contains("those that ran before run on: vm-0 (process"), "{up}");
        assert_eq!(fleet.vms(), before, "{up}");
        assert!(fleet.dir().join("vm-0.ctl").exists() && fleet.processes("host").is_empty(), "{up}");
    }
    // They are reached as before.
    fleet.write(&with_guests(2));
    let _ = fleet.up();
    fleet.assert_lives(2);
    assert_eq!(fleet.vms(), before);
    fleet.end();
    // The same where nothing ran before: nothing is left.
    let fleet = Fleet::of(2);
    for (text, said) in [
        (&unstartable, "guest bad: kernel"),
        (&too_many, "everything that was started is stopped"),
        (&too_much, "everything that was started is stopped"),
    ] {
        fleet.write(text);
        fleet.up_refused(&[said]);
        assert!(fleet.sandbox.leaks().is_empty(), "{:?}", fleet.sandbox.leaks());
    }
}

#[test]
fn a_file_that_was_changed_is_refused_by_what_differs_or_carried_out() {
    require_kvm!();
    let fleet = Fleet::of(4);
    let _ = fleet.up();
    let before = fleet.vms();
    fleet.kill_daemon();
    // One is not in the file any more, the others are otherwise; what the daemon alone does may
    // change.
    let others = |rest: &str| {
        format!(
            "{FLEET}[[guest]]\nname = \"vm-0\"\nmemory = \"32M\"\n[[guest]]\nname = \"vm-1\"\ndomain = \"other\"\n\
             [[guest]]\nname = \"vm-2\"\ncpus = 2\nshares = 7\n{rest}"
        )
    };
    fleet.write(&others(""));
    fleet.up_refused(&[
        "guest vm-0: memory: it runs with 16M, the file says 32M",
        "guest vm-1: domain: it runs with \"life\", the file says \"other\"",
        "guest vm-2: cpus: it runs with 1, the file says 2",
        "guest vm-3: it runs",
        "is not in the file",
        "--replace",
    ]);
    assert_eq!(fleet.vms(), before, "something was touched");
    // What can be carried out under a running VM is, and the rest is as it was.
    fleet.write(&format!(
        "{}[overcommit]\ncapacity = \"2G\"\n",
        with_guests(4).replace("count", "shares = 7\ncount")
    ));
    let _ = fleet.up();
    assert_eq!(fleet.vms(), before);
    fleet.assert_lives(4);
    fleet.kill_daemon();
    fleet.write(&others(""));
    let _ = fleet.up_with(&["--replace"]).output().success();
    fleet.assert_lives(3);
    let status = fleet.status();
    let of = |n: usize, key: &str| status["guests"][n][key].clone();
    assert_eq!(
        (of(0, "memory_bytes"), of(1, "domain"), of(2, "cpus")),
        (json!(32 << 20), json!("other"), json!(2))
    );
    assert!(fleet.vms().iter().all(|vm| !before.contains(vm)), "one that differs was taken over");
    // Not all of them need be: those that are as they should be run on.
    let before = fleet.vms();
    fleet.kill_daemon();
    fleet.write(&others("memory = \"32M\"\n[[guest]]\nname = \"vm-9\"\n"));
    let _ = fleet.up_with(&["--replace"]).output().success();
    fleet.assert_lives(4);
    let kept = fleet.vms().iter().filter(|vm| before.contains(vm)).count();
    assert_eq!(kept, 2, "{before:?} and now {:?}", fleet.vms());
    fleet.end();
}

/// What people type: its name, its file, or either behind the option.
#[test]
fn a_fleet_is_named_in_every_way_that_there_is() {
    require_kvm!();
    let fleet = Fleet::of(1);
    let _ = fleet.up();
    let file = fleet.file.to_str().expect("UTF-8");
    let asked = |args: &[&str]| fleet.sandbox.samepage(args.iter()).timeout(LIMIT).output();
    for way in
        [vec!["life"], vec![file], vec!["--name", "life"], vec!["--fleet", "life"], vec!["--name", file]]
    {
        for command in [vec!["fleet", "status"], vec!["fleet", "metrics"], vec!["top", "--once"]] {
            let _ = asked(&[command, way.clone()].concat()).success();
        }
    }
    let refused = asked(&["fleet", "down", "other"]);
    assert!(refused.code == Some(1) && refused.stderr.contains("life"), "{refused}");
    let both = asked(&["fleet", "down", "life", "--name", "life"]);
    assert_eq!(both.code, Some(2), "{both}");
    let _ = asked(&["fleet", "down", file]).success();
    let leaks = fleet.sandbox.leaks();
    assert!(leaks.is_empty(), "left behind:\n{}", leaks.join("\n"));
}

#[test]
fn a_file_means_the_same_by_whatever_path_it_is_read() {
    require_kvm!();
    let fleet = Fleet::of(1);
    fs::write(fleet.sandbox.file("disk"), [0; 4096]).expect("a disk");
    fleet.write(&format!("{}drives = [{{ path = \"disk\" }}]\n", with_guests(1)));
    let _ = fleet.up();
    let before = fleet.vms();
    fleet.kill_daemon();
    let directory = fleet.file.parent().expect("a directory");
    let name = directory.file_name().expect("its name");
    let detour = directory.join("..").join(name).join("fleet.toml");
    let _ = fleet.fleet(&["up", detour.to_str().expect("UTF-8")]).output().success();
    assert_eq!(fleet.vms(), before);
    fleet.end();
}

#[test]
fn a_number_that_is_another_process_by_now_is_not_taken_for_a_guest() {
    require_kvm!();
    let fleet = Fleet::of(1);
    let _ = fleet.up();
    let before = fleet.vms();
    fleet.kill_daemon();
    let path = fleet.dir().join("vm-0.json");
    let mut saved: Value = serde_json::from_slice(&fs::read(&path).expect("a state")).expect("JSON");
    let started = &mut saved["process"]["start_ticks"];
    *started = json!(started.as_u64().expect("a number") - 1);
    fs::write(&path, saved.to_string()).expect("a state");
    fleet.up_refused(&["guest vm-0: it runs", "what it was started with is not known"]);
    assert_eq!(fleet.vms(), before);
    fleet.end();
}

#[test]
fn a_fleet_whose_directory_is_removed_stays_within_reach() {
    require_kvm!();
    let fleet = Fleet::of(2);
    let _ = fleet.up();
    let before = fleet.vms();
    for removed in
        [fleet.dir(), fleet.sandbox.runtime_dir().join("fleets"), fleet.sandbox.runtime_dir().into()]
    {
        remove(&removed);
        // The name is taken from the first moment on.
        fleet.up_refused(&["up already"]);
        eventually("all sockets are there again", || {
            ["host.sock", "vm-0.ctl", "vm-0.com2", "vm-1.ctl", "vm-1.com2", "vm-1.json"]
                .iter()
                .all(|name| fleet.dir().join(name).exists())
        });
        eventually("all guests answer again", || {
            let status = fleet.status();
            status["guests"].as_array().is_some_and(|all| all.iter().all(|guest| guest["state"] == "running"))
        });
        fleet.assert_lives(2);
        assert!(fleet.status()["notes"].to_string().contains("was removed"), "{:#}", fleet.status());
    }
    assert_eq!(fleet.vms(), before);
    // What was written down again is enough for the next daemon.
    fleet.kill_daemon();
    let _ = fleet.up();
    assert_eq!(fleet.vms(), before);
    // Without a daemon, too, nothing of the same name comes up beside them.
    fleet.kill_daemon();
    remove(&fleet.dir());
    fleet.up_refused(&["vm-0", &before[0].to_string(), "vm-1", &before[1].to_string()]);
    assert_eq!(fleet.vms(), before);
    fleet.end();
}

#[test]
fn a_daemon_without_a_directory_is_asked_by_its_name() {
    require_kvm!();
    let fleet = Fleet::of(1);
    let _ = fleet.up();
    // A file in its place, at once: it cannot be made anew.
    let (file, gone) = (fleet.sandbox.runtime_dir().join("file"), fleet.sandbox.runtime_dir().join("gone"));
    fs::write(&file, "").expect("a file");
    fs::rename(fleet.dir(), gone).and_then(|()| fs::rename(file, fleet.dir())).expect("a file in its place");
    let said = || fleet.fleet(&["metrics", "--name", "life"]).output();
    assert!(said().success().stdout.contains("samepage"), "{}", said());
    let _ = fleet.down();
    assert!(fleet.sandbox.processes().is_empty(), "{:?}", fleet.sandbox.processes());
    assert!(fleet.dir().is_file(), "a user's file was removed");
}

#[test]
fn a_directory_that_others_may_write_is_used_by_no_command() {
    let sandbox = Sandbox::new();
    let mut bystander = Bystander::new();
    let fleets = sandbox.runtime_dir().join("fleets");
    fs::DirBuilder::new().recursive(true).mode(0o700).create(fleets.join("life")).expect("directories");
    pretend(&fleets.join("life/vm-0.ctl"), bystander.0.id());
    let file = sandbox.file("fleet.toml");
    fs::write(&file, with_guests(1)).expect("a fleet file");
    let commands: [&[&str]; 8] = [
        &["fleet", "down", "--name", "life"],
        &["fleet", "down"],
        &["fleet", "status", "--name", "life"],
        &["fleet", "verify"],
        &["top", "--once"],
        &["balloon", "get", "vm-0"],
        &["measure", "--fleet", "life"],
        &["fleet", "up", file.to_str().expect("UTF-8")],
    ];
    let refuse = |what: &str| {
        for command in commands {
            let outcome = sandbox.samepage(command).output();
            assert_eq!(outcome.code, Some(1), "{what}: {outcome}");
            assert!(outcome.stderr.contains("is not safe"), "{what}: {outcome}");
        }
    };
    let mode =
        |path: &Path, mode| fs::set_permissions(path, fs::Permissions::from_mode(mode)).expect("a mode");
    for path in [&fleets, sandbox.runtime_dir()] {
        mode(path, 0o777);
        refuse("a directory of mode 777");
        mode(path, 0o700);
    }
    if getuid().is_root() {
        std::os::unix::fs::chown(&fleets, Some(65_534), None).expect("root may");
        refuse("another user's directory");
        std::os::unix::fs::chown(&fleets, Some(0), None).expect("root may");
    }
    assert!(bystander.lives());
    // In our own, too, what a socket says is not enough to kill for.
    let down = sandbox.samepage(["fleet", "down", "--name", "life"]).output().success();
    assert!(down.stdout.contains("0 guests"), "{down}");
    assert!(bystander.lives(), "an unrelated process was ended");
    assert!(!fleets.join("life").exists());
}

#[test]
fn a_vm_is_not_asked_through_what_is_where_its_socket_was() {
    require_kvm!();
    let fleet = Fleet::of(1);
    let _ = fleet.up();
    let mut bystander = Bystander::new();
    let socket = fleet.dir().join("vm-0.ctl");
    fs::remove_file(&socket).expect("a socket");
    pretend(&socket, bystander.0.id());
    let status = fleet.fleet(&["status", "--name", "life", "--json"]).output();
    assert!(!status.stdout.contains(&format!("\"pid\":{},", bystander.0.id())), "{status}");
    let _ = fleet.down();
    assert!(fleet.vms().is_empty() && bystander.lives());
}

#[test]
fn dead_fleets_and_demos_hide_no_living_one() {
    require_kvm!();
    let fleet = Fleet::of(1);
    let _ = fleet.up();
    // As a killed demo leaves it.
    let dead = fleet.sandbox.runtime_dir().join("fleets/demo-1");
    fs::create_dir(&dead).expect("a directory");
    drop(UnixListener::bind(dead.join("guest-0.ctl")).expect("a socket"));
    let answers = |args: &[&str]| fleet.sandbox.samepage(args).timeout(LIMIT).output().success();
    let _ = answers(&["fleet", "status"]);
    let commands: [&[&str]; 6] = [
        &["fleet", "status"],
        &["fleet", "verify"],
        &["fleet", "metrics"],
        &["top", "--once"],
        &["balloon", "get", "vm-0"],
        &["measure"],
    ];
    for command in commands {
        for option in ["--name", "--fleet"] {
            let _ = answers(&[command, &[option, "life"]].concat());
        }
        let _ = answers(command);
    }
    // Only the demo itself ends a running demo.
    let demo = fleet
        .sandbox
        .samepage(["demo", "--guests", "1", "--memory", "256M", "--engine", "off"])
        .timeout(LIMIT)
        .start();
    let name = format!("demo-{}", demo.pid());
    let control = fleet.sandbox.runtime_dir().join(format!("fleets/{name}/guest-0.ctl"));
    eventually("its guest runs", || control.exists());
    demo.kill(Signal::STOP);
    let vms = fleet.vms();
    let down = fleet.fleet(&["down", "--name", &name]).output();
    assert!(
        down.code == Some(1) && down.stderr.contains(&format!("belongs to process {}", demo.pid())),
        "{down}"
    );
    assert_eq!(fleet.vms(), vms);
    let _ = answers(&["fleet", "status"]);
    demo.kill(Signal::KILL);
    drop(demo);
    eventually("its guest has ended with it", || fleet.vms().len() == 1);
    // The only one that lives is meant; then what the dead have left is removed by name.
    let _ = answers(&["fleet", "down"]);
    let none = fleet.fleet(&["status"]).output();
    assert!(
        none.code == Some(1) && none.stderr.contains("none is up") && none.stderr.contains("demo-1"),
        "{none}"
    );
    for name in [&name, "demo-1"] {
        let _ = answers(&["fleet", "down", "--name", name]);
    }
    assert!(fleet.sandbox.leaks().is_empty(), "{:?}", fleet.sandbox.leaks());
}

#[test]
fn a_vm_that_was_killed_can_be_started_again_with_the_same_sockets() {
    require_kvm!();
    let sandbox = Sandbox::new();
    let killed = Vm::start(&sandbox, "vm", &["--memory", "16M"]);
    let (control, com2) = Vm::sockets(&sandbox, "vm");
    killed.running().kill(Signal::KILL);
    drop(killed);
    assert!(control.exists() && com2.exists(), "SIGKILL leaves them");
    let again = Vm::start(&sandbox, "vm", &["--memory", "16M"]);
    let pid = again.running().pid();
    assert_eq!(again.status()["pid"], json!(pid));
    // One that lives is not replaced.
    let args = ["run", "--console", "none", "--control", control.to_str().expect("UTF-8")];
    let second = sandbox.samepage(args).output();
    assert!(second.code == Some(1) && second.stderr.contains("another VM uses it"), "{second}");
    assert_eq!(again.status()["pid"], json!(pid));
    // What has come to the place of its socket is not a VM's to remove.
    fs::remove_file(&control).expect("a socket");
    fs::write(&control, "a user's").expect("a file");
    again.running().kill(Signal::TERM);
    eventually("it has ended", || !com2.exists());
    drop(again);
    assert_eq!(fs::read_to_string(&control).expect("a file"), "a user's");
    // Nor to replace, be it a file or a link.
    let refused = sandbox.samepage(args).output();
    assert!(refused.code == Some(1) && refused.stderr.contains("no socket"), "{refused}");
    fs::remove_file(&control).expect("a file");
    std::os::unix::fs::symlink("elsewhere", &control).expect("a link");
    let refused = sandbox.samepage(args).output();
    assert!(refused.code == Some(1) && refused.stderr.contains("symbolic link"), "{refused}");
    assert!(fs::symlink_metadata(&control).is_ok());
}

#[test]
fn of_many_vms_that_replace_a_dead_ones_socket_one_gets_it() {
    require_kvm!();
    let sandbox = Sandbox::new();
    let control = sandbox.runtime_dir().join("vm.ctl");
    drop(UnixListener::bind(&control).expect("a socket"));
    let args = ["run", "--console", "none", "--memory", "16M", "--control", control.to_str().expect("UTF-8")];
    let mut all: Vec<_> = (0..4).map(|_| sandbox.samepage(args).timeout(LIMIT).start()).collect();
    let until = Instant::now() + SOON;
    let mut running =
        || all.iter_mut().filter_map(|vm| vm.is_running().then(|| vm.pid())).collect::<Vec<u32>>();
    while running().len() > 1 && Instant::now() < until {
        thread::sleep(Duration::from_millis(10));
    }
    let winners = running();
    eventually("it answers", || std::os::unix::net::UnixStream::connect(&control).is_ok());
    let status = Client::connect(&control).ask(&json!({"op": "status"}));
    assert_eq!(winners, [status["status"]["pid"].as_u64().expect("a number") as u32], "{status}");
}
