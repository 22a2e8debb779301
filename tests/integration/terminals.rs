//! Terminals that go away, that are another job's, and signals that are ignored.

use std::path::Path;
use std::process::{Child, Command};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use tests::sandbox::{Process, Sandbox};
use tests::terminal::Terminal;
use tests::vm::{Client, SOON, eventually};
use tests::{require_kvm, samepage};

/// A child that ends with the test.
struct Ended(Child);

impl Ended {
    /// How it ended.
    fn code(&mut self) -> Option<i32> {
        let mut status = None;
        eventually("the end of a program", || {
            status = self.0.try_wait().expect("a child");
            status.is_some()
        });
        status.and_then(|status| status.code())
    }
}

impl Drop for Ended {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The VM processes of a sandbox.
fn vms(sandbox: &Sandbox) -> Vec<Process> {
    let run = format!("{} run", samepage().display());
    sandbox.processes().into_iter().filter(|p| p.args.starts_with(&run)).collect()
}

fn status(socket: &Path) -> Value {
    Client::connect(socket).ask(&json!({"op": "status"}))["status"].clone()
}

/// Waits for the VM's socket and asks it.
fn runs(sandbox: &Sandbox) -> Value {
    let socket = sandbox.runtime_dir().join("vm");
    eventually("a control socket", || socket.exists());
    status(&socket)
}

fn signal(pid: i32, signal: Signal) {
    kill_process(Pid::from_raw(pid).expect("a process"), signal).expect("a signal sent");
}

fn fleet(sandbox: &Sandbox) {
    let file = sandbox.file("fleet.toml");
    std::fs::write(&file, "name = \"f\"\nengine = \"off\"\n[[guest]]\nname = \"vm-a\"\nmemory = \"16M\"\n")
        .expect("a file");
    let _ = sandbox.samepage(["fleet".as_ref(), "up".as_ref(), file.as_os_str()]).output().success();
}

fn top_is_drawn(terminal: &Terminal) {
    eventually("guests on the terminal", || terminal.shows("vm-a "));
}

#[test]
fn top_ends_with_its_terminal_also_where_sighup_is_ignored() {
    require_kvm!();
    let sandbox = Sandbox::new();
    fleet(&sandbox);
    for to in ["2>$DIR/said", ""] {
        let terminal = Terminal::new(80, 24);
        // The signal is ignored, so that nothing but the terminal itself tells top; without the
        // file, what it says goes to a terminal that is gone.
        let script = format!("trap '' HUP; $SAMEPAGE top {to}; echo $? >$DIR/status");
        let mut shell = Ended(terminal.shell(&sandbox, &script));
        top_is_drawn(&terminal);
        terminal.hang_up();
        let _ = shell.code();
        let said = |name| std::fs::read_to_string(sandbox.runtime_dir().join(name)).expect("a file");
        assert_eq!(said("status").trim(), "0");
        assert!(said("said").contains("its terminal is gone"), "{}", said("said"));
    }
    let _ = sandbox.samepage(["fleet", "down"]).output().success();
}

#[test]
fn top_ends_by_a_signal_and_says_which() {
    require_kvm!();
    let sandbox = Sandbox::new();
    fleet(&sandbox);
    for (sent, name) in [(Signal::TERM, "SIGTERM"), (Signal::INT, "SIGINT"), (Signal::HUP, "SIGHUP")] {
        let terminal = Terminal::new(80, 24);
        let mut top = Ended(terminal.samepage(&sandbox, &["top"]));
        top_is_drawn(&terminal);
        signal(top.0.id() as i32, sent);
        assert_eq!(top.code(), Some(0));
        eventually("the signal's name", || terminal.shows(&format!("note: ended by {name}")));
    }
    // One that was ignored from the start is ignored; the next is not.
    let terminal = Terminal::new(80, 24);
    let mut shell = Ended(terminal.shell(&sandbox, "trap '' INT; exec $SAMEPAGE top"));
    top_is_drawn(&terminal);
    signal(shell.0.id() as i32, Signal::INT);
    signal(shell.0.id() as i32, Signal::TERM);
    assert_eq!(shell.code(), Some(0));
    eventually("the signal's name", || terminal.shows("note: ended by SIGTERM"));
    let _ = sandbox.samepage(["fleet", "down"]).output().success();
}

#[test]
fn top_in_the_background_prints_a_table() {
    require_kvm!();
    let sandbox = Sandbox::new();
    fleet(&sandbox);
    let terminal = Terminal::new(200, 40);
    let mut shell = Ended(terminal.shell(&sandbox, "timeout 60 $SAMEPAGE top; echo status $?"));
    assert_eq!(shell.code(), Some(0));
    eventually("a table", || terminal.shows("promised") && terminal.shows("status 0"));
    let _ = sandbox.samepage(["fleet", "down"]).output().success();
}

#[test]
fn a_vm_in_the_background_runs_and_leaves_the_terminal_alone() {
    require_kvm!();
    let sandbox = Sandbox::new();
    for script in [
        "set -m; $SAMEPAGE run --memory 16M --control $DIR/vm & wait; echo ended",
        "timeout 600 $SAMEPAGE run --memory 16M --control $DIR/vm; echo ended",
    ] {
        let terminal = Terminal::new(120, 40);
        let modes = terminal.modes();
        let mut shell = Ended(terminal.shell(&sandbox, script));
        let vm = runs(&sandbox);
        assert_eq!(vm["paused"], false, "{vm:#}");
        eventually("what it says", || terminal.shows("in the background of its terminal"));
        // What is typed is not for it, and does not stop it.
        terminal.type_keys("help\n");
        assert_eq!(status(&sandbox.runtime_dir().join("vm"))["paused"], false);
        assert_eq!(terminal.modes(), modes);
        signal(vm["pid"].as_i64().expect("a pid") as i32, Signal::TERM);
        let _ = shell.code();
        eventually("the end, and its reason", || {
            terminal.shows("note: SIGTERM: the VM ends") && terminal.shows("ended")
        });
        assert_eq!(terminal.modes(), modes);
        sandbox.assert_clean_within(SOON);
    }
}

#[test]
fn a_vm_that_is_brought_to_the_foreground_takes_the_terminal() {
    require_kvm!();
    let sandbox = Sandbox::new();
    let terminal = Terminal::new(120, 40);
    let modes = terminal.modes();
    let script = "set -m; $SAMEPAGE run --memory 16M --control $DIR/vm & while ! test -e $DIR/go; do sleep 0.05; done; fg; echo back";
    let mut shell = Ended(terminal.shell(&sandbox, script));
    let _ = runs(&sandbox);
    eventually("what it says", || terminal.shows("in the background of its terminal"));
    std::fs::write(sandbox.runtime_dir().join("go"), "").expect("a file");
    eventually("a raw terminal", || terminal.modes() != modes);
    terminal.type_keys("help\r");
    eventually("an answer of the guest", || terminal.shows("verify"));
    terminal.type_keys("\u{1}x");
    eventually("the shell again", || terminal.shows("back"));
    let _ = shell.code();
    eventually("the terminal as it was", || terminal.modes() == modes);
}

#[test]
fn a_vm_ends_with_its_terminal_unless_sighup_is_ignored() {
    require_kvm!();
    let sandbox = Sandbox::new();
    // In the foreground, with a shell before it that tells it nothing.
    let terminal = Terminal::new(80, 24);
    let script = "trap : HUP; $SAMEPAGE run --memory 16M --control $DIR/vm 2>$DIR/said; sleep 0.1";
    let mut shell = Ended(terminal.shell(&sandbox, script));
    let _ = runs(&sandbox);
    terminal.hang_up();
    let _ = shell.code();
    eventually("the end of the VM", || vms(&sandbox).is_empty());
    let said = std::fs::read_to_string(sandbox.runtime_dir().join("said")).expect("a file");
    assert!(said.contains("the VM ends"), "{said}");

    let terminal = Terminal::new(80, 24);
    let script = "trap '' HUP; $SAMEPAGE run --memory 16M --control $DIR/vm";
    let mut shell = Ended(terminal.shell(&sandbox, script));
    let vm = runs(&sandbox);
    terminal.hang_up();
    std::thread::sleep(Duration::from_millis(500));
    assert_eq!(status(&sandbox.runtime_dir().join("vm"))["paused"], false);
    signal(vm["pid"].as_i64().expect("a pid") as i32, Signal::HUP);
    assert_eq!(status(&sandbox.runtime_dir().join("vm"))["paused"], false);
    signal(vm["pid"].as_i64().expect("a pid") as i32, Signal::TERM);
    let _ = shell.code();
    eventually("the end of the VM", || vms(&sandbox).is_empty());
}

#[test]
fn signals_that_were_ignored_stay_ignored() {
    require_kvm!();
    let sandbox = Sandbox::new();
    fleet(&sandbox);
    let vm =
        format!("run --console none --memory 16M --control {}", sandbox.runtime_dir().join("vm").display());
    let image = format!("{}/image", sandbox.file("x").parent().expect("a directory").display());
    std::fs::write(&image, [7; 4096]).expect("an image");
    for command in [vm.as_str(), "balloon stats vm-a --watch --json", "measure vm-a --watch 600 --every 1"] {
        // A script's background job ignores SIGINT; nohup ignores SIGHUP.
        let script = format!("trap '' INT HUP; exec $SAMEPAGE {command}");
        let mut running = sandbox.shell(&script).start();
        let ready = || {
            let status =
                std::fs::read_to_string(format!("/proc/{}/status", running.pid())).unwrap_or_default();
            let mask = |name: &str| {
                let line = status.lines().find_map(|line| line.strip_prefix(name));
                u64::from_str_radix(line.unwrap_or("0").trim(), 16).unwrap_or(0)
            };
            // SIGTERM has a handler: so it has got as far as that.
            mask("SigCgt:") & (1 << (libc::SIGTERM - 1)) != 0
        };
        eventually("its handlers", ready);
        running.kill(Signal::INT);
        running.kill(Signal::HUP);
        std::thread::sleep(Duration::from_millis(300));
        assert!(running.is_running(), "{command}: {}", running.stderr_so_far());
        running.kill(Signal::TERM);
        let outcome = running.wait();
        assert!(outcome.stderr.contains("SIGTERM"), "{outcome}");
        assert!(!outcome.stderr.contains("SIGINT") && !outcome.stderr.contains("SIGHUP"), "{outcome}");
    }
    let _ = sandbox.samepage(["fleet", "down"]).output().success();
}

#[test]
fn a_second_signal_ends_at_once_and_says_so() {
    let sandbox = Sandbox::new();
    let file = tests::workspace().join("resources/scenarios/sim-idle-tax.toml");
    // What never ends by itself: its output has a reader that does not read.
    let script = format!("$SAMEPAGE simulate {} --hosts 100 --csv $DIR/fifo", file.display());
    let _ = Command::new("mkfifo").arg(sandbox.file("fifo")).status().expect("mkfifo");
    let _reader =
        std::fs::OpenOptions::new().read(true).write(true).open(sandbox.file("fifo")).expect("a FIFO");
    let running = sandbox.shell(&format!("exec {script}")).start();
    let wchan = || std::fs::read_to_string(format!("/proc/{}/syscall", running.pid())).unwrap_or_default();
    // write(2), which waits: it is the same whenever one looks.
    eventually("a full FIFO", || {
        let first = wchan();
        std::thread::sleep(Duration::from_millis(100));
        first.starts_with("1 ") && first == wchan()
    });
    running.kill(Signal::TERM);
    eventually("what it says", || running.stderr_so_far().contains("SIGTERM"));
    running.kill(Signal::TERM);
    let outcome = running.wait();
    assert_eq!(outcome.code, Some(130), "{outcome}");
    assert!(outcome.stderr.contains("error: SIGTERM again"), "{outcome}");
}
