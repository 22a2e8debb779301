//! Processor time of a VM's threads.

use std::fs;
use std::time::Duration;

use fleet::guest::Guest;

/// The prefix of the names of threads that run guest code.
const VCPU: &str = "vcpu";

/// Processor time so far of all threads of a VM, in seconds. A thread that ends meanwhile counts no
/// more.
pub(super) fn all_seconds(guest: &Guest) -> f64 {
    seconds(guest, |_| true)
}

/// The same of those that run no guest code.
pub(super) fn vmm_seconds(guest: &Guest) -> f64 {
    seconds(guest, |name| !name.starts_with(VCPU))
}

fn seconds(guest: &Guest, counts: impl Fn(&str) -> bool) -> f64 {
    let Some(tasks) = guest.pid().and_then(|pid| fs::read_dir(format!("/proc/{pid}/task")).ok()) else {
        return 0.0;
    };
    let nanoseconds = tasks.flatten().map(|task| {
        let read = |name| fs::read_to_string(task.path().join(name)).unwrap_or_default();
        match counts(&read("comm")) {
            true => read("schedstat").split(' ').next().and_then(|n| n.parse::<u64>().ok()).unwrap_or(0),
            false => 0,
        }
    });
    Duration::from_nanos(nanoseconds.sum()).as_secs_f64()
}
