//! `samepage measure`: figures against an independent count, of files, processes, QEMU's guests,
//! fleets; and bad input.
//!
//! The independent count reads memory by itself and joins whole pages by their bytes, in a sorted
//! map.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::Duration;

use kernel_view::pagemap::Pagemap;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use tests::lab::image_dir;
use tests::run::Outcome;
use tests::sandbox::Sandbox;
use tests::vm::{Vm, eventually};
use tests::{require_kvm, require_slabs};

use super::nested::need_image;

const PAGE: usize = 4096;
/// An index of 1 MiB, and the few sets of guests that come on top of it.
const WITH_SETS: u64 = (1 << 20) + (16 << 10);
pub(super) const LIMIT: Duration = Duration::from_secs(240);

/// Zero, within a guest, between guests, distinct.
pub(super) type Counts = [u64; 4];

/// By whole pages. Each guest is its pages.
fn count(guests: &[Vec<[u8; PAGE]>]) -> Counts {
    let mut holders: BTreeMap<&[u8; PAGE], BTreeSet<usize>> = BTreeMap::new();
    let (mut zero, mut filled) = (0, 0);
    for (guest, pages) in guests.iter().enumerate() {
        for page in pages {
            if page.iter().all(|byte| *byte == 0) {
                zero += 1;
            } else {
                filled += 1;
                holders.entry(page).or_default().insert(guest);
            }
        }
    }
    let held: u64 = holders.values().map(|guests| guests.len() as u64).sum();
    let distinct = holders.len() as u64;
    [zero, filled - held, held - distinct, distinct]
}

pub(super) fn counts(measured: &Value) -> Counts {
    let content = &measured["content"];
    ["zero", "self_duplicates", "cross_duplicates", "distinct"]
        .map(|class| content[class].as_u64().unwrap_or_else(|| panic!("no {class} in {measured:#}")))
}

/// The present pages of a process at `ranges`.
fn pages_of(pid: u32, ranges: &[Range<u64>]) -> Vec<[u8; PAGE]> {
    let memory = fs::File::open(format!("/proc/{pid}/mem")).expect("memory of a process of ours");
    let mut pagemap = Pagemap::open(pid).expect("its pagemap");
    let (mut pages, mut entries) = (Vec::new(), Vec::new());
    for range in ranges {
        let count = (range.end - range.start) as usize / PAGE;
        pagemap.read(memory::Hva(range.start), count, &mut entries).expect("its entries");
        for (hva, entry) in range.clone().step_by(PAGE).zip(&entries) {
            if entry.present() {
                let mut page = [0; PAGE];
                memory.read_exact_at(&mut page, hva).expect("a page that is there");
                pages.push(page);
            }
        }
    }
    pages
}

#[track_caller]
fn measure(sandbox: &Sandbox, args: &[&str]) -> Value {
    let args = [&["measure", "--json"], args].concat();
    sandbox.samepage(args).timeout(LIMIT).output().success().json()
}

pub(super) fn text(path: &Path) -> &str {
    path.to_str().expect("UTF-8")
}

/// A page for each number; 0 is zeros.
pub(super) fn pages(numbers: impl IntoIterator<Item = u32>) -> Vec<[u8; PAGE]> {
    let page = |number: u32| {
        let mut page = [0; PAGE];
        page.as_chunks_mut::<4>().0.iter_mut().for_each(|word| *word = number.to_le_bytes());
        page
    };
    numbers.into_iter().map(page).collect()
}

pub(super) fn image(sandbox: &Sandbox, name: &str, pages: &[[u8; PAGE]]) -> String {
    let path = sandbox.file(name);
    fs::write(&path, pages.as_flattened()).expect("a file in the sandbox");
    text(&path).to_owned()
}

