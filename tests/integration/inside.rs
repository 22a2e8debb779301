//! What needs Linux guests, and so runs inside the nested-paging lab: `nested` starts these tests
//! there.
//!
//! Those here are the balloon's, and are what Firecracker asserts of its own (its
//! `functional/test_balloon.py`, snapshots aside), here with Linux's own driver. Each boot of a
//! guest takes seconds there, so one guest is asked many things.

mod clones;
mod drives;

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::thread;
use std::time::Duration;

use serde_json::{Value, json};
use tests::lab::image_dir;
use tests::sandbox::Sandbox;
use tests::vm::{Client, SOON, Vm, eventually};

const MIB_PAGES: u64 = 256;

/// A Debian guest, its agent, and its console.
struct Linux {
    vm: Vm,
    agent: Client,
    console: Console,
}

/// What the guest's kernel said, shown where a test fails.
struct Console(PathBuf);

impl Drop for Console {
    fn drop(&mut self) {
        if thread::panicking() {
            eprintln!("the guest's console:\n{}", fs::read_to_string(&self.0).unwrap_or_default());
        }
    }
}

impl Linux {
    fn boot(sandbox: &Sandbox, name: &str, more: &[&str]) -> Self {
        Self::boot_kernel(sandbox, name, "vmlinux", more)
    }

    /// As [`Self::boot`], from this file of the image.
    fn boot_kernel(sandbox: &Sandbox, name: &str, kernel: &str, more: &[&str]) -> Self {
        let (control, com2) = Vm::sockets(sandbox, name);
        let console = sandbox.file(&format!("{name}.log"));
        let image = image_dir();
        let path = |path: PathBuf| path.to_str().expect("UTF-8").to_owned();
        let mut args = vec!["run".to_owned(), "--memory".into(), "256M".into()];
        args.extend(["--kernel".into(), path(image.join(kernel)), "--initrd".into()]);
        args.extend([path(image.join("initrd.cpio")), "--console".into(), path(console.clone())]);
        args.extend(["--control".into(), path(control.clone()), "--com2".into(), path(com2.clone())]);
        args.extend(more.iter().map(ToString::to_string));
        let vm =
            Vm::of(sandbox.samepage(args).env("RUST_LOG", "info").timeout(SOON * 4).start(), control, com2);
        let mut agent = vm.com2();
        let line = agent.line().expect("the ready line");
        assert!(line.starts_with("ready "), "{line:?}");
        Self { vm, agent, console: Console(console) }
    }

    fn balloon(&self) -> Value {
        self.vm.ask(&json!({"op": "balloon"}))["balloon"].clone()
    }

    fn actual(&self) -> u64 {
        self.balloon()["actual_pages"].as_u64().expect("a number")
    }

    fn target(&self, pages: u64) {
        assert_eq!(self.vm.ask(&json!({"op": "balloon_target", "pages": pages})), json!("done"));
    }

    #[track_caller]
    fn inflate(&self, mib: u64) {
        let pages = mib * MIB_PAGES;
        self.target(pages);
        eventually("the balloon gets to its size", || self.actual() == pages);
        // Where the host's huge pages cover some of it again, that takes a while.
        eventually("the host has got all of it", || {
            let host = self.balloon()["host"].clone();
            host["held_pages"] == pages && host["absent_pages"] == pages
        });
    }

    /// The guest's statistics from after now.
    fn statistics(&self) -> Value {
        let before = self.balloon()["updates"].as_u64().expect("a number");
        eventually("fresh statistics", || {
            self.vm.ask(&json!({"op": "balloon_statistics"}));
            self.balloon()["updates"].as_u64().expect("a number") > before
        });
        self.balloon()["guest"].clone()
    }

    /// Writes to this much of the guest's memory.
    fn fill(&mut self, mib: u64) {
        let pages = mib * MIB_PAGES;
        let fill = format!("fill seed=1 common=7 zero=0 common_pct=0 dup=0 unique=100 pages={pages}");
        assert_eq!(self.agent.command(&fill), format!("ok command=fill pages={pages}"));
        let verified = self.agent.command("verify");
        assert_eq!(verified, format!("ok command=verify checked={pages} mismatched=0 first=none"));
    }

    /// Frees all that it wrote to.
    fn free(&mut self) {
        let freed = self.agent.command("free percent=100");
        assert!(freed.starts_with("ok command=free"), "{freed}");
    }

