//! Control groups by the texts that real kernels show, of both versions.

use super::*;

/// Of a host with version 1 (Linux 6.18): a shell in a group two levels down.
const CGROUP_1: &str = "9:name=systemd:/\n8:pids:/\n4:memory:/jobs/4515277f\n3:cpuset:/\n1:cpu:/\n0::/\n";
const MOUNTINFO_1: &str = "\
23 1 254:0 / / rw,relatime - ext4 /dev/root rw
31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
32 31 0:29 / /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu
35 31 0:32 / /sys/fs/cgroup/memory rw,relatime shared:9 master:2 - cgroup cgroup rw,memory
41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw
";
const STAT_1: &str = "\
cache 304451584
rss 1339392
rss_huge 0
shmem 0
mapped_file 45056
dirty 32768
writeback 0
swap 0
pgpgin 488526
inactive_anon 1331200
active_anon 8192
inactive_file 4096
active_file 4096
unevictable 0
hierarchical_memory_limit 9223372036854771712
hierarchical_memsw_limit 9223372036854771712
total_cache 304451584
total_rss 1339392
total_dirty 32768
total_writeback 4096
total_inactive_anon 1331200
total_active_anon 8192
total_inactive_file 168755200
total_active_file 135696384
total_unevictable 0
";
/// Of a host with version 2 (Linux 6.12).
const CGROUP_2: &str = "0::/system.slice/samepage.service\n";
const MOUNTINFO_2: &str = "\
22 1 0:21 / /proc rw,nosuid,nodev,noexec,relatime shared:14 - proc proc rw
30 24 0:26 / /sys/fs/cgroup rw,nosuid,nodev,noexec,relatime shared:9 - cgroup2 cgroup2 rw,nsdelegate,memory_recursiveprot
";
const STAT_2: &str = "\
anon 331776000
file 704827392
kernel 12582912
kernel_stack 1507328
pagetables 3067904
sock 0
shmem 0
file_mapped 40960
file_dirty 4096000
file_writeback 96000
swapcached 0
inactive_anon 331571200
active_anon 204800
inactive_file 696254464
active_file 8572928
unevictable 0
slab_reclaimable 3145728
slab_unreclaimable 2097152
slab 5242880
";

fn files<'a>(files: &'a [(&str, &str)]) -> impl Fn(&str) -> Option<String> + 'a {
    |name| files.iter().find(|(file, _)| *file == name).map(|(_, text)| (*text).to_owned())
}

fn place(version: Version, directory: &str, top: &str) -> Place {
    Place { version, directory: directory.into(), top: top.into() }
}

#[test]
fn a_group_is_where_the_mount_shows_it() {
    let memory = place(Version::One, "/sys/fs/cgroup/memory/jobs/4515277f", "/sys/fs/cgroup/memory");
    // The other hierarchy has no memory controller; its groups have none of its files.
    let unified = place(Version::Two, "/sys/fs/cgroup/unified/", "/sys/fs/cgroup/unified");
    assert_eq!(places(CGROUP_1, MOUNTINFO_1), [memory, unified]);
    let service = place(Version::Two, "/sys/fs/cgroup/system.slice/samepage.service", "/sys/fs/cgroup");
    assert_eq!(places(CGROUP_2, MOUNTINFO_2), [service]);
    assert_eq!(places("", MOUNTINFO_2), []);
    assert_eq!(places(CGROUP_2, ""), []);
}

#[test]
fn in_a_container_the_mount_is_its_own_group() {
    // Docker, version 1: the host's path, and the container's own group mounted.
    let mountinfo =
        "690 688 0:30 /docker/5e1f /sys/fs/cgroup/memory ro,relatime master:15 - cgroup cgroup rw,memory\n";
    let top = "/sys/fs/cgroup/memory";
    assert_eq!(
        places("4:memory:/docker/5e1f\n", mountinfo),
        [place(Version::One, "/sys/fs/cgroup/memory/", top)]
    );
    let below = place(Version::One, "/sys/fs/cgroup/memory/a", top);
    assert_eq!(places("4:memory:/docker/5e1f/a\n", mountinfo), [below]);
    // A namespace, version 2: the process was moved out of it.
    let outside = places("0::/../elsewhere\n", MOUNTINFO_2);
    assert_eq!(outside, [place(Version::Two, "/sys/fs/cgroup/", "/sys/fs/cgroup")]);
    // Another container's group is mounted, too: the mount that shows more is asked.
    let mountinfo = format!("{mountinfo}691 688 0:30 / /host/memory rw - cgroup cgroup rw,memory\n");
    let found = places("4:memory:/docker/5e1f\n", &mountinfo);
    assert_eq!(found, [place(Version::One, "/host/memory/docker/5e1f", "/host/memory")]);
    // A name with a space, and a group that is gone.
    let mountinfo = "30 24 0:26 / /mnt/c\\040g rw - cgroup2 none rw\n";
    assert_eq!(places("0::/a (deleted)\n", mountinfo), [place(Version::Two, "/mnt/c g/a", "/mnt/c g")]);
}

