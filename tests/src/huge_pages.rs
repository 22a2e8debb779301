//! The host's pool of 2 MiB pages, made larger for one test.

use std::fs;
use std::sync::{Mutex, MutexGuard};

use kernel_view::meminfo::Meminfo;

const COUNT: &str = "/proc/sys/vm/nr_hugepages";

/// How often memory is put together before the pool is taken to be as large as it gets.
const TRIES: u32 = 5;

static POOL: Mutex<()> = Mutex::new(());

/// Additional huge pages in the pool. Dropped, the pool has its old size.
#[derive(Debug)]
pub struct HugePages {
    before: String,
    _alone: MutexGuard<'static, ()>,
}

impl HugePages {
    /// Adds `count` pages to the pool, which this test has for itself.
    ///
    /// # Errors
    /// Why there are none: no root, or no memory in one piece.
    pub fn add(count: u64) -> Result<Self, String> {
        let alone = os::lock(&POOL);
        let before = fs::read_to_string(COUNT).map_err(|e| format!("{COUNT}: {e}"))?;
        let pool = Self { before: before.trim().to_owned(), _alone: alone };
        let had = field("HugePages_Total");
        for _ in 0..TRIES {
            fs::write(COUNT, (had + count).to_string()).map_err(|e| format!("{COUNT}: {e}"))?;
            if field("HugePages_Total") >= had + count {
                break;
            }
            // Memory is in pieces where files fill it, as after a build: drop what is clean, and
            // join the rest.
            for (knob, value) in [("drop_caches", "1"), ("compact_memory", "1")] {
                let knob = format!("/proc/sys/vm/{knob}");
                fs::write(&knob, value).map_err(|e| format!("{knob}: {e}"))?;
            }
        }
        match field("HugePages_Total") {
            total if total >= had + count => Ok(pool),
            total => Err(format!("the pool has {total} huge pages of {} that were asked for", had + count)),
        }
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        let _ = fs::write(COUNT, &self.before);
    }
}

/// A field of `/proc/meminfo` as it is written: `HugePages_Free`, or `MemTotal` in KiB.
#[must_use]
pub fn field(name: &str) -> u64 {
    Meminfo::read().unwrap_or_default().number(name).unwrap_or(0)
}