    /// Writes to this much of the guest's memory, and frees it again.
    fn dirty(&mut self, mib: u64) {
        self.fill(mib);
        self.free();
    }

    /// Ends the guest, which must have had no trouble.
    fn end(self, sandbox: &Sandbox) {
        let log = fs::read_to_string(&self.console.0).expect("the console");
        for trouble in ["soft lockup", "rcu: INFO", "Call Trace", "BUG:", "WARNING:"] {
            assert!(!log.contains(trouble), "{trouble} in the guest's log:\n{log}");
        }
        assert_eq!(self.vm.ask(&json!({"op": "stop"})), json!("done"));
        let _ = self.vm.into_running().wait().success();
        sandbox.assert_clean_within(SOON);
    }
}

/// Whether two sizes differ by at most `percent`.
fn within(percent: u64, a: u64, b: u64) -> bool {
    a.abs_diff(b) * 100 <= percent * a.max(b)
}

#[test]
fn the_balloon_of_a_linux_guest() {
    let sandbox = Sandbox::new();
    let mut linux = Linux::boot(&sandbox, "vm", &[]);
    let free = |statistics: &Value| statistics["free_memory"].as_u64().expect("a number");

    // Inflation takes memory from the guest, and gives it to the host.
    // Asked before the memory is freed: pages on a processor's list are not counted as free.
    let before = linux.statistics();
    linux.dirty(64);
    let full_kib = linux.vm.rss_kib();
    linux.inflate(64);
    let after = linux.statistics();
    let taken = free(&before).saturating_sub(free(&after));
    assert!(taken >= (64 << 20) / 100 * 85, "of 64 MiB, {taken} bytes left the guest's free memory");
    assert!(linux.vm.rss_kib() < full_kib, "the host has got none of it");
    for name in ["swap_in", "major_faults", "minor_faults", "total_memory", "available_memory", "disk_caches"]
    {
        assert!(after.get(name).is_some(), "no {name} in {after}");
    }
    // A kernel of 6.12 has these too.
    for name in ["oom_kill", "alloc_stall", "async_scan", "direct_scan", "async_reclaim", "direct_reclaim"] {
        assert!(after.get(name).is_some(), "no {name} in {after}");
    }
    let faults = |statistics: &Value| statistics["minor_faults"].as_u64().expect("a number");
    assert!(faults(&after) >= faults(&before), "faults are counted up");

    // What the host holds does not move by itself.
    let rss_kib = linux.vm.rss_kib();
    thread::sleep(Duration::from_secs(1));
    assert!(within(1, rss_kib, linux.vm.rss_kib()), "{rss_kib} KiB, then {} KiB", linux.vm.rss_kib());

    // Deflation gives it back, all of it usable; statistics follow.
    linux.inflate(0);
    assert!(free(&linux.statistics()) > free(&after), "the guest has not got its memory back");
    linux.dirty(64);

    // A second inflation brings as much as the first.
    linux.inflate(128);
    let first_kib = linux.vm.rss_kib();
    linux.inflate(0);
    linux.dirty(64);
    linux.inflate(128);
    assert!(within(5, first_kib, linux.vm.rss_kib()), "{first_kib} KiB, then {} KiB", linux.vm.rss_kib());

    // While the VM is paused nothing moves, and the new target is not forgotten.
    assert_eq!(linux.vm.ask(&json!({"op": "pause"})), json!("done"));
    linux.target(32 * MIB_PAGES);
    thread::sleep(Duration::from_millis(300));
    assert_eq!(linux.actual(), 128 * MIB_PAGES);
    assert_eq!(linux.vm.ask(&json!({"op": "resume"})), json!("done"));
    eventually("the balloon follows after the pause", || linux.actual() == 32 * MIB_PAGES);

    // A driver that goes gives everything back; one that comes inflates to the target.
    assert_eq!(linux.agent.command("balloon off"), "ok command=balloon action=off");
    eventually("the driver is gone", || linux.balloon()["driver"] == json!(false));
    assert_eq!(linux.balloon()["host"]["held_pages"], json!(0));
    let on = linux.agent.command("balloon on");
    assert!(on.starts_with("ok command=balloon action=on features=0x"), "{on}");
    linux.inflate(32);
    let _ = linux.statistics();
    linux.dirty(32);

    // More than the guest has: it gives what it can and lives.
    linux.target(255 * MIB_PAGES);
    eventually("the balloon has taken what there is", || linux.actual() > 150 * MIB_PAGES);
    thread::sleep(Duration::from_secs(2));
    assert!(linux.actual() < 255 * MIB_PAGES);
    linux.inflate(0);
    linux.dirty(64);
    linux.end(&sandbox);
}

