//! Findings on the kernel's memory features: KSM, userfaultfd, frame numbers, huge pages.

use std::fs;

use super::finding::{Feature, Finding};
use jail::landlock::WHOLE;
use kernel_view::meminfo::Meminfo;
use kernel_view::pagemap::{FrameTable, Pagemap};
use memory::Hva;
use memory::userfault::{self, Access};
use merge::ksm::{self, Availability, LeftBehind};

pub(super) struct Kernel {
    pub(super) findings: Vec<Finding>,
    ksm: Availability,
    frames: bool,
}

pub(super) fn look() -> Kernel {
    let ksm = ksm::available();
    let frames = frame_numbers();
    let text = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let findings = vec![
        version(text("/proc/sys/kernel/osrelease").trim()),
        ksm_finding(ksm, ksm::left_behind(), &|name| text(&format!("/sys/kernel/mm/ksm/{name}"))),
        userfaultfd(text("/proc/sys/vm/unprivileged_userfaultfd").trim()),
        frames_finding(frames),
        huge_pages(
            &text("/sys/kernel/mm/transparent_hugepage/enabled"),
            &text("/sys/kernel/mm/transparent_hugepage/defrag"),
        ),
        hugetlb(&Meminfo::read().unwrap_or_default()),
        seccomp(jail::seccomp::is_available()),
        landlock(jail::landlock::version()),
    ];
    Kernel { findings, ksm, frames }
}

impl Kernel {
    pub(super) fn ksm_engine(&self) -> Feature {
        let why = match self.ksm {
            Availability::Full => None,
            Availability::AsItIs => Some("with the host's own settings".to_owned()),
            Availability::Stopped => Some("KSM is stopped and only root may start it".to_owned()),
            Availability::Missing => Some("this kernel has no KSM".to_owned()),
        };
        Feature { name: "merging, ksm engine", works: self.ksm.usable(), why }
    }

    pub(super) fn slab_engine(&self) -> Feature {
        let why = userfault::can_freeze().err().map(|error| error.to_string());
        Feature { name: "merging, slab engine", works: why.is_none(), why }
    }

    pub(super) fn exact_frames(&self) -> Feature {
        let why =
            (!self.frames).then(|| "only root sees frame numbers; numbers will be estimates".to_owned());
        Feature { name: "exact frame accounting", works: self.frames, why }
    }
}

fn version(release: &str) -> Finding {
    const NAME: &str = "kernel";
    let mut numbers =
        release.split(|c: char| !c.is_ascii_digit()).map(|part| part.parse::<u32>().unwrap_or(0));
    let number = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    if number >= (6, 4) {
        Finding::ok(NAME, release)
    } else {
        Finding::limited(
            NAME,
            release,
            "before 6.4 KSM has no counters for one process: progress is that of the whole host",
        )
    }
}

fn ksm_finding(state: Availability, left: Option<LeftBehind>, read: &dyn Fn(&str) -> String) -> Finding {
    const NAME: &str = "KSM";
    let value = |name: &str| read(name).trim().to_owned();
    let running = match value("run").as_str() {
        "1" => "running",
        _ => "stopped",
    };
    let now = format!(
        "{running}, {} pages every {} ms, {} pages merged",
        value("pages_to_scan"),
        value("sleep_millisecs"),
        value("pages_sharing"),
    );
    if let Some(LeftBehind { owner, settings, mend }) = left {
        let found =
            format!("{now}; process {owner} and its guard were killed and have left {}", settings.join(", "));
        let change =
            format!("as root: {mend}; or start any fleet with engine ksm, which puts them back first");
        return Finding::limited(NAME, found, change);
    }
    match state {
        Availability::Full => Finding::ok(NAME, format!("{now}; Samepage may set it")),
        Availability::AsItIs => {
            Finding::limited(NAME, format!("{now}; its settings are root's"), "run as root to merge faster")
        }
        Availability::Stopped => {
            Finding::limited(NAME, now, "run as root, or have root do: echo 1 > /sys/kernel/mm/ksm/run")
        }
        Availability::Missing => {
            Finding::missing(NAME, "not in this kernel", "boot a kernel with CONFIG_KSM=y")
        }
    }
}

fn userfaultfd(unprivileged: &str) -> Finding {
    const NAME: &str = "userfaultfd";
    match userfault::probe() {
        Ok(support) => {
            let access = match support.access {
                Access::Device => userfault::DEVICE,
                Access::SystemCall => "system call",
            };
            let found = format!(
                "by {access} (vm.unprivileged_userfaultfd = {unprivileged}): {} features",
                support.names().len()
            );
            let wanted = ["pagefault_flag_wp", "wp_unpopulated", "move"];
            let absent: Vec<_> = wanted.into_iter().filter(|name| !support.has(name)).collect();
            if absent.is_empty() {
                Finding::ok(NAME, format!("{found}, {} among them", wanted.join(", ")))
            } else {
                Finding::limited(
                    NAME,
                    found,
                    format!("{} needs a newer kernel (6.8 has all)", absent.join(", ")),
                )
            }
        }
        Err(error) => Finding::missing(
            NAME,
            error.to_string(),
            format!(
                "give this user access to {}, or sysctl vm.unprivileged_userfaultfd=1",
                userfault::DEVICE
            ),
        ),
    }
}

