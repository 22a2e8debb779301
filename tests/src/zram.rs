//! Swap on a zram device that is made for one test or one bench, and is no more when that has
//! ended.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{self, Command};
use std::sync::{Mutex, MutexGuard};

use anyhow::{Context, Result, ensure};

const CONTROL: &str = "/sys/class/zram-control";
/// With the number of the process that made it, the label of a swap area of ours.
const LABEL: &str = "samepage-";
/// Where a swap area has its label, `volume_name` in the kernel's `union swap_header`, and how long
/// it is at most.
const LABEL_AT: (u64, usize) = (1052, 16);

static SWAP: Mutex<()> = Mutex::new(());

/// Has swap to itself: it is the machine's, and what one test does with it another would see.
/// Devices that killed tests left behind are removed first.
pub fn swap_alone() -> MutexGuard<'static, ()> {
    let alone = os::lock(&SWAP);
    let swaps = fs::read_to_string("/proc/swaps").unwrap_or_default();
    for device in swaps.lines().filter_map(|line| line.split_whitespace().next()) {
        let Some(number) = device.strip_prefix("/dev/zram") else { continue };
        if maker(Path::new(device)).is_some_and(|pid| !Path::new(&format!("/proc/{pid}")).exists()) {
            drop(Zram { number: number.to_owned() });
        }
    }
    alone
}

/// The process that made a swap area, where it was one of ours.
fn maker(device: &Path) -> Option<u32> {
    let mut label = [0; LABEL_AT.1];
    File::open(device).ok()?.read_exact_at(&mut label, LABEL_AT.0).ok()?;
    let label = str::from_utf8(&label).ok()?.trim_end_matches('\0');
    label.strip_prefix(LABEL)?.parse().ok()
}

/// A zram device in use as swap. Dropped, it is no more: what is left on it is read back into
/// memory before. A killed process leaves it behind, for [`swap_alone`] of the next.
#[derive(Debug)]
pub struct Zram {
    number: String,
}

impl Zram {
    /// A device of `mib`, of which memory is taken as it is used, as swap of priority 0: after what
    /// others have made on purpose.
    ///
    /// # Errors
    /// Not root, no module `zram`, or no `mkswap` and `swapon`.
    pub fn new(mib: u64) -> Result<Self> {
        let hot_add = format!("{CONTROL}/hot_add");
        let number = fs::read_to_string(&hot_add).with_context(|| {
            format!("zram: {hot_add} cannot be read: expected root and the kernel's zram module; as root, run: modprobe zram")
        })?;
        let zram = Self { number: number.trim().to_owned() };
        let setting = format!("/sys/block/zram{}/disksize", zram.number);
        fs::write(&setting, format!("{mib}M")).with_context(|| format!("zram: {setting} = {mib}M"))?;
        zram.run("mkswap", &["--label", &format!("{LABEL}{}", process::id())])?;
        zram.run("swapon", &["--priority", "0"])?;
        Ok(zram)
    }

    fn device(&self) -> PathBuf {
        format!("/dev/zram{}", self.number).into()
    }

    fn run(&self, tool: &str, args: &[&str]) -> Result<()> {
        let said =
            Command::new(tool).args(args).arg(self.device()).output().with_context(|| tool.to_owned())?;
        let complaint = String::from_utf8_lossy(&said.stderr);
        ensure!(said.status.success(), "{tool} {}: {}", self.device().display(), complaint.trim());
        Ok(())
    }
}

impl Drop for Zram {
    fn drop(&mut self) {
        // Not in use yet, where making it failed.
        let _ = self.run("swapoff", &[]);
        let removed = fs::write(format!("{CONTROL}/hot_remove"), &self.number);
        assert!(
            removed.is_ok() || std::thread::panicking(),
            "{} is left behind: {removed:?}",
            self.device().display()
        );
    }
}