#[test]
fn images_are_counted_as_by_hand() {
    let sandbox = Sandbox::new();
    let guests = [
        pages((1..=500).chain([0; 40]).chain(1..=30)),
        pages((301..=700).chain([0; 7])),
        pages((1..=100).chain(9000..9050)),
    ];
    let files: Vec<String> = (0..3).map(|n| image(&sandbox, &format!("{n}.mem"), &guests[n])).collect();
    let [a, b, c] = [&files[0], &files[1], &files[2]];
    let (csv, html) = (sandbox.file("out.csv"), sandbox.file("out.html"));
    let domain = format!("pair={a},{b}");
    let found = measure(
        &sandbox,
        &[
            "--file",
            a,
            "--file",
            b,
            "--file",
            c,
            "--domain",
            &domain,
            "--csv",
            text(&csv),
            "--html",
            text(&html),
        ],
    );
    assert_eq!(counts(&found), count(&guests));
    assert_eq!(counts(&found), [47, 30, 300, 750]);
    assert_eq!(found["pairs"], json!([[500, 200, 100], [200, 400, 0], [100, 0, 150]]));
    assert_eq!(found["held_by"], json!({"1": 450, "2": 300}));
    // Within domains the third file shares with no other.
    assert_eq!(found["ideal_saved_pages"], 377);
    assert_eq!(found["ideal_within_domains_pages"], 277);
    assert_eq!(found["runs"], json!({"runs": 2, "pages_in_8": 300, "pages_in_64": 300, "longest": 200}));
    let growth: Vec<_> = (0..3).map(|n| found["growth"][n]["distinct"].as_u64()).collect();
    assert_eq!(growth, [Some(500), Some(700), Some(750)]);
    let csv = fs::read_to_string(csv).expect("the CSV");
    assert!(csv.contains("\ncontent.zero,47\n") && csv.contains("\npairs.0.1,200\n"), "{csv}");
    let html = fs::read_to_string(html).expect("the page");
    assert!(html.starts_with("<!doctype html>") && html.matches("<svg").count() >= 5, "{html}");
    assert!(!html.contains("http"), "it needs no network");
}

#[test]
fn pages_that_differ_a_little_are_near_duplicates_and_others_are_not() {
    let sandbox = Sandbox::new();
    // Words that have nothing in common with each other, but for the first of each page all alike.
    let noise = |n: u32| n.wrapping_mul(0x9e37_79b9).rotate_left(n % 31) ^ n;
    let mut alike = pages([0; 300]);
    for (number, page) in (0..).zip(&mut alike) {
        page.as_chunks_mut::<4>().0.iter_mut().zip(7..).for_each(|(word, n)| *word = noise(n).to_le_bytes());
        page[..4].copy_from_slice(&u32::to_le_bytes(number));
    }
    let file = image(&sandbox, "alike", &alike);
    let beyond = measure(&sandbox, &["--file", &file, "--beyond", "1000"])["beyond"].clone();
    assert_eq!((&beyond["sampled"], &beyond["contents"]), (&json!(300), &json!(300)));
    assert_eq!(beyond["near_duplicates"], json!({"mean": 1.0, "error_95": 0.0}), "{beyond:#}");
    // A literal of four bytes at most, a copy of the rest, and their records.
    assert!(beyond["patch_bytes"]["mean"].as_f64() <= Some(12.0), "{beyond:#}");
    assert!(beyond["lz4_saves"]["mean"].as_f64() < Some(0.1), "noise does not compress: {beyond:#}");
    let file = image(&sandbox, "apart", &pages(1..=300));
    let beyond = measure(&sandbox, &["--file", &file, "--beyond", "1000"])["beyond"].clone();
    assert_eq!(beyond["near_duplicates"]["mean"], 0.0, "{beyond:#}");
    assert!(beyond["lz4_saves"]["mean"].as_f64() > Some(0.9), "{beyond:#}");
}

