//! The kernel thread that merges, and the processor time it takes.

use std::fs;

/// The thread `ksmd`, found by name once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Ksmd {
    pid: u32,
}

impl Ksmd {
    /// Looks for it in /proc; `None` in a container, which does not show the host's threads.
    pub(super) fn find() -> Option<Self> {
        let processes = fs::read_dir("/proc").ok()?;
        let mut pids =
            processes.flatten().filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
        let is_ksmd = |pid: &u32| {
            // A process of that name with a command line is no kernel thread.
            fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|comm| comm.trim() == "ksmd")
                && fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|line| line.is_empty())
        };
        pids.find(is_ksmd).map(|pid| Self { pid })
    }

    /// Processor seconds since boot.
    pub(super) fn cpu_seconds(self) -> Option<f64> {
        let read = |file| fs::read_to_string(format!("/proc/{}/{file}", self.pid)).ok();
        read("schedstat")
            .and_then(|text| schedstat_seconds(&text))
            .or_else(|| read("stat").and_then(|text| stat_seconds(&text)))
    }
}

/// First number: nanoseconds on a processor.
fn schedstat_seconds(text: &str) -> Option<f64> {
    let nanoseconds: u64 = text.split_whitespace().next()?.parse().ok()?;
    Some(nanoseconds as f64 / 1e9)
}

/// Fields 14 and 15, in ticks: 100 a second on every x86-64 kernel (USER_HZ).
fn stat_seconds(text: &str) -> Option<f64> {
    // The name in parentheses may hold spaces.
    let (_, fields) = text.rsplit_once(')')?;
    let mut ticks = fields.split_whitespace().skip(11).map(str::parse::<u64>);
    Some((ticks.next()?.ok()? + ticks.next()?.ok()?) as f64 / 100.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_clocks_are_parsed() {
        assert_eq!(schedstat_seconds("1500000000 460380 2\n"), Some(1.5));
        assert_eq!(
            stat_seconds("37 (ks) md) S 2 0 0 0 -1 2097216 0 0 0 0 50 75 0 0 25 5 1 0 16"),
            Some(1.25)
        );
        assert_eq!(schedstat_seconds(""), None);
        assert_eq!(stat_seconds("37 (ksmd) S 2"), None);
    }
}
