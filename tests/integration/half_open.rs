//! Files that are something else than files, or may not grow: FIFOs, full disks, limits,
//! descriptors that do not wait.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use kernel_view::meminfo::Meminfo;
use rustix::process::Signal;
use serde_json::{Value, json};
use tests::sandbox::Sandbox;
use tests::vm::{Client, SOON, eventually};
use tests::{api, require_kvm};

fn fifo(sandbox: &Sandbox, name: &str) -> PathBuf {
    let path = sandbox.file(name);
    assert!(Command::new("mkfifo").arg(&path).status().expect("mkfifo").success());
    path
}

#[test]
fn a_fifo_where_a_file_is_expected_is_refused_at_once() {
    require_kvm!();
    let sandbox = Sandbox::new();
    let _ = fifo(&sandbox, "fifo");
    for (command, status) in [
        ("run --kernel $DIR/fifo", 1),
        ("run --drive $DIR/fifo", 1),
        ("run --console none --kernel $DIR/kernel --initrd $DIR/fifo", 1),
        ("measure --file $DIR/fifo", 1),
        ("measure --file $DIR/page --page-flags $DIR/fifo", 1),
        ("fleet up $DIR/fifo", 1),
        ("host $DIR/fifo", 1),
        ("image --kernel $DIR/fifo --out $DIR/out", 1),
        ("image --deb $DIR/fifo --out $DIR/out", 1),
        ("experiment run identical-vms --results $DIR/fifo", 1),
        ("experiment run identical-vms --csv $DIR/fifo", 1),
        ("stress resources/scenarios/cow-storm.toml --html $DIR/fifo", 1),
        ("simulate resources/scenarios/sim-idle-tax.toml --hosts 1 --csv $DIR/fifo", 1),
    ] {
        fs::write(sandbox.file("page"), [7; 4096]).expect("a page");
        super::kernels::Elf::with(super::kernels::SILENCE).write(&sandbox, "kernel");
        let script = format!("cd {} && exec $SAMEPAGE {command}", tests::workspace().display());
        let outcome = sandbox.shell(&script).output();
        assert_eq!(outcome.code, Some(status), "{outcome}");
        let said = ["FIFO", "regular file"].iter().any(|word| outcome.stderr.contains(word));
        assert!(said, "{outcome}");
    }
}

#[test]
fn what_is_read_once_may_come_through_a_pipe_and_waiting_for_it_can_be_ended() {
    require_kvm!();
    let sandbox = Sandbox::new();
    let path = fifo(&sandbox, "fifo");
    let config = r#"{"boot-source":{"kernel_image_path":"builtin"},"machine-config":{"vcpu_count":1,"mem_size_mib":16}}"#;
    let vm = "run --no-api --console none --control $DIR/vm --config-file";
    for (script, scenario) in [
        (format!("exec $SAMEPAGE {vm} $DIR/fifo"), false),
        (format!("cd {} && exec $SAMEPAGE simulate $DIR/fifo --hosts 1", tests::workspace().display()), true),
    ] {
        let running = sandbox.shell(&script).start();
        std::thread::sleep(Duration::from_millis(300));
        running.kill(Signal::TERM);
        let ended = running.wait();
        assert!(ended.signal.is_some() || ended.code.is_some(), "{ended}");
        let running = sandbox.shell(&script).start();
        if scenario {
            let text = fs::read(tests::workspace().join("resources/scenarios/sim-idle-tax.toml"))
                .expect("a scenario");
            fs::write(&path, text).expect("a FIFO written");
            let _ = running.wait().success();
        } else {
            fs::write(&path, config).expect("a FIFO written");
            let control = sandbox.file("vm");
            eventually("a VM", || UnixStream::connect(&control).is_ok());
            let _ = Client::connect(&control).ask(&json!({"op": "stop"}));
            let _ = running.wait().success();
        }
    }
    let _ = sandbox.shell(&format!("$SAMEPAGE {vm} <(echo 'nonsense')")).output();
}

