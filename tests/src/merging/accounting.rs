//! What an engine costs, seen from outside: processor time of threads, and memory besides guest
//! RAM.

#![expect(unsafe_code, reason = "malloc_trim")]

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::time::Duration;

use anyhow::{Context, Result};
use kernel_view::ksm_stat::{self, KsmStat};
use measure::Space;
use merge::ksm::Knobs;

/// The name of the slab engine's threads, in VM processes and in the host's.
const ENGINE_THREAD: &str = "merge";
/// The kernel's caches of the record that KSM keeps of a page, of that of a shared frame, and of
/// that of a mapping, each with the bytes of one where the kernel does not tell. Their fill does
/// not show: the kernel joins caches of one size.
const KSM_PAGE: (&str, u64) = ("ksm_rmap_item", 64);
const KSM_FRAME: (&str, u64) = ("ksm_stable_node", 64);
const MAPPING: (&str, u64) = ("vm_area_struct", 192);

/// Processor seconds of threads so far.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct ThreadSeconds {
    /// Of the slab engine's: the agents, and the matchmaker in this process.
    pub engine: f64,
    /// Of all other threads of the VM processes: mostly vCPUs.
    pub vms: f64,
}

impl ThreadSeconds {
    /// As the kernel's scheduler has it (`schedstat`, in nanoseconds).
    ///
    /// # Errors
    /// A VM has ended.
    pub fn now(spaces: &[Space]) -> Result<Self> {
        let (mut engine, mut vms) = (0, 0);
        for space in spaces {
            let (merging, other) = nanoseconds(space.pid).with_context(|| format!("guest {}", space.name))?;
            engine += merging;
            vms += other;
        }
        engine += nanoseconds(std::process::id())?.0;
        let seconds = |nanoseconds| Duration::from_nanos(nanoseconds).as_secs_f64();
        Ok(Self { engine: seconds(engine), vms: seconds(vms) })
    }

    /// What was used since `before`.
    #[must_use]
    pub fn since(self, before: Self) -> Self {
        Self { engine: self.engine - before.engine, vms: self.vms - before.vms }
    }
}

/// Time of the threads that merge, and of all others, of one process.
fn nanoseconds(pid: u32) -> Result<(u64, u64)> {
    let (mut merging, mut other) = (0, 0);
    let tasks = format!("/proc/{pid}/task");
    for task in fs::read_dir(&tasks).context(tasks)? {
        let path = task?.path();
        // A thread may end meanwhile.
        let read = |name| fs::read_to_string(path.join(name)).unwrap_or_default();
        let time = read("schedstat").split(' ').next().and_then(|n| n.parse::<u64>().ok()).unwrap_or(0);
        *if read("comm").trim() == ENGINE_THREAD { &mut merging } else { &mut other } += time;
    }
    Ok((merging, other))
}

/// Memory that stands beside guest RAM.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Memory {
    /// Private anonymous memory of the VM processes and of this one, without guest RAM.
    pub private_bytes: u64,
    /// Page tables of the VM processes.
    pub page_table_bytes: u64,
    /// Mappings of the VM processes.
    pub mappings: u64,
    /// Bytes of the slabs that this process holds.
    pub slab_bytes: u64,
    /// KSM's records: of the pages of these processes, and of the shared frames of the host.
    pub ksm_bytes: u64,
}

impl Memory {
    /// As it is now.
    ///
    /// # Errors
    /// A VM has ended, or may not be looked at.
    pub fn now(spaces: &[Space]) -> Result<Self> {
        // SAFETY: gives back heap that is free; nothing that is in use is touched.
        unsafe { libc::malloc_trim(0) };
        let mut memory = Self::default();
        let (page_bytes, frame_bytes) = (object_bytes(KSM_PAGE), object_bytes(KSM_FRAME));
        for space in spaces {
            let read = |name| {
                let path = format!("/proc/{}/{name}", space.pid);
                fs::read_to_string(&path).with_context(|| format!("guest {}: {path}", space.name))
            };
            let ram = |address| space.extents.iter().any(|e| e.hvas().contains(&memory::Hva(address)));
            let (private_bytes, mappings) = private_besides(&read("smaps")?, ram);
            memory.private_bytes += private_bytes;
            memory.mappings += mappings;
            memory.page_table_bytes += kib_of(&read("status")?, "VmPTE:") * 1024;
            memory.ksm_bytes += KsmStat::of(space.pid).map_or(0, |stat| stat.rmap_items * page_bytes);
        }
        let own = fs::read_to_string("/proc/self/smaps").context("/proc/self/smaps")?;
        memory.private_bytes += private_besides(&own, |_| false).0;
        memory.slab_bytes = memory_files();
        let frames = ksm_stat::counter(&Knobs::default().0, "pages_shared").unwrap_or(0);
        memory.ksm_bytes += frames * frame_bytes;
        Ok(memory)
    }
}