#[test]
fn a_small_index_changes_nothing_but_the_passes() {
    let sandbox = Sandbox::new();
    let guests = [pages(1..100_000), pages(50_000..120_000)];
    let files: Vec<String> = (0..2).map(|n| image(&sandbox, &format!("{n}.mem"), &guests[n])).collect();
    let args = ["--file", &files[0], "--file", &files[1]];
    let whole = measure(&sandbox, &args);
    let small = measure(&sandbox, &[&args[..], &["--index-limit", "1M", "--threads", "3"]].concat());
    assert_eq!((counts(&whole), counts(&small)), ([0, 0, 50_000, 119_999], [0, 0, 50_000, 119_999]));
    assert_eq!(whole["passes"], 1);
    assert!(
        small["passes"].as_u64() > Some(2) && small["index_bytes"].as_u64() < Some(WITH_SETS),
        "{small:#}"
    );
    assert!(
        small["runs"].is_null() && small["notes"][0].as_str().is_some_and(|n| n.contains("index")),
        "{small:#}"
    );
}

#[test]
fn memory_of_a_process_is_counted_as_it_holds_it() {
    let sandbox = Sandbox::new();
    // This process: a page of it where pages lie.
    let content = pages((1..=600).chain([0; 20]).chain(1..=50));
    let mut memory = vec![0u8; (content.len() + 1) * PAGE];
    let start = memory.as_ptr().addr().next_multiple_of(PAGE);
    let offset = start - memory.as_ptr().addr();
    memory[offset..offset + content.len() * PAGE].copy_from_slice(content.as_flattened());
    let range = format!("{start:x}-{:x}", start + content.len() * PAGE);
    let pid = std::process::id().to_string();
    let found = measure(&sandbox, &["--pid", &pid, "--range", &range]);
    assert_eq!(counts(&found), count(&[content]));
    assert_eq!(found["volatile"]["looked_pages"], 670);
    assert_eq!(found["volatile"]["changed_pages"], 0);
    // Two ranges of it are two extents of one guest.
    let middle = start + 10 * PAGE;
    let first = format!("{start:x}-{middle:x}");
    let second = format!("{pid}:{middle:x}-{:x}", middle + 600 * PAGE);
    let halves = measure(&sandbox, &["--pid", &pid, "--range", &first, "--range", &second]);
    assert_eq!(counts(&halves), [10, 0, 0, 600]);
    drop(memory);
}

/// The mappings that the rule takes for guest memory, found another way: the largest one alone.
fn largest(pid: u32) -> Vec<Range<u64>> {
    let maps = fs::read_to_string(format!("/proc/{pid}/maps")).expect("its maps");
    let ranges = maps.lines().filter(|line| line.contains(" rw-")).filter_map(|line| {
        let (start, end) = line.split(' ').next()?.split_once('-')?;
        Some(u64::from_str_radix(start, 16).ok()?..u64::from_str_radix(end, 16).ok()?)
    });
    ranges.max_by_key(|range| range.end - range.start).into_iter().collect()
}

#[test]
fn a_vm_is_found_by_rule_and_counted_right() {
    require_kvm!();
    let sandbox = Sandbox::new();
    let vm = Vm::start(&sandbox, "vm", &["--memory", "64M"]);
    let mut com2 = vm.com2();
    assert!(com2.line().is_some_and(|line| line.starts_with("ready ")));
    let fill = "fill seed=1 common=7 zero=10 common_pct=50 dup=20 unique=20 pages=8000";
    assert_eq!(com2.command(fill), "ok command=fill pages=8000");
    assert_eq!(vm.ask(&json!({"op": "pause"})), json!("done"));
    let pid = vm.running().pid();
    let found = measure(&sandbox, &["--pid", &pid.to_string()]);
    let expected = count(&[pages_of(pid, &largest(pid))]);
    assert_eq!(counts(&found), expected);
    assert!(expected[0] >= 800 && expected[1] >= 1000, "{expected:?}");
    assert_eq!(found["guests"][0]["total"], (64 << 20) / PAGE as u64);
    assert_eq!(found["volatile"]["changed_pages"], 0, "it is paused");
}

/// A process with 512 MiB that it goes on filling from `source`.
struct Filler(Child);

impl Filler {
    fn start(source: &str) -> Self {
        let mut command = Command::new("dd");
        command.args([&format!("if={source}"), "of=/dev/null", "bs=512M", "count=1000000"]);
        let child = command.stderr(Stdio::null()).spawn().expect("dd");
        let filler = Self(child);
        eventually("the memory is filled", || filler.resident_kib() > 500 << 10);
        filler
    }

