//! Swap on a zram device that is made for one test or one bench, and is no more when that has
//! ended.

use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::sync::{Mutex, MutexGuard};

use anyhow::{Context, Result, ensure};

const CONTROL: &str = "/sys/class/zram-control";

static SWAP: Mutex<()> = Mutex::new(());

/// Has swap to itself: it is the machine's, and what one test does with it another would see.
pub fn swap_alone() -> MutexGuard<'static, ()> {
    os::lock(&SWAP)
}

/// A zram device in use as swap. Dropped, it is no more: what is left on it is read back into
/// memory before. A killed process leaves it behind: `swapoff /dev/zramN; echo N
/// >/sys/class/zram-control/hot_remove`.
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
        zram.run("mkswap", &[])?;
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