#[test]
fn version_1_counts_what_can_be_dropped_as_free() {
    let limited = [
        ("memory.limit_in_bytes", "402653184\n"),
        ("memory.usage_in_bytes", "330301440\n"),
        ("memory.stat", STAT_1),
        ("memory.memsw.limit_in_bytes", "503316480\n"),
        ("memory.memsw.usage_in_bytes", "350301440\n"),
    ];
    let level = Level::of_version_1(files(&limited)).unwrap();
    let droppable = 168_755_200 + 135_696_384 / 2 - 32_768 - 4096;
    let expected = Level {
        limit: Some(402_653_184),
        used: 330_301_440,
        droppable,
        // Of the 100 MB that swap may have at least, 20 are used.
        swap_free: Some(503_316_480 - 350_301_440 - (402_653_184 - 330_301_440)),
    };
    assert_eq!(level, expected);
    assert_eq!(level.free(), Some(402_653_184 - 330_301_440 + droppable));
    // The limit of a group that is above the mount.
    let stat = STAT_1.replacen("9223372036854771712", "104857600", 1);
    let inside = [
        ("memory.limit_in_bytes", "9223372036854771712\n"),
        ("memory.usage_in_bytes", "1048576\n"),
        ("memory.stat", stat.as_str()),
    ];
    assert_eq!(Level::of_version_1(files(&inside)).unwrap().limit, Some(100 << 20));
    assert_eq!(Level::of_version_1(files(&[])), None, "no memory controller");
}

#[test]
fn version_2_counts_what_can_be_dropped_as_free_and_high_as_a_limit() {
    let limited = [
        ("memory.max", "1073741824\n"),
        ("memory.high", "max\n"),
        ("memory.current", "1050673152\n"),
        ("memory.stat", STAT_2),
        ("memory.swap.max", "10485760\n"),
        ("memory.swap.current", "4194304\n"),
    ];
    let level = Level::of_version_2(files(&limited)).unwrap();
    let droppable = 696_254_464 + 8_572_928 / 2 - 4_096_000 - 96_000 + 3_145_728 / 2;
    let expected = Level { limit: Some(1 << 30), used: 1_050_673_152, droppable, swap_free: Some(6 << 20) };
    assert_eq!(level, expected);
    assert_eq!(level.free(), Some((1 << 30) - 1_050_673_152 + droppable));
    let mut high = limited;
    high[1].1 = "536870912\n";
    let level = Level::of_version_2(files(&high)).unwrap();
    assert_eq!(level.limit, Some(512 << 20));
    let mut free = limited;
    (free[0].1, free[4].1) = ("max\n", "max\n");
    let level = Level::of_version_2(files(&free)).unwrap();
    assert_eq!((level.limit, level.free(), level.swap_free), (None, None, None));
    assert_eq!(Level::of_version_2(files(&[("memory.max", "1")])), None, "the root has no use of its own");
}

#[test]
fn what_is_not_written_yet_cannot_be_dropped() {
    let pages = |unwritten| FilePages { inactive: 100, active: 40, unwritten, slab: 8 }.droppable();
    assert_eq!((pages(0), pages(20), pages(1000)), (124, 104, 4));
}

#[test]
fn the_tightest_of_all_levels_counts() {
    let level = |limit, used, droppable, swap_free| Level { limit, used, droppable, swap_free };
    let levels = [
        level(Some(1000 << 12), 100 << 12, 0, None),
        level(None, 800 << 12, 0, Some(5 << 12)),
        level(Some(2000 << 12), 1900 << 12, 300 << 12, Some(9 << 12)),
        // More can be dropped than is used: never more than the limit.
        level(Some(3000 << 12), 10 << 12, 20 << 12, None),
    ];
    let expected = GroupMemory { limit_pages: Some(1000), free_pages: Some(400), swap_free_pages: Some(5) };
    assert_eq!(GroupMemory::of(levels.into_iter()), expected);
    assert_eq!(GroupMemory::of([].into_iter()), GroupMemory::default());
}