/// Whether this user may read frame numbers and the frame table.
fn frame_numbers() -> bool {
    let here = 0u8;
    let mut entries = Vec::new();
    let read = Pagemap::open_self().and_then(|mut map| map.read(Hva::of(&raw const here), 1, &mut entries));
    read.is_ok() && entries.iter().any(|entry| entry.pfn().is_some()) && FrameTable::open().is_ok()
}

fn frames_finding(shown: bool) -> Finding {
    const NAME: &str = "frame numbers";
    if shown {
        Finding::ok(NAME, "shown: pagemap, kpagecount, kpageflags")
    } else {
        Finding::limited(
            NAME,
            "hidden from this user: sharing is estimated",
            "run as root for exact accounting",
        )
    }
}

fn huge_pages(enabled: &str, defrag: &str) -> Finding {
    const NAME: &str = "huge pages (THP)";
    let choice = |text: &str| {
        text.split_once('[').and_then(|(_, rest)| rest.split_once(']')).map(|(word, _)| word.to_owned())
    };
    match (choice(enabled), choice(defrag)) {
        (Some(enabled), defrag) => {
            Finding::ok(NAME, format!("{enabled}, defrag {}", defrag.as_deref().unwrap_or("unknown")))
        }
        (None, _) => Finding::limited(
            NAME,
            "not in this kernel",
            "guests will run on small pages; boot a kernel with CONFIG_TRANSPARENT_HUGEPAGE=y for large ones",
        ),
    }
}

fn seccomp(available: bool) -> Finding {
    const NAME: &str = "seccomp";
    match available {
        true => Finding::ok(NAME, "each thread of a VM's process makes the system calls on its list alone"),
        false => Finding::limited(
            NAME,
            "not in this kernel: a VM's process may make any system call",
            "boot a kernel with CONFIG_SECCOMP_FILTER=y, or run only guests that you trust",
        ),
    }
}

fn landlock(version: Option<u32>) -> Finding {
    const NAME: &str = "Landlock";
    match version {
        Some(version @ WHOLE..) => {
            Finding::ok(NAME, format!("version {version}: a VM's process opens its own files alone"))
        }
        Some(version) => Finding::limited(
            NAME,
            format!("version {version}: a VM's process opens its own files alone, with gaps"),
            "a newer kernel (6.12 has all): it keeps VMs from truncating files (version 3), TCP (4), ioctls of \
             devices (5) and abstract sockets (6)",
        ),
        None => Finding::limited(
            NAME,
            "not in this kernel, or off: a VM's process opens the files that its user may",
            "boot a kernel with CONFIG_SECURITY_LANDLOCK=y, and lsm= with landlock in it",
        ),
    }
}

fn hugetlb(meminfo: &Meminfo) -> Finding {
    const NAME: &str = "huge pages (pool)";
    match (
        meminfo.number("HugePages_Total"),
        meminfo.number("HugePages_Free"),
        meminfo.number("Hugepagesize"),
    ) {
        (Some(total), Some(free), Some(size)) => {
            Finding::ok(NAME, format!("{free} of {total} free, {} MiB each", size / 1024))
        }
        _ => Finding::limited(
            NAME,
            "not in this kernel",
            "boot a kernel with CONFIG_HUGETLBFS=y to back guests with it",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::super::Level;
    use super::*;

    #[test]
    fn kernel_versions_compare_by_number() {
        assert_eq!(version("6.18.44-fc").level, Level::Ok);
        assert_eq!(version("6.4-rc1").level, Level::Ok);
        assert_eq!(version("6.1.0-37-amd64").level, Level::Limited);
        assert_eq!(version("5.15.0").level, Level::Limited);
        assert_eq!(version("").level, Level::Limited);
    }

    #[test]
    fn every_state_of_ksm_has_its_advice() {
        let read = |name: &str| {
            if name == "run" { "1\n".to_owned() } else { "100\n".to_owned() }
        };
        let found = ksm_finding(Availability::AsItIs, None, &read);
        assert!(found.found.starts_with("running, 100 pages every 100 ms"), "{}", found.found);
        assert_eq!(ksm_finding(Availability::Missing, None, &read).level, Level::Missing);
        assert!(ksm_finding(Availability::Stopped, None, &read).change.unwrap().contains("echo 1"));
        let (settings, mend) = (vec!["run=1 (was 0)".to_owned()], "echo 0 > run".to_owned());
        let left = ksm_finding(Availability::Full, Some(LeftBehind { owner: 7, settings, mend }), &read);
        assert!(left.level == Level::Limited && left.found.contains("process 7"), "{left:?}");
        assert!(left.found.contains("run=1 (was 0)") && left.change.unwrap().contains("echo 0 > run"));
    }

    #[test]
    fn walls_that_are_missing_are_told() {
        let levels = [None, Some(1), Some(6), Some(9)].map(|version| landlock(version).level);
        assert_eq!(levels, [Level::Limited, Level::Limited, Level::Ok, Level::Ok]);
        assert_eq!([false, true].map(|is| seccomp(is).level), [Level::Limited, Level::Ok]);
    }

    #[test]
    fn the_chosen_huge_page_mode_is_shown() {
        assert_eq!(huge_pages("always [madvise] never\n", "[never]").found, "madvise, defrag never");
        assert_eq!(huge_pages("", "").level, Level::Limited);
    }
}
