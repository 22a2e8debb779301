//! `samepage measure --pid`: which memory of a process is taken for its guest's, in the shapes that
//! VMMs give it; and when a watch ends.

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};

use rustix::fs::{CWD, FileType, Mode, mknodat};
use serde_json::{Value, json};
use tests::sandbox::Sandbox;

use super::measure::{LIMIT, counts, text};

const MIB: u64 = 1 << 20;

/// A process with memory of these shapes, and where it is; see `tests/src/bin/memory-holder.rs`.
pub(super) struct Holder {
    child: Child,
    ranges: Vec<String>,
}

impl Holder {
    pub(super) fn start(mappings: &[&str]) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_memory-holder"));
        let mut child =
            command.args(mappings).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("a process");
        let lines = BufReader::new(child.stdout.take().expect("its output")).lines();
        let lines: Vec<String> = lines.map_while(Result::ok).take_while(|line| line != "ready").collect();
        assert_eq!(lines.len(), mappings.len(), "{lines:?}");
        let ranges = lines.iter().filter_map(|line| Some(line.split_once(' ')?.1.to_owned())).collect();
        Self { child, ranges }
    }

    pub(super) fn pid(&self) -> String {
        self.child.id().to_string()
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn measure(sandbox: &Sandbox, args: &[&str]) -> Value {
    sandbox.samepage([&["measure", "--json"], args].concat()).timeout(LIMIT).output().success().json()
}

/// Measures it by rule; `taken` are the mappings, by number, that must be guest memory, and all
/// others must be listed. What is listed can be measured by the range that is printed.
#[track_caller]
fn takes(mappings: &[&str], taken: &[usize]) -> Value {
    let sandbox = Sandbox::new();
    let holder = Holder::start(mappings);
    let pid = holder.pid();
    let found = measure(&sandbox, &["--pid", &pid]);
    let size = |n: usize| mappings[n].split(':').nth(1).and_then(|mib| mib.parse::<u64>().ok()).unwrap_or(0);
    let touched =
        |n: usize| mappings[n].split(':').nth(2).and_then(|mib| mib.parse::<u64>().ok()).unwrap_or(0);
    let total: u64 = taken.iter().map(|n| size(*n)).sum();
    assert_eq!(found["guests"][0]["total"], total * MIB / 4096, "{found:#}");
    let distinct: u64 = taken.iter().map(|n| touched(*n)).sum();
    assert_eq!(counts(&found)[3], distinct * MIB / 4096, "{found:#}");
    let left_out = found["left_out"].as_array().expect("a list");
    let listed: Vec<&str> = left_out.iter().filter_map(|left| left["range"].as_str()).collect();
    let expected = (0..mappings.len()).filter(|n| !taken.contains(n));
    for n in expected.clone() {
        assert!(listed.contains(&holder.ranges[n].as_str()), "{} is not listed: {found:#}", mappings[n]);
    }
    assert_eq!(listed.len(), expected.count(), "{left_out:#?}");
    let notes = found["notes"].to_string();
    for left in left_out {
        let range = format!("{pid}:{}", left["range"].as_str().expect("a range"));
        assert!(notes.contains(&format!("--range {range}")), "{range} in {notes}");
        if left["bytes"].as_u64() <= Some(4096 * MIB) {
            let found = measure(&sandbox, &["--pid", &pid, "--range", &range]);
            assert_eq!(found["guests"][0]["total"], left["bytes"].as_u64().unwrap_or(0) / 4096, "{found:#}");
        }
    }
    found
}

#[test]
fn a_reservation_does_not_hide_the_ram_beside_it() {
    for reserved in ["anon:2048:0", "anon:1048576:0"] {
        let found = takes(&[reserved, "anon:64:64"], &[1]);
        assert_eq!(found["left_out"][0]["reason"], "nothing of it is in memory", "{found:#}");
    }
}

#[test]
fn shared_memory_is_ram_and_a_framebuffer_beside_it_is_not() {
    // QEMU with virtiofs; its translated code is large, too.
    let found = takes(&["anon:16:16", "memfd:256:100", "code:64:32"], &[1]);
    assert_eq!(found["left_out"][0]["kind"], "executable", "{found:#}");
    // Mapped a second time, as by a backend in the same process, it counts once.
    let _ = takes(&["memfd:64:64", "again:64:0"], &[0]);
}

#[test]
fn a_file_in_memory_is_ram_wherever_it_is_mounted() {
    let tmpfs = ["/run", "/tmp", "/dev/shm"].into_iter().find(|path| {
        let kind = Command::new("stat").args(["-f", "-c", "%T", path]).output();
        kind.is_ok_and(|kind| kind.stdout.starts_with(b"tmpfs"))
    });
    let Some(tmpfs) = tmpfs else {
        return tests::host::skipped(module_path!(), "there is no tmpfs");
    };
    let directory = tempfile::tempdir_in(tmpfs).expect("a directory in memory");
    let ram = format!("shared:64:40:{}", text(&directory.path().join("ram")));
    let _ = takes(&[&ram, "anon:16:8"], &[0]);
}

#[test]
fn a_restored_guests_ram_is_a_file_that_is_mapped_privately() {
    let sandbox = Sandbox::new();
    let memory = format!("private:256:20:{}", text(&sandbox.file("vm.mem")));
    let found = takes(&[&memory], &[0]);
    let notes = found["notes"].to_string();
    assert!(notes.contains("mapped file") && notes.contains("236.0 MiB"), "{notes}");
    // Cloud Hypervisor on a file of a disk, with something anonymous beside it.
    let memory = format!("shared:64:40:{}", text(&sandbox.file("ch.mem")));
    let _ = takes(&[&memory, "anon:32:8"], &[0]);
}

#[test]
fn nothing_of_nothing_is_no_part() {
    let sandbox = Sandbox::new();
    let holder = Holder::start(&["anon:64:20"]);
    let found = measure(&sandbox, &["--pid", &holder.pid()]);
    assert_eq!(found["shared_now"]["fraction_of_ideal"], json!(null), "{found:#}");
    let said = sandbox.samepage(["measure", "--pid", &holder.pid()]).timeout(LIMIT).output().success().stdout;
    let last = said.lines().last().unwrap_or_default();
    assert!(!last.contains("100.0 %") && last.contains("20.0 MiB in memory"), "{last}");
}

#[test]
fn a_watch_looks_at_its_end() {
    let sandbox = Sandbox::new();
    let holder = Holder::start(&["anon:16:1"]);
    let watched = measure(&sandbox, &["--pid", &holder.pid(), "--watch", "2", "--every", "60"]);
    let looks = watched["watched"]["looks"].as_array().expect("looks");
    assert_eq!(looks.len(), 2, "{looks:#?}");
    assert!(looks[1]["seconds"].as_f64() >= Some(2.0), "{looks:#?}");
}

/// A core by gdb has the same memory as the process.
#[test]
fn a_core_is_measured_as_its_process() {
    let sandbox = Sandbox::new();
    let holder = Holder::start(&["anon:16:16", "memfd:128:80", "anon:256:0"]);
    let core = sandbox.file("core");
    let made = Command::new("gcore").arg("-o").arg(&core).arg(holder.pid()).output();
    let Ok(made) = made.map_err(|e| tests::host::skipped(module_path!(), &format!("gcore: {e}"))) else {
        return;
    };
    let core = format!("{}.{}", text(&core), holder.pid());
    assert!(std::fs::File::open(&core).is_ok(), "{made:?}");
    let by_pid = measure(&sandbox, &["--pid", &holder.pid()]);
    let by_core = measure(&sandbox, &["--file", &core]);
    let [zero, within, between, distinct] = counts(&by_core);
    // Pages that were not there are zeros in a core.
    assert_eq!([within, between, distinct], counts(&by_pid)[1..], "{by_core:#}");
    assert_eq!((distinct, zero), (80 << 8, 48 << 8), "{by_core:#}");
    let notes = by_core["notes"].to_string();
    assert!(notes.contains("ELF core of a process") && notes.contains("left out"), "{notes}");
    // Cut short, as where the disk was full.
    let file = std::fs::File::options().write(true).open(&core).expect("the core");
    file.set_len(file.metadata().expect("the core").len() / 2).expect("a shorter core");
    let outcome = sandbox.samepage(["measure", "--file", &core]).timeout(LIMIT).output();
    assert!(outcome.code == Some(1) && outcome.stderr.contains("cut short"), "{outcome}");
}

#[test]
fn a_fifo_is_not_waited_for() {
    let sandbox = Sandbox::new();
    let fifo = sandbox.file("fifo");
    let mode = Mode::RUSR | Mode::WUSR;
    mknodat(CWD, &fifo, FileType::Fifo, mode, 0).expect("a FIFO");
    let outcome = sandbox.samepage(["measure", "--file", text(&fifo)]).timeout(LIMIT).output();
    assert!(outcome.code == Some(1) && outcome.stderr.contains("no regular file"), "{outcome}");
}
