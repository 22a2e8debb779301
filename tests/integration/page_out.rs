//! Pushing a guest's pages out to swap: on zram where the machine lets us make some, else what is said where there is none.

use std::fs;
use std::io;
use std::path::PathBuf;
use std::process::Command;

use serde_json::{Value, json};
use tests::require_kvm;
use tests::sandbox::Sandbox;
use tests::vm::{SOON, Vm, eventually, field};
use vmm::memory::page_out::has_swap;
use vmm::memory::pagemap::Pagemap;

fn stop(sandbox: &Sandbox, vm: Vm) {
    assert_eq!(vm.ask(&json!({"op": "stop"})), json!("done"));
    assert_eq!(vm.into_running().wait().success().stderr, "");
    sandbox.assert_clean_within(SOON);
}

/// A zram device of this test's own, in use as swap of the lowest priority. Dropped, it is no more.
struct Zram {
    number: String,
}

impl Zram {
    /// 256 MiB, which take memory only as they are used.
    fn new() -> Result<Self, String> {
        let number =
            fs::read_to_string("/sys/class/zram-control/hot_add").map_err(|e| format!("zram: {e}"))?;
        let zram = Self { number: number.trim().to_owned() };
        let setting = format!("/sys/block/zram{}/disksize", zram.number);
        fs::write(&setting, "256M").map_err(|e| format!("{setting}: {e}"))?;
        zram.run("mkswap", &[])?;
        zram.run("swapon", &["--priority", "0"])?;
        Ok(zram)
    }

    fn device(&self) -> PathBuf {
        format!("/dev/zram{}", self.number).into()
    }

    fn run(&self, tool: &str, args: &[&str]) -> Result<(), String> {
        let said = Command::new(tool).args(args).arg(self.device()).output();
        match said {
            Ok(said) if said.status.success() => Ok(()),
            Ok(said) => Err(format!("{tool}: {}", String::from_utf8_lossy(&said.stderr).trim())),
            Err(error) => Err(format!("{tool}: {error}")),
        }
    }
}

impl Drop for Zram {
    fn drop(&mut self) {
        // Not in use yet, where making it failed.
        let _ = self.run("swapoff", &[]);
        let removed: io::Result<()> = fs::write("/sys/class/zram-control/hot_remove", &self.number);
        assert!(removed.is_ok() || std::thread::panicking(), "{removed:?}");
    }
}

/// Pages of guest RAM that are on swap, by the page table.
fn swapped(vm: &Vm) -> u64 {
    let status = vm.status();
    let (mut pagemap, mut entries, mut pages) =
        (Pagemap::open(vm.running().pid()).expect("its pagemap"), Vec::new(), 0);
    for extent in status["extents"].as_array().expect("extents") {
        let (hva, bytes) = (extent["hva"].as_u64().expect("hva"), extent["bytes"].as_u64().expect("bytes"));
        pagemap.read(hva, bytes as usize / 4096, &mut entries).expect("its pagemap");
        pages += entries.iter().filter(|entry| entry.swapped()).count() as u64;
    }
    pages
}

/// One test for both, for swap is the machine's, and what one does the other would see.
#[test]
fn pages_are_pushed_out_where_there_is_swap_and_come_back_whole() {
    require_kvm!();
    let sandbox = Sandbox::new();
    let vm = Vm::start(&sandbox, "vm", &["--memory", "64M"]);
    let mut com2 = vm.com2();
    assert!(com2.line().is_some());
    let page_out = |pages: u64| vm.ask(&json!({"op": "page_out", "pages": pages}));
    if has_swap().is_err() {
        let refused = page_out(100);
        assert!(refused["error"].as_str().is_some_and(|e| e.contains("no active swap")), "{refused}");
    }
    let filled = com2.command("fill seed=1 common=7 zero=0 common_pct=0 dup=0 unique=100 pages=10000");
    assert_eq!(field(&filled, "pages"), 10_000);
    let _zram = match Zram::new() {
        Ok(zram) => zram,
        Err(why) => {
            tests::host::skipped("pages_are_pushed_out_where_there_is_swap_and_come_back_whole", &why);
            return stop(&sandbox, vm);
        }
    };
    let number = |answer: &Value, key: &str| {
        answer["paged_out"][key].as_u64().unwrap_or_else(|| panic!("no {key} in {answer}"))
    };
    let first = page_out(1000);
    assert!(number(&first, "advised_pages") <= 1000 && number(&first, "swapped_pages") > 0, "{first}");
    assert!(swapped(&vm) >= number(&first, "swapped_pages") / 2, "{first}");
    // The hand goes on: not the same pages again. A request takes some milliseconds and no more, so that several are needed.
    eventually("most of it is on swap", || {
        let answer = page_out(10_000);
        assert!(number(&answer, "swapped_pages") <= number(&answer, "advised_pages"), "{answer}");
        swapped(&vm) > 8000
    });
    // A second time round there is little left.
    let rest = page_out(20_000);
    assert!(number(&rest, "advised_pages") < 4000, "{rest}");
    let verified = com2.command("verify");
    assert_eq!((field(&verified, "checked"), field(&verified, "mismatched")), (10_000, 0), "{verified}");
    stop(&sandbox, vm);
}