    fn pid(&self) -> String {
        self.0.id().to_string()
    }

    fn resident_kib(&self) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.0.id())).unwrap_or_default();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        line.and_then(|l| l.split_whitespace().next()?.parse().ok()).unwrap_or(0)
    }

    fn is_stopped(&self) -> bool {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.0.id())).unwrap_or_default();
        stat.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with('T'))
    }
}

impl Drop for Filler {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn what_changes_is_volatile_and_what_is_frozen_does_not() {
    let sandbox = Sandbox::new();
    let filler = Filler::start("/dev/urandom");
    let found = measure(&sandbox, &["--pid", &filler.pid()]);
    assert!(found["volatile"]["changed_pages"].as_u64() > Some(0), "{:#}", found["volatile"]);
    assert!(found["volatile"]["share"]["error_95"].as_f64() > Some(0.0), "a part of it was looked at twice");
    assert!(found["volatile"]["pages_error_95"].as_u64() > Some(0), "{:#}", found["volatile"]);
    let said = sandbox.samepage(["measure", "--pid", &filler.pid()]).timeout(LIMIT).output().success().stdout;
    assert!(said.lines().any(|line| line.contains("volatile") && line.contains("pages (95 %)")), "{said}");
    let frozen = measure(&sandbox, &["--pid", &filler.pid(), "--freeze"]);
    assert!(frozen["volatile"].is_null(), "{frozen:#}");
    assert!(!filler.is_stopped());
}

#[test]
fn a_frozen_process_goes_on_whatever_happens() {
    let sandbox = Sandbox::new();
    let filler = Filler::start("/dev/zero");
    for signal in [Signal::KILL, Signal::INT, Signal::ABORT] {
        // It may be over before we have looked: then once more.
        let met = (0..50).any(|_| {
            let args = ["measure", "--pid", &filler.pid(), "--freeze", "--threads", "1", "--beyond"];
            let mut running = sandbox.samepage(args).timeout(LIMIT).start();
            while running.is_running() && !filler.is_stopped() {}
            running.kill(signal);
            let outcome = running.wait();
            eventually("it goes on", || !filler.is_stopped());
            outcome.signal == Some(signal.as_raw()) || outcome.stderr.contains("interrupted")
        });
        assert!(met, "{signal:?} never came while it was frozen");
    }
    sandbox.assert_clean_within(Duration::from_secs(10));
}

/// A Debian kernel with our agent under QEMU's emulation, with an ordinary command line.
struct Qemu(Child);

impl Qemu {
    fn start(seed: u32) -> Self {
        let image = image_dir();
        // A timer interrupt of an emulated machine may come so late on a busy host that the kernel
        // gives up.
        let append = format!("console=ttyS0 quiet panic=-1 no_timer_check seed={seed}");
        let mut command = Command::new("qemu-system-x86_64");
        command.args([
            "-accel",
            "tcg",
            "-cpu",
            "max",
            "-m",
            "192",
            "-nodefaults",
            "-no-reboot",
            "-nographic",
        ]);
        command.args(["-serial", "stdio", "-append", &append, "-kernel"]).arg(image.join("vmlinux"));
        command.arg("-initrd").arg(image.join("initrd.cpio"));
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("QEMU");
        let output = child.stdout.take().expect("its output");
        let qemu = Self(child);
        let lines = std::io::BufRead::lines(std::io::BufReader::new(output));
        let mut said = Vec::new();
        let mut ready = false;
        for line in lines.map_while(Result::ok) {
            ready = line.trim().starts_with("ready ");
            said.push(line);
            if ready {
                break;
            }
        }
        assert!(ready, "the guest did not boot:\n{}", said.join("\n"));
        qemu
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.0), signal).expect("a process of ours");
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn debian_under_qemu_is_counted_right() {
    need_image();
    let sandbox = Sandbox::new();
    let guests: Vec<Qemu> = (0..2).map(Qemu::start).collect();
    let pids: Vec<u32> = guests.iter().map(|guest| guest.0.id()).collect();
    // Ours to stop: the count comes after the measurement.
    guests.iter().for_each(|guest| guest.signal(Signal::STOP));
    thread::sleep(Duration::from_millis(200));
    let [a, b] = [pids[0].to_string(), pids[1].to_string()];
    let found = measure(&sandbox, &["--pid", &a, "--pid", &b, "--beyond", "500"]);
    let expected: Vec<_> = pids.iter().map(|pid| pages_of(*pid, &largest(*pid))).collect();
    assert_eq!(counts(&found), count(&expected));
    assert_eq!(found["guests"][0]["total"], (192 << 20) / PAGE as u64, "{:#}", found["guests"]);
    assert!(found["pairs"][0][1].as_u64() > Some(1000), "the same kernel: {:#}", found["pairs"]);
    let beyond = &found["beyond"];
    assert!(beyond["lz4_saves"]["mean"].as_f64() > Some(0.1), "code and tables compress: {beyond:#}");
    assert!(beyond["near_duplicates"]["error_95"].as_f64() < Some(0.05), "{beyond:#}");
}

fn fleet_file(sandbox: &Sandbox, engine: &str) -> String {
    let path = sandbox.file("fleet.toml");
    let fleet = format!(
        "name = \"measured\"\nengine = \"{engine}\"\n[defaults]\nmemory = \"48M\"\n\
         fill = {{ zero = 10, common = 40, duplicate = 10, unique = 40 }}\n[[guest]]\nname = \"g\"\ncount = 3\n"
    );
    fs::write(&path, fleet).expect("a file in the sandbox");
    text(&path).to_owned()
}

/// What `fleet status` and `measure` call saved, and the ideal.
fn saved(sandbox: &Sandbox) -> [u64; 3] {
    let run = |args: &[&str]| sandbox.samepage(args).timeout(LIMIT).output().success().json();
    let status = run(&["fleet", "status", "--settle", "--json"]);
    let found = run(&["measure", "--json"]);
    let number = |value: &Value| value.as_u64().unwrap_or_else(|| panic!("{found:#}"));
    let now = &found["shared_now"];
    [
        number(&status["saved_pages"]),
        number(&now["saved_pages"]),
        number(&found["ideal_within_domains_pages"]),
    ]
}

#[test]
fn a_fleet_is_measured_as_its_status_has_it() {
    require_slabs!();
    for engine in ["off", "slab"] {
        let sandbox = Sandbox::new();
        let file = fleet_file(&sandbox, engine);
        let _ = sandbox.samepage(["fleet", "up", &file]).timeout(LIMIT).output().success();
        let [by_status, by_measure, ideal] = saved(&sandbox);
        assert!(by_status.abs_diff(by_measure) <= 64, "{engine}: {by_status} and {by_measure} pages saved");
        if engine == "off" {
            assert!(by_measure * 10 < ideal && ideal > 8000, "{by_measure} of {ideal}");
        } else {
            // Zeros were given back, so that what is left could save less, and does.
            assert!(by_measure * 10 > ideal * 9, "{by_measure} of {ideal}");
            // Checking reads zeros that were given back: they are on the zero frame then, and
            // nothing else is saved.
            let _ = sandbox.samepage(["fleet", "verify"]).timeout(LIMIT).output().success();
            let [verified, ..] = saved(&sandbox);
            assert!(verified.abs_diff(by_status) <= 64, "{by_status} pages saved, {verified} after a check");
            let one = measure(&sandbox, &["g-1"]);
            assert_eq!(one["guests"].as_array().map(Vec::len), Some(1), "{one:#}");
            let watched = measure(&sandbox, &["--watch", "2", "--every", "1"]);
            let looks = watched["watched"]["looks"].as_array().cloned().unwrap_or_default();
            assert_eq!(looks.len(), 3, "{watched:#}");
            assert!(looks.iter().all(|look| look["shared_pages"].as_u64() > Some(5000)), "{looks:#?}");
        }
        let _ = sandbox.samepage(["fleet", "down"]).timeout(LIMIT).output().success();
        sandbox.assert_clean_within(Duration::from_secs(10));
    }
}

#[track_caller]
fn refused(sandbox: &Sandbox, args: &[&str], expected: &[&str]) -> Outcome {
    let outcome = sandbox.samepage([&["measure"], args].concat()).timeout(LIMIT).output();
    assert!(matches!(outcome.code, Some(1 | 2)), "expected a failure: {outcome}");
    for words in expected {
        assert!(outcome.stderr.contains(words), "the error does not say {words:?}: {outcome}");
    }
    assert!(!outcome.stderr.contains("panicked"), "{outcome}");
    outcome
}

#[test]
fn bad_input_is_told() {
    let sandbox = Sandbox::new();
    let odd = sandbox.file("odd");
    fs::write(&odd, [1; 5000]).expect("a file");
    let empty = sandbox.file("empty");
    fs::write(&empty, []).expect("a file");
    let good = image(&sandbox, "good", &pages(1..5));
    refused(&sandbox, &[], &["--pid", "--file"]);
    refused(&sandbox, &["--file", "/nonexistent"], &["/nonexistent", "No such file"]);
    refused(&sandbox, &["--file", text(&odd)], &["5000 bytes", "4096"]);
    refused(&sandbox, &["--file", text(&empty)], &["is empty"]);
    refused(&sandbox, &["--file", "/dev"], &["no regular file"]);
    refused(&sandbox, &["--file", &good, "--file", &good], &["twice"]);
    refused(&sandbox, &["--file", &good, "--domain", "a=other"], &["other", "--file"]);
    refused(&sandbox, &["--file", &good, "--html", "/nonexistent/x.html"], &["/nonexistent/x.html"]);
    refused(&sandbox, &["--file", &good, "--watch", "3"], &["--watch", "--file"]);
    refused(&sandbox, &["--pid", "2147483646"], &["no process 2147483646"]);
    let mut sleeper = Command::new("sleep").arg("60").spawn().expect("sleep");
    let pid = sleeper.id().to_string();
    refused(&sandbox, &["--pid", &pid], &["looks like a guest's", "16 MiB", "MiB in memory", "--range"]);
    refused(&sandbox, &["--pid", &pid, "--pid", &pid], &["twice"]);
    refused(&sandbox, &["--pid", &pid, "--range", "1000-3000"], &["not readable memory at 0x1000"]);
    refused(&sandbox, &["--pid", &pid, "--range", "1000-3000", "--range", "2000-4000"], &["overlap"]);
    refused(&sandbox, &["--pid", &pid, "--range", "1000-3001"], &["whole pages"]);
    refused(&sandbox, &["--pid", &pid, "--range", "1:1000-3000"], &["process 1", "--pid"]);
    sleeper.kill().expect("a child of ours");
    // A zombie has no memory.
    let stat = format!("/proc/{pid}/stat");
    eventually("it is a zombie", || fs::read_to_string(&stat).is_ok_and(|stat| stat.contains(") Z ")));
    refused(&sandbox, &["--pid", &pid], &["no process"]);
    sleeper.wait().expect("a child of ours");
    sandbox.assert_clean_within(Duration::from_secs(5));
}

#[test]
fn a_process_that_ends_meanwhile_is_named() {
    let sandbox = Sandbox::new();
    let filler = Filler::start("/dev/zero");
    let pid = filler.pid();
    let running = sandbox.samepage(["measure", "--pid", &pid, "--watch", "60", "--every", "1", "--json"]);
    let running = running.timeout(LIMIT).start();
    // The first looks take as long as they take; then the process ends, and the watch with it.
    thread::sleep(Duration::from_secs(2));
    drop(filler);
    let outcome = running.wait();
    if outcome.code == Some(0) {
        let found = outcome.json();
        let notes = found["notes"].to_string();
        assert!(notes.contains("the watch ended") && notes.contains(&pid), "{notes}");
    } else {
        assert!(outcome.stderr.contains(&pid), "{outcome}");
    }
}
