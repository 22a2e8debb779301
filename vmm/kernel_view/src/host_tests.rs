//! Readings of hosts that are made of files in a temporary directory, and of the real one.

use std::fs;

use super::*;

const MEMINFO: &str = "MemTotal:        8000 kB\nMemFree: 1 kB\nMemAvailable:  4000 kB\nSwapFree:  400 kB\nSecPageTables: 12 kB\n";
const MOUNT_1: (&str, &str) =
    ("proc/self/mountinfo", "35 31 0:32 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n");
const MOUNT_2: (&str, &str) =
    ("proc/self/mountinfo", "30 24 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n");
const STALLS: &str =
    "some avg10=1.50 avg60=0.00 avg300=0.00 total=9\nfull avg10=0.25 avg60=0.00 avg300=0.00 total=3\n";

/// A host of these files.
fn host(files: &[(&str, &str)]) -> (tempfile::TempDir, Host) {
    let root = tempfile::tempdir().expect("a directory");
    for (path, text) in files {
        let path = root.path().join(path);
        fs::create_dir_all(path.parent().expect("a parent")).expect("a directory");
        fs::write(path, text).expect("a file");
    }
    let host = Host::below(root.path());
    (root, host)
}

#[test]
fn a_bare_host_has_memory_and_nothing_else() {
    let (_root, host) = host(&[("proc/meminfo", MEMINFO)]);
    let readings = host.read().expect("readings");
    let group = GroupMemory::default();
    let expected = Readings {
        total_pages: 2000,
        pool_pages: 0,
        available_pages: 1000,
        swap_free_pages: 100,
        second_level_pages: 3,
        psi: None,
        group,
    };
    assert_eq!(readings, expected);
    assert_eq!((readings.host_pages(), readings.free_pages()), (2000, 1000));
}

#[test]
fn version_2_is_limited_at_every_level() {
    let (_root, host) = host(&[
        ("proc/meminfo", MEMINFO),
        ("proc/pressure/memory", "some avg10=9.00\nfull avg10=9.00\n"),
        ("proc/self/cgroup", "0::/a/b\n"),
        MOUNT_2,
        ("sys/fs/cgroup/a/memory.max", "4096000\n"),
        ("sys/fs/cgroup/a/memory.current", "2867200\n"),
        ("sys/fs/cgroup/a/memory.stat", "anon 0\ninactive_file 819200\n"),
        ("sys/fs/cgroup/a/memory.swap.max", "40960\n"),
        ("sys/fs/cgroup/a/memory.swap.current", "4096\n"),
        ("sys/fs/cgroup/a/b/memory.max", "max\n"),
        ("sys/fs/cgroup/a/b/memory.current", "1024000\n"),
        ("sys/fs/cgroup/a/b/memory.pressure", STALLS),
    ]);
    let readings = host.read().expect("readings");
    let group = GroupMemory { limit_pages: Some(1000), free_pages: Some(500), swap_free_pages: Some(9) };
    assert_eq!((readings.group, readings.swap_free_pages), (group, 9));
    assert_eq!(readings.psi, Some(Psi { some_avg10_percent: 1.5, full_avg10_percent: 0.25 }));
    assert_eq!(readings.free_pages(), 500);
}

#[test]
fn version_1_has_a_number_for_no_limit() {
    let files = |limit| {
        [
            ("proc/meminfo", MEMINFO),
            ("proc/pressure/memory", STALLS),
            ("proc/self/cgroup", "4:memory:/x\n0::/\n"),
            MOUNT_1,
            ("sys/fs/cgroup/memory/memory.usage_in_bytes", "0\n"),
            ("sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n"),
            ("sys/fs/cgroup/memory/x/memory.usage_in_bytes", "409600\n"),
            ("sys/fs/cgroup/memory/x/memory.limit_in_bytes", limit),
        ]
    };
    let (_root, unlimited) = host(&files("9223372036854771712\n"));
    let readings = unlimited.read().expect("readings");
    assert_eq!(readings.group.limit_pages, None);
    assert_eq!(readings.psi.map(|p| p.some_avg10_percent), Some(1.5), "the whole host's");
    let (_root, limited) = host(&files("819200\n"));
    let group = limited.read().expect("readings").group;
    let expected = GroupMemory { limit_pages: Some(200), free_pages: Some(100), swap_free_pages: None };
    assert_eq!(group, expected);
}

#[test]
fn a_group_outside_of_the_mount_is_its_root() {
    let (_root, host) = host(&[
        ("proc/meminfo", MEMINFO),
        ("proc/self/cgroup", "0::/../elsewhere\n"),
        MOUNT_2,
        ("sys/fs/cgroup/memory.max", "40960\n"),
        ("sys/fs/cgroup/memory.current", "0\n"),
    ]);
    assert_eq!(host.read().expect("readings").group.limit_pages, Some(10));
}

#[test]
fn the_pool_of_huge_pages_is_no_capacity() {
    let pool = format!("{MEMINFO}HugePages_Total: 1\nHugepagesize: 2048 kB\n");
    let (_root, host) = host(&[("proc/meminfo", &pool)]);
    let readings = host.read().expect("readings");
    assert_eq!((readings.pool_pages, readings.host_pages()), (512, 1488));
    // Of all sizes together, where the kernel says it.
    let (_root, host) = self::host(&[("proc/meminfo", &format!("{pool}Hugetlb: 4096 kB\n"))]);
    assert_eq!(host.read().expect("readings").pool_pages, 1024);
}

#[test]
fn a_host_without_proc_is_said() {
    let nothing = Host::below("/nonexistent").read().expect_err("an error").to_string();
    assert!(nothing.contains("/nonexistent/proc/meminfo"), "{nothing}");
}

#[test]
fn a_broken_field_is_named() {
    let (_root, host) = host(&[("proc/meminfo", "MemTotal: lots\n")]);
    assert!(host.read().expect_err("an error").to_string().contains("MemTotal"));
}

#[test]
fn this_host_can_be_read() {
    let readings = Host::default().read().expect("readings");
    assert!(readings.total_pages > readings.available_pages && readings.available_pages > 0, "{readings:?}");
    assert!(readings.host_pages() > 0 && readings.free_pages() <= readings.available_pages);
}
