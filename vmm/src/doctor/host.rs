//! Findings on the host: cgroups, swap, pressure, limits, memory.

use std::fs;

use kernel_view::meminfo::Meminfo;
use kernel_view::swaps::Swap;

use super::finding::Finding;

/// The kernel's default; enough for merging by runs.
const USUAL_MAP_COUNT: u64 = 65_530;
/// Descriptors of a fleet of some hundred guests.
const WANTED_FILES: u64 = 4096;

pub(super) fn look() -> Vec<Finding> {
    let text = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let number = |path: &str| text(path).trim().parse::<u64>().ok();
    let limits = text("/proc/self/limits");
    vec![
        cgroups(&text("/proc/self/mounts"), &|root| text(&format!("{root}/cgroup.controllers"))),
        swap(&text("/proc/swaps"), zram_bytes()),
        pressure(&text("/proc/pressure/memory")),
        locked(limit(&limits, "Max locked memory")),
        files(limit(&limits, "Max open files")),
        map_count(number("/proc/sys/vm/max_map_count")),
        overcommit(number("/proc/sys/vm/overcommit_memory")),
        memory(&Meminfo::read().unwrap_or_default()),
    ]
}

fn cgroups(mounts: &str, controllers: &dyn Fn(&str) -> String) -> Finding {
    const NAME: &str = "cgroups";
    let mut v1 = false;
    let mut v2 = None;
    for line in mounts.lines() {
        let fields: Vec<_> = line.split_whitespace().collect();
        match fields.as_slice() {
            [_, path, "cgroup2", ..] => v2 = v2.or(Some(*path)),
            [_, _, "cgroup", options, ..] => v1 |= options.split(',').any(|option| option == "memory"),
            _ => {}
        }
    }
    let v2_memory = v2.is_some_and(|root| controllers(root).split_whitespace().any(|name| name == "memory"));
    let change = "boot with systemd.unified_cgroup_hierarchy=1 (and cgroup_enable=memory) for limits and reclaim by guest";
    match (v2_memory, v1, v2) {
        (true, ..) => Finding::ok(NAME, "v2 with the memory controller"),
        (_, true, _) => Finding::limited(NAME, "v1 with the memory controller", change),
        (_, _, Some(_)) => Finding::limited(NAME, "v2 without the memory controller", change),
        _ => Finding::missing(NAME, "none mounted", change),
    }
}

fn swap(swaps: &str, zram: u64) -> Finding {
    const NAME: &str = "swap";
    let sizes: Vec<_> = Swap::each(swaps).map(|swap| (swap.name.contains("zram"), swap.kib)).collect();
    let total: u64 = sizes.iter().map(|(_, kib)| kib / 1024).sum();
    if total > 0 {
        let compressed = if sizes.iter().any(|(zram, _)| *zram) { ", zram among it" } else { "" };
        return Finding::ok(NAME, format!("{total} MiB{compressed}"));
    }
    let found = if zram > 0 { "none in use; a zram device is set up" } else { "none" };
    Finding::limited(
        NAME,
        found,
        "add swap or zram: without it a host that promised too much can only stop guests",
    )
}

/// Size of all zram devices that are set up.
fn zram_bytes() -> u64 {
    let Ok(devices) = fs::read_dir("/sys/block") else {
        return 0;
    };
    let zrams = devices.flatten().filter(|device| device.file_name().to_string_lossy().starts_with("zram"));
    zrams
        .filter_map(|device| {
            fs::read_to_string(device.path().join("disksize")).ok()?.trim().parse::<u64>().ok()
        })
        .sum()
}

fn pressure(text: &str) -> Finding {
    const NAME: &str = "pressure (PSI)";
    match text.lines().find(|line| line.starts_with("some")) {
        Some(line) => {
            let average = line.split_whitespace().find_map(|word| word.strip_prefix("avg10=")).unwrap_or("?");
            Finding::ok(NAME, format!("{average} % of the last 10 s some task waited for memory"))
        }
        None => Finding::limited(NAME, "not shown", "boot with psi=1 to see memory pressure before it hurts"),
    }
}

fn locked(limit: Option<Limit>) -> Finding {
    let found = limit.map_or("unknown".to_owned(), |limit| match limit {
        Limit::Unlimited => "unlimited".to_owned(),
        Limit::At(bytes) => format!("{} KiB", bytes / 1024),
    });
    // Guest memory is never locked, so any limit will do.
    Finding::ok("locked memory limit", found)
}

fn files(limit: Option<Limit>) -> Finding {
    const NAME: &str = "open files limit";
    match limit {
        Some(Limit::At(files)) if files < WANTED_FILES => Finding::limited(
            NAME,
            files.to_string(),
            format!("ulimit -n {WANTED_FILES}: a guest with devices needs some dozens"),
        ),
        Some(Limit::At(files)) => Finding::ok(NAME, files.to_string()),
        Some(Limit::Unlimited) => Finding::ok(NAME, "unlimited"),
        None => Finding::ok(NAME, "unknown"),
    }
}