#[test]
fn a_console_and_metrics_may_be_fifos_that_are_read_later() {
    require_kvm!();
    let sandbox = Sandbox::new();
    let (console, metrics) = (fifo(&sandbox, "console"), fifo(&sandbox, "metrics"));
    let running = sandbox.shell("exec $SAMEPAGE run --console $DIR/console --api-sock $DIR/api").start();
    let socket = sandbox.file("api");
    // It is there a moment before it listens.
    eventually("the API", || UnixStream::connect(&socket).is_ok());
    let mut client = api::Http::connect(&socket);
    for (path, body) in [
        ("/boot-source", json!({"kernel_image_path": "builtin"})),
        ("/metrics", json!({"metrics_path": metrics})),
        ("/actions", json!({"action_type": "InstanceStart"})),
        ("/actions", json!({"action_type": "FlushMetrics"})),
    ] {
        let answer = client.ask("PUT", path, &body);
        assert_eq!(answer.status, 204, "{path}: {answer:?}");
    }
    let read = |path: &PathBuf| {
        fs::OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path).expect("a FIFO")
    };
    let some = |path: &PathBuf| {
        let (mut file, mut buffer) = (read(path), [0; 4096]);
        let mut bytes = 0;
        eventually("something in a FIFO", || {
            bytes = file.read(&mut buffer).unwrap_or(0);
            bytes > 0
        });
        String::from_utf8_lossy(&buffer[..bytes]).into_owned()
    };
    let sample: Value = serde_json::from_str(some(&metrics).lines().next().expect("a line")).expect("JSON");
    assert_eq!(sample["state"], "Running");
    assert!(!some(&console).is_empty());
    running.kill(Signal::TERM);
    let _ = running.wait().success();
}

#[test]
fn a_plain_file_as_standard_input_is_read_whole() {
    require_kvm!();
    let sandbox = Sandbox::new();
    // More than the 64 KiB that wait for a guest: what comes after them is obeyed, too.
    let lines = "\n".repeat(200_000);
    fs::write(sandbox.file("input"), format!("{lines}poweroff\n")).expect("a file");
    let outcome =
        sandbox.shell("$SAMEPAGE run --memory 16M <$DIR/input >/dev/null").timeout(SOON * 4).output();
    let _ = outcome.success();
}

#[test]
fn a_console_goes_on_where_its_output_does_not_wait() {
    require_kvm!();
    let sandbox = Sandbox::new();
    // The other side reads nothing for a while, so that there is no room, and then all.
    let program = "import fcntl, os, subprocess, sys, time\n\
        r, w = os.pipe()\n\
        fcntl.fcntl(w, fcntl.F_SETFL, fcntl.fcntl(w, fcntl.F_GETFL) | os.O_NONBLOCK)\n\
        fcntl.fcntl(w, 1031, 4096)\n\
        vm = subprocess.Popen([os.environ['SAMEPAGE'], 'run', '--memory', '16M'], stdin=subprocess.PIPE, stdout=w)\n\
        os.close(w)\n\
        vm.stdin.write(b'help\\n' * 200); vm.stdin.flush()\n\
        time.sleep(1)\n\
        vm.stdin.write(b'report\\nmarker-that-is-last\\npoweroff\\n'); vm.stdin.flush()\n\
        got = b''\n\
        while True:\n\
        \x20   part = os.read(r, 65536)\n\
        \x20   if not part: break\n\
        \x20   got += part\n\
        sys.exit(vm.wait() or (0 if b'marker-that-is-last' in got else 9))\n";
    fs::write(sandbox.file("program.py"), program).expect("a program");
    let _ = sandbox.shell("python3 $DIR/program.py").output().success();
}