/// Two megabytes: kernels are at a multiple of this.
const KERNEL_ALIGN: u64 = 2 << 20;
/// What a kernel's constants begin their banner with.
const BANNER: &[u8] = b"Linux version ";

/// Where in guest-physical memory a kernel has its banner: searched for where one that the host
/// unpacked lies, else looked for at the same distance from every place where a kernel can be.
fn banner(linux: &Linux, known: Option<u64>) -> u64 {
    let status = linux.vm.ask(&json!({"op": "status"}))["status"].clone();
    let number = |pointer: &str| status.pointer(pointer).and_then(Value::as_u64).expect("a number");
    let memory = fs::File::open(format!("/proc/{}/mem", number("/pid"))).expect("the VM's memory");
    let (hva, bytes) = (number("/extents/0/hva"), number("/extents/0/bytes"));
    let read = |gpa: u64, buffer: &mut [u8]| memory.read_exact_at(buffer, hva + gpa).expect("guest memory");
    let Some(known) = known else {
        let mut kernel = vec![0; 64 << 20];
        read(16 << 20, &mut kernel);
        let at = kernel.windows(BANNER.len()).position(|bytes| bytes == BANNER).expect("a banner");
        return (16 << 20) + at as u64;
    };
    let mut found = vec![0; BANNER.len()];
    let places = (known % KERNEL_ALIGN..bytes - KERNEL_ALIGN).step_by(KERNEL_ALIGN as usize);
    let mut places = places.filter(|gpa| {
        read(*gpa, &mut found);
        found == BANNER
    });
    places.next().expect("a banner at the same distance from an aligned address")
}

#[test]
fn a_linux_guest_that_unpacks_its_own_kernel_has_it_at_random_places() {
    let sandbox = Sandbox::new();
    let boot = |name: &str, kernel: &str, more: &[&str], known: Option<u64>| {
        let linux = Linux::boot_kernel(&sandbox, name, kernel, more);
        let at = banner(&linux, known);
        linux.end(&sandbox);
        at
    };
    let usual = boot("usual", "vmlinux", &[], None);
    let packed = |name: &str, more: &[&str]| {
        boot(name, "vmlinuz", &[&["--kernel-decompress", "guest"], more].concat(), Some(usual))
    };
    assert_eq!(packed("off", &["--cmdline", "console=ttyS0 quiet panic=-1 nokaslr"]), usual);
    // Of some ninety places, all three are the same once in eight thousand times.
    let places = ["first", "second", "third"].map(|name| packed(name, &[]));
    assert!(places.iter().any(|place| *place != places[0]), "always at {:#x}", places[0]);
}

#[test]
fn a_linux_guest_takes_back_what_it_needs_where_that_was_agreed() {
    let sandbox = Sandbox::new();
    let mut linux = Linux::boot(&sandbox, "vm", &["--deflate-on-oom"]);
    linux.inflate(128);
    // What is left to it is less than this.
    linux.dirty(110);
    assert!(linux.actual() < 128 * MIB_PAGES, "the balloon is as large as before");
    linux.end(&sandbox);
}

#[test]
fn freed_memory_of_a_linux_guest_is_reported() {
    let sandbox = Sandbox::new();
    let mut linux = Linux::boot(&sandbox, "vm", &["--free-page-reporting"]);
    let reported = |linux: &Linux| linux.balloon()["host"]["reported_bytes"].as_u64().expect("a number");
    linux.fill(100);
    let (full_kib, before) = (linux.vm.rss_kib(), reported(&linux));
    linux.free();
    // Linux reports whole blocks of 2 MiB, and whatever else lies in them stays.
    eventually("free pages are reported and dropped", || {
        reported(&linux) > before + (30 << 20) && linux.vm.rss_kib() + (30 << 10) < full_kib
    });
    // They are the guest's to use all the while.
    linux.dirty(100);
    linux.end(&sandbox);
}