fn map_count(count: Option<u64>) -> Finding {
    const NAME: &str = "vm.max_map_count";
    match count {
        Some(count) if count < USUAL_MAP_COUNT => Finding::limited(
            NAME,
            count.to_string(),
            format!("sysctl vm.max_map_count={USUAL_MAP_COUNT}: a merged run takes one mapping"),
        ),
        Some(count) => Finding::ok(NAME, count.to_string()),
        None => Finding::ok(NAME, "unknown"),
    }
}

fn overcommit(mode: Option<u64>) -> Finding {
    const NAME: &str = "vm.overcommit_memory";
    match mode {
        Some(0) => Finding::ok(NAME, "0: the kernel refuses only obvious overcommits"),
        Some(1) => Finding::ok(NAME, "1: never refused"),
        Some(2) => Finding::limited(
            NAME,
            "2: promises are limited to CommitLimit",
            "sysctl vm.overcommit_memory=0, or guests cannot be promised more than the host has",
        ),
        _ => Finding::ok(NAME, "unknown"),
    }
}

fn memory(meminfo: &Meminfo) -> Finding {
    const NAME: &str = "memory";
    match (meminfo.number("MemTotal"), meminfo.number("MemAvailable")) {
        (Some(total), Some(available)) => {
            let found = format!("{} of {} MiB available", available / 1024, total / 1024);
            if available >= 512 * 1024 {
                Finding::ok(NAME, found)
            } else {
                Finding::limited(NAME, found, "free some: the demo alone wants 256 MiB")
            }
        }
        _ => Finding::limited(NAME, "unknown", "mount /proc"),
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Limit {
    Unlimited,
    At(u64),
}

/// The soft limit of a line of /proc/self/limits.
fn limit(text: &str, name: &str) -> Option<Limit> {
    let soft = text.lines().find_map(|line| line.strip_prefix(name))?.split_whitespace().next()?;
    match soft {
        "unlimited" => Some(Limit::Unlimited),
        number => number.parse().ok().map(Limit::At),
    }
}

#[cfg(test)]
mod tests {
    use super::super::Level;
    use super::*;

    #[test]
    fn cgroup_versions_are_told_apart() {
        let v2 = "cgroup2 /sys/fs/cgroup cgroup2 rw 0 0\n";
        assert_eq!(cgroups(v2, &|_| "cpu io memory pids\n".to_owned()).level, Level::Ok);
        assert_eq!(cgroups(v2, &|_| "cpu io\n".to_owned()).found, "v2 without the memory controller");
        let v1 = "cgroup /sys/fs/cgroup/memory cgroup rw,memory 0 0\n";
        assert_eq!(cgroups(v1, &|_| String::new()).found, "v1 with the memory controller");
        assert_eq!(cgroups("", &|_| String::new()).level, Level::Missing);
    }

    #[test]
    fn swap_is_summed() {
        let header = "Filename\tType\tSize\tUsed\tPriority\n";
        assert_eq!(swap(header, 0).level, Level::Limited);
        let two = format!("{header}/dev/zram0 partition 1048576 0 5\n/dev/vdb partition 1048576 0 -2\n");
        assert_eq!(swap(&two, 0).found, "2048 MiB, zram among it");
    }

    #[test]
    fn limits_are_soft_ones() {
        let text = "Limit                     Soft Limit           Hard Limit           Units\n\
                    Max locked memory         8388608              8388608              bytes\n\
                    Max open files            unlimited            1048576              files\n";
        assert_eq!(limit(text, "Max locked memory"), Some(Limit::At(8_388_608)));
        assert_eq!(limit(text, "Max open files"), Some(Limit::Unlimited));
        assert_eq!(limit(text, "Max nothing"), None);
        assert_eq!(files(Some(Limit::At(1024))).level, Level::Limited);
    }

    #[test]
    fn what_is_available_is_said() {
        let total = "MemTotal:       24684096 kB\n";
        assert_eq!(memory(&Meminfo::of(total)).level, Level::Limited);
        let both = Meminfo::of(format!("{total}MemAvailable: 1048576 kB\n"));
        assert_eq!(memory(&both).found, "1024 of 24105 MiB available");
    }

    #[test]
    fn odd_settings_are_pointed_out() {
        assert_eq!(overcommit(Some(2)).level, Level::Limited);
        assert_eq!(map_count(Some(1000)).level, Level::Limited);
        assert_eq!(pressure("").level, Level::Limited);
        assert!(pressure("some avg10=1.50 avg60=0 avg300=0 total=1\n").found.starts_with("1.50 %"));
    }
}
