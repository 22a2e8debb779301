//! What this machine offers, and the settings of its that a test must leave as they were.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::fs::{self, OpenOptions};
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard};

const KSM: &str = "/sys/kernel/mm/ksm";

/// Why no VM can run here, if none can.
#[must_use]
pub fn without_kvm() -> Option<String> {
    OpenOptions::new().read(true).write(true).open("/dev/kvm").err().map(|e| format!("/dev/kvm: {e}"))
}

/// Why the kernel's samepage merging cannot be used here, if it cannot.
#[must_use]
pub fn without_ksm() -> Option<String> {
    let run = Path::new(KSM).join("run");
    OpenOptions::new().write(true).open(&run).err().map(|e| format!("{}: {e}", run.display()))
}

/// Why VMs cannot be merged by slabs here, if they cannot.
#[must_use]
pub fn without_slabs() -> Option<String> {
    without_kvm().or_else(|| Some(format!("userfaultfd: {}", memory::userfault::probe().err()?)))
}

/// A program of others that a test compares with: in `$PATH`, or where `tests/run` has unpacked it.
///
/// # Errors
/// Why there is none.
pub fn tool(name: &str) -> Result<PathBuf, String> {
    let unpacked = crate::target().join("tools/usr/bin");
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut places = std::env::split_paths(&path).chain([unpacked]).map(|place| place.join(name));
    let missing = || format!("no {name}: `tests/run --only packages` fetches it");
    places.find(|file| file.is_file()).ok_or_else(missing)
}

/// Says on the terminal, past the test harness's capture, that a test was skipped and why.
pub fn skipped(test: &str, why: &str) {
    // A closed output is no reason to fail.
    let _ = writeln!(std::io::stderr(), "SKIPPED {test}: {why}");
}

/// Ends the test, visibly, where there is no KVM.
#[macro_export]
macro_rules! require_kvm {
    () => {
        if let Some(why) = $crate::host::without_kvm() {
            $crate::host::skipped(module_path!(), &why);
            return;
        }
    };
}

/// The path of a program of others; ends the test, visibly, where there is none.
#[macro_export]
macro_rules! require_tool {
    ($name:expr) => {
        match $crate::host::tool($name) {
            Ok(path) => path,
            Err(why) => {
                $crate::host::skipped(module_path!(), &why);
                return;
            }
        }
    };
}

/// Ends the test, visibly, where there is no KVM or merging by slabs is not possible.
#[macro_export]
macro_rules! require_slabs {
    () => {
        if let Some(why) = $crate::host::without_slabs() {
            $crate::host::skipped(module_path!(), &why);
            return;
        }
    };
}

/// Ends the test, visibly, where there is no KVM or no KSM; else holds KSM for this test alone.
#[macro_export]
macro_rules! require_ksm {
    () => {{
        if let Some(why) = $crate::host::without_kvm().or_else($crate::host::without_ksm) {
            $crate::host::skipped(module_path!(), &why);
            return;
        }
        $crate::host::only_user_of_ksm()
    }};
}

thread_local! {
    static HOLDS_KSM: Cell<bool> = const { Cell::new(false) };
}

/// That this thread holds KSM.
pub struct KsmUser(#[expect(dead_code, reason = "held until dropped")] MutexGuard<'static, ()>);

impl Drop for KsmUser {
    fn drop(&mut self) {
        HOLDS_KSM.set(false);
    }
}

/// Holds KSM, which the host has only one of, until dropped.
pub fn only_user_of_ksm() -> KsmUser {
    static KSM_USER: Mutex<()> = Mutex::new(());
    // Poisoned means that another test failed: that is its own matter.
    let user = KsmUser(os::lock(&KSM_USER));
    HOLDS_KSM.set(true);
    user
}

/// Every setting of KSM, by name.
#[derive(Debug, PartialEq, Eq)]
pub struct KsmSettings(BTreeMap<String, String>);

impl KsmSettings {
    /// As they are; none where there is no KSM.
    #[must_use]
    pub fn now() -> Self {
        let entries = fs::read_dir(KSM).into_iter().flatten().flatten();
        let writable = entries.filter(|e| e.metadata().is_ok_and(|m| m.permissions().mode() & 0o200 != 0));
        let read = writable.filter_map(|e| {
            let value = fs::read_to_string(e.path()).ok()?;
            Some((e.file_name().to_string_lossy().into_owned(), value.trim().to_owned()))
        });
        Self(read.collect())
    }

    /// As they are, if this thread holds KSM. Else they are another test's to change: neither to be
    /// watched nor to be put back.
    #[must_use]
    pub fn if_held() -> Option<Self> {
        HOLDS_KSM.get().then(Self::now)
    }

    /// What is different now, a line for each.
    #[must_use]
    pub fn changes(&self) -> Vec<String> {
        let Self(now) = Self::now();
        let changed = self.0.iter().filter(|(name, value)| now.get(*name) != Some(value));
        changed
            .map(|(name, was)| format!("KSM {name}: was {was}, is {}", now.get(name).map_or("gone", |v| v)))
            .collect()
    }

    /// Puts back what is different now, so that one failing test does not fail the next.
    pub fn restore(&self) {
        let Self(now) = Self::now();
        for (name, value) in self.0.iter().filter(|(name, value)| now.get(*name) != Some(value)) {
            // The advisor's file shows its choice as "[none] scan-time" and takes "none".
            let chosen =
                value.split_once('[').and_then(|(_, rest)| rest.split_once(']')).map_or(&**value, |c| c.0);
            // Best effort: the test that changed it fails by its own assertion.
            let _ = fs::write(Path::new(KSM).join(name), chosen);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    #[test]
    fn settings_are_anothers_unless_they_are_held() {
        assert!(KsmSettings::if_held().is_none());
        let user = only_user_of_ksm();
        assert!(KsmSettings::if_held().is_some());
        assert!(thread::spawn(KsmSettings::if_held).join().unwrap().is_none());
        drop(user);
        assert!(KsmSettings::if_held().is_none());
    }
}
