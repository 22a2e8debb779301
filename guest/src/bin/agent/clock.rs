//! Whether time goes on as it should: a sleep takes as long as asked, and no processor's clock is
//! behind another's.

use guest::protocol::{Clock, Done, ErrorCode, Reply, Text};
use guest::tsc;

use crate::sys;

/// How often each processor's clock is read.
const ROUNDS: u64 = 200;

/// Sleeps, and then reads the clocks of all processors in turn.
pub(crate) fn obey(millis: u32) -> Reply {
    let began = sys::now_micros();
    sys::sleep_millis(millis as usize);
    let slept_us = sys::now_micros().saturating_sub(began);
    match compare() {
        Ok((cpus, readings, backward)) => {
            Reply::Ok(Done::Clock(Clock { slept_us, cpus, readings, backward }))
        }
        Err(error) => Reply::Err {
            code: ErrorCode::Failed,
            message: Text::of(format_args!("sched_setaffinity: {error}")),
        },
    }
}

/// Processors, readings, and how many readings were earlier than the one before, by the clock or by
/// the counter.
fn compare() -> Result<(u64, u64, u64), sys::Errno> {
    let all = sys::affinity()?;
    let cpus = (0..64).filter(|cpu| all & 1 << cpu != 0);
    let (mut readings, mut backward) = (0, 0);
    let (mut last_nanos, mut last_ticks) = (sys::now_nanos(), tsc::now());
    for _ in 0..ROUNDS {
        for cpu in cpus.clone() {
            sys::set_affinity(1 << cpu)?;
            let (nanos, ticks) = (sys::now_nanos(), tsc::now());
            readings += 1;
            backward += u64::from(nanos < last_nanos || ticks < last_ticks);
            (last_nanos, last_ticks) = (nanos, ticks);
        }
    }
    sys::set_affinity(all)?;
    Ok((cpus.count() as u64, readings, backward))
}
