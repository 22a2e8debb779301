//! `/proc/meminfo`, and lines of its form in other files of `/proc`: a key, a number, mostly in
//! KiB.
//!
//! Source: the kernel's Documentation/filesystems/proc.rst.

use std::io;
use std::path::Path;

/// The kernel's counters of the host's memory.
#[derive(Clone, Debug, Default)]
pub struct Meminfo(String);

impl Meminfo {
    /// Of this host, now.
    pub fn read() -> io::Result<Self> {
        Self::at(Path::new("/proc/meminfo"))
    }

    /// From a file of that form.
    pub fn at(path: &Path) -> io::Result<Self> {
        std::fs::read_to_string(path).map(Self)
    }

    pub fn of(text: impl Into<String>) -> Self {
        Self(text.into())
    }

    /// The number of a key such as `HugePages_Total` or `MemTotal`: as written, so in KiB where the
    /// file counts in KiB.
    pub fn number(&self, key: &str) -> Option<u64> {
        number_in(&self.0, key)
    }

    /// The bytes of a key that counts in KiB.
    pub fn bytes(&self, key: &str) -> Option<u64> {
        self.number(key)?.checked_mul(1024)
    }
}

/// The number of `key` in the lines of `text`: of `/proc/PID/status`, for instance.
pub fn number_in(text: &str, key: &str) -> Option<u64> {
    text.lines().find_map(|line| value(line, key))
}

/// The number in a line such as `VmPTE:   132 kB`, if it is that of `key`.
pub(super) fn value(line: &str, key: &str) -> Option<u64> {
    line.strip_prefix(key)?.strip_prefix(':')?.trim().trim_end_matches("kB").trim_end().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_is_found_by_its_whole_key() {
        let text = "MemTotal:       24684096 kB\nHugePages_Total:       3\nSwap:\t x kB\nFar: 18446744073709551615 kB\n";
        let meminfo = Meminfo::of(text);
        assert_eq!(
            (meminfo.number("MemTotal"), meminfo.number("HugePages_Total")),
            (Some(24_684_096), Some(3))
        );
        assert_eq!(meminfo.bytes("MemTotal"), Some(24_684_096 << 10));
        for key in ["Mem", "Total", "Swap", "Nothing"] {
            assert_eq!(meminfo.number(key), None, "{key}");
        }
        assert_eq!(meminfo.bytes("Far"), None);
    }

    #[test]
    fn this_host_has_memory() {
        assert!(Meminfo::read().unwrap().bytes("MemTotal").is_some_and(|bytes| bytes > 1 << 20));
    }
}