/// Private anonymous bytes of all mappings for whose start `is_ram` does not hold, and how many
/// mappings there are in all.
fn private_besides(smaps: &str, is_ram: impl Fn(u64) -> bool) -> (u64, u64) {
    let (mut bytes, mut mappings, mut counts) = (0, 0, false);
    for line in smaps.lines() {
        let mut words = line.split_ascii_whitespace();
        let Some(first) = words.next() else { continue };
        if let Some((start, _)) = first.split_once('-').filter(|_| !first.ends_with(':')) {
            mappings += 1;
            // Words: range, access, offset, device, inode.
            let anonymous = words.nth(3) == Some("0");
            counts = anonymous && u64::from_str_radix(start, 16).is_ok_and(|start| !is_ram(start));
        } else if counts && matches!(first, "Private_Clean:" | "Private_Dirty:") {
            bytes += words.next().and_then(|kib| kib.parse::<u64>().ok()).unwrap_or(0) * 1024;
        }
    }
    (bytes, mappings)
}

fn kib_of(status: &str, key: &str) -> u64 {
    let line = status.lines().find_map(|line| line.strip_prefix(key));
    line.and_then(|rest| rest.split_ascii_whitespace().next()?.parse().ok()).unwrap_or(0)
}

/// Bytes in the memory files that this process has open.
#[must_use]
pub fn memory_files() -> u64 {
    let entries = fs::read_dir("/proc/self/fd").into_iter().flatten().flatten();
    let slabs = entries.filter(|entry| {
        fs::read_link(entry.path()).is_ok_and(|to| to.to_string_lossy().starts_with("/memfd:"))
    });
    let mut seen = std::collections::BTreeSet::new();
    let sizes = slabs.filter_map(|entry| {
        let file = fs::metadata(entry.path()).ok()?;
        seen.insert(file.ino()).then(|| file.blocks() * 512)
    });
    sizes.sum()
}

/// Bytes of the kernel's record of a mapping.
#[must_use]
pub fn mapping_bytes() -> u64 {
    object_bytes(MAPPING)
}

/// The size of an object in a cache of the kernel, by its own word or the usual one.
fn object_bytes((cache, usual): (&str, u64)) -> u64 {
    let told = fs::read_to_string(format!("/sys/kernel/slab/{cache}/object_size"));
    told.ok().and_then(|text| text.trim().parse().ok()).unwrap_or(usual)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMAPS: &str = "\
55d000000000-55d000100000 rw-p 00000000 08:01 77 /usr/bin/vmm
Private_Dirty:       600 kB
55d010000000-55d010100000 rw-p 00000000 00:00 0 [heap]
Rss:                 100 kB
Private_Clean:         4 kB
Private_Dirty:        96 kB
7f0000000000-7f0001000000 rw-p 00000000 00:00 0
Private_Dirty:     50000 kB
7f0001000000-7f0002000000 r--s 00000000 00:01 9 /memfd:slab (deleted)
Private_Dirty:         8 kB
7ffc00000000-7ffc00021000 rw-p 00000000 00:00 0 [stack]
Private_Dirty:        20 kB
";

    #[test]
    fn ram_and_files_are_left_out() {
        assert_eq!(private_besides(SMAPS, |at| at == 0x7f00_0000_0000), (120 * 1024, 5));
        assert_eq!(private_besides(SMAPS, |_| false), (50120 * 1024, 5));
    }

    #[test]
    fn the_kernel_s_numbers_are_found() {
        assert_eq!(kib_of("VmLib:\t 9 kB\nVmPTE:\t     132 kB\n", "VmPTE:"), 132);
        assert_eq!(kib_of("VmPTE:\t x kB\n", "VmPTE:"), 0);
        assert_eq!(object_bytes(("no such cache", 77)), 77);
    }

    #[test]
    fn a_thread_that_merges_is_told_from_the_others() {
        let spin = || (0..20_000_000_u64).fold(0, |a, b| std::hint::black_box(a ^ b));
        let before = nanoseconds(std::process::id()).unwrap();
        let (send, done) = std::sync::mpsc::channel();
        let (end, ended) = std::sync::mpsc::channel::<()>();
        let thread = std::thread::Builder::new().name(ENGINE_THREAD.into()).spawn(move || {
            spin();
            send.send(()).unwrap();
            let _ = ended.recv();
        });
        done.recv().unwrap();
        let after = nanoseconds(std::process::id()).unwrap();
        drop(end);
        thread.unwrap().join().unwrap();
        assert!(before.0 == 0 && before.1 > 0 && after.0 > 0, "{before:?} {after:?}");
        assert!(nanoseconds(u32::MAX).is_err());
    }
}