#[test]
fn a_limit_of_file_sizes_kills_nothing_and_is_noted() {
    require_kvm!();
    let sandbox = Sandbox::new();
    fs::write(
        sandbox.file("fleet.toml"),
        "name = \"f\"\nengine = \"off\"\n[[guest]]\nname = \"a\"\nmemory = \"16M\"\n",
    )
    .expect("a fleet file");
    // Where nothing can be written the fleet does not come up, for no later daemon would know of
    // it.
    let none = sandbox.shell("ulimit -f 0; $SAMEPAGE fleet up $DIR/fleet.toml").output();
    assert_eq!(none.code, Some(1), "{none}");
    assert!(none.stderr.contains("File too large"), "{none}");
    sandbox.assert_clean_within(SOON);
    let _ = sandbox.shell("$SAMEPAGE fleet up $DIR/fleet.toml").output().success();
    let daemon = sandbox.samepage(["fleet", "status", "--json"]).output().success().json()["pid"].clone();
    let _ = sandbox.shell(&format!("prlimit --pid {daemon} --fsize=0")).output().success();
    // It has something to say, and to write down again.
    fs::remove_dir_all(sandbox.runtime_dir().join("fleets/f")).expect("the fleet's directory");
    let mut status = Value::Null;
    eventually("a note", || {
        let asked = sandbox.samepage(["fleet", "status", "--json"]).output();
        asked.code == Some(0) && {
            status = asked.json();
            let notes = status["notes"].to_string();
            notes.contains("the daemon's log cannot be written") && notes.contains("File too large")
        }
    });
    eventually("the guest runs on", || {
        let asked = sandbox.samepage(["fleet", "status", "--json"]).output();
        asked.code == Some(0) && asked.json()["guests"][0]["state"] == "running"
    });
    let _ = sandbox.samepage(["fleet", "down"]).output().success();
    sandbox.assert_clean_within(SOON);
}

#[test]
fn a_console_that_may_not_grow_is_an_error_of_the_console() {
    require_kvm!();
    let sandbox = Sandbox::new();
    fs::write(sandbox.file("full"), vec![b'x'; 1 << 20]).expect("a file");
    let script = "ulimit -f 1024; exec $SAMEPAGE run --memory 16M --console $DIR/full --control $DIR/vm";
    let running = sandbox.shell(script).start();
    let control = sandbox.file("vm");
    eventually("a VM", || UnixStream::connect(&control).is_ok());
    eventually("what is wrong", || {
        let status = &Client::connect(&control).ask(&json!({"op": "status"}))["status"];
        let trouble = status["log_trouble"].as_str().unwrap_or_default().to_owned();
        trouble.contains("File too large") && trouble.contains("ulimit -f")
    });
    running.kill(Signal::TERM);
    let _ = running.wait().success();
}

#[test]
fn an_initrd_is_read_to_its_end_however_long_it_is() {
    require_kvm!();
    if available_mib() < 6 << 10 {
        return tests::host::skipped(module_path!(), "6 GiB of memory are not available");
    }
    let sandbox = Sandbox::new();
    // One more than read(2) gives at once, and one more.
    let mut file = fs::File::create(sandbox.file("initrd")).expect("a file");
    file.set_len(2_147_479_553).expect("its length");
    file.write_all(b"begin").expect("its beginning");
    super::kernels::Elf::with(super::kernels::SILENCE).write(&sandbox, "kernel");
    let script = "exec $SAMEPAGE run --memory 3G --console none --kernel $DIR/kernel --initrd $DIR/initrd --control $DIR/vm";
    let running = sandbox.shell(script).timeout(SOON * 3).start();
    let control = sandbox.file("vm");
    eventually("a VM", || UnixStream::connect(&control).is_ok());
    let answer = Client::connect(&control).ask(&json!({"op": "status"}));
    assert_eq!(answer["status"]["paused"], false, "{answer}: {}", running.stderr_so_far());
    running.kill(Signal::TERM);
    let _ = running.wait().success();
}

fn available_mib() -> u64 {
    Meminfo::read().unwrap_or_default().number("MemAvailable").unwrap_or(0) >> 10
}
