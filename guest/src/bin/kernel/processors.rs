//! The processors besides the first: they read pages without end when `touch` says so, and so keep
//! entries in their TLBs, which a host that takes a page away has to flush.
//!
//! They run no other code, take no commands and write nothing but their own counts.
#![expect(
    unsafe_code,
    reason = "the entry point from assembly, and reads of the workload's pages by address"
)]

use core::array;
use core::sync::atomic::{AtomicU64, Ordering};

use guest::content::PAGE_SIZE;
use guest::protocol::{Done, ErrorCode, Reply, Text, Touch, Touched};
use guest::service::Wait;
use guest::tsc;
use guest::workload::Workload;

use crate::memory::PhysicalPages;
use crate::port;

/// As in `start.s`.
pub(crate) const MAX_PROCESSORS: u64 = 32;
pub(crate) const STACK_BYTES: u64 = 1 << 14;

/// How often an idle processor looks for work.
const IDLE_MILLIS: u32 = 50;
/// Reads between two looks at what is wanted.
const BATCH: u64 = 512;
/// From here on a read is late, and from there on its processor was away.
const LATE_MICROS: u64 = 5;
const AWAY_MICROS: u64 = 1000;

/// Where the stacks begin, for `start.s`; 0 until they are there.
#[unsafe(no_mangle)]
static processor_stacks: AtomicU64 = AtomicU64::new(0);

/// How many of them read.
static READING: AtomicU64 = AtomicU64::new(0);
/// Addresses of what is read.
static START: AtomicU64 = AtomicU64::new(0);
static END: AtomicU64 = AtomicU64::new(0);
/// Ticks from which a read is late, or its processor away.
static LATE: AtomicU64 = AtomicU64::new(u64::MAX);
static AWAY: AtomicU64 = AtomicU64::new(u64::MAX);

static READS: AtomicU64 = AtomicU64::new(0);
static LATE_READS: AtomicU64 = AtomicU64::new(0);
static LATE_TICKS: AtomicU64 = AtomicU64::new(0);
static AWAY_READS: AtomicU64 = AtomicU64::new(0);

/// The first processor's way to the others.
pub(crate) struct Processors {
    others: u64,
    khz: u64,
}

impl Processors {
    /// Lets `count` - 1 processors run, with their stacks from `stacks` on.
    pub(crate) fn start(count: u64, stacks: u64, khz: u64) -> Self {
        LATE.store(LATE_MICROS * khz / 1000, Ordering::Relaxed);
        AWAY.store(AWAY_MICROS * khz / 1000, Ordering::Relaxed);
        processor_stacks.store(stacks, Ordering::Release);
        Self { others: count.clamp(1, MAX_PROCESSORS) - 1, khz }
    }

    /// Has them read the pages held of a class, and says what they saw until now.
    pub(crate) fn obey(&mut self, touch: Touch, workload: &Workload<'_, PhysicalPages>) -> Reply {
        let Touch { class, cpus } = touch;
        let refused = |code, message| Reply::Err { code, message: Text::of(message) };
        if cpus > self.others {
            let have = self.others;
            return refused(
                ErrorCode::Failed,
                format_args!("cpus={cpus}, expected at most {have}, one less than the guest has"),
            );
        }
        let addresses = workload.pages().addresses(workload.held_range(class));
        if cpus > 0 && addresses.is_empty() {
            return refused(ErrorCode::Empty, format_args!("no pages of class {class} are held below 4 GiB"));
        }
        READING.store(0, Ordering::Release);
        START.store(addresses.start, Ordering::Relaxed);
        END.store(addresses.end, Ordering::Relaxed);
        READING.store(cpus, Ordering::Release);
        let [reads, late, ticks, away] =
            [&READS, &LATE_READS, &LATE_TICKS, &AWAY_READS].map(|count| count.swap(0, Ordering::Relaxed));
        let late_us = (u128::from(ticks) * 1000 / u128::from(self.khz)) as u64;
        Reply::Ok(Done::Touch(Touched { cpus, reads, late, late_us, away }))
    }
}

/// Entered from `start.s` by each processor but the first, in ring 3 on a stack of its own.
#[unsafe(no_mangle)]
extern "C" fn processor_main(number: u32) -> ! {
    loop {
        if u64::from(number) > READING.load(Ordering::Acquire) {
            port::wait(Wait::Millis(IDLE_MILLIS));
            continue;
        }
        read_for_a_while(number.into());
    }
}

/// Reads a word of each page, from another place than the other processors, until something else is
/// wanted.
fn read_for_a_while(number: u64) {
    let (start, end) = (START.load(Ordering::Relaxed), END.load(Ordering::Relaxed));
    let (late, away) = (LATE.load(Ordering::Relaxed), AWAY.load(Ordering::Relaxed));
    let pages = end.saturating_sub(start) / PAGE_SIZE as u64;
    if pages == 0 {
        return;
    }
    let mut page = pages / MAX_PROCESSORS * number % pages;
    let is_wanted = || {
        number <= READING.load(Ordering::Acquire)
            && (START.load(Ordering::Relaxed), END.load(Ordering::Relaxed)) == (start, end)
    };
    while is_wanted() {
        let [mut late_reads, mut late_ticks, mut away_reads] = array::from_fn(|_| 0);
        let mut before = tsc::now();
        for _ in 0..BATCH {
            let address = start + page * PAGE_SIZE as u64;
            // SAFETY: mapped RAM of the workload, aligned. The first processor may write it
            // meanwhile: so it is read as an atomic, and what it holds is of no interest.
            let word = unsafe { AtomicU64::from_ptr(address as *mut u64) };
            core::hint::black_box(word.load(Ordering::Relaxed));
            let now = tsc::now();
            let took = now.saturating_sub(before);
            before = now;
            if took >= away {
                away_reads += 1;
            } else if took >= late {
                (late_reads, late_ticks) = (late_reads + 1, late_ticks + took);
            }
            page = if page + 1 == pages { 0 } else { page + 1 };
        }
        for (count, more) in
            [(&READS, BATCH), (&LATE_READS, late_reads), (&LATE_TICKS, late_ticks), (&AWAY_READS, away_reads)]
        {
            count.fetch_add(more, Ordering::Relaxed);
        }
    }
}
