//! The time stamp counter: the only clock fine enough for a single store.
#![expect(unsafe_code, reason = "reading the counter, and a store that the compiler may not leave out")]

use core::arch::x86_64::{_mm_lfence, _rdtsc};

/// The counter now, in ticks.
pub fn now() -> u64 {
    // SAFETY: every x86-64 processor has it, and neither our VMM nor Linux forbids it to ring 3.
    unsafe { _rdtsc() }
}

/// Ticks that it takes to store into `word` what it holds already.
///
/// The word is read first, so that the write alone is timed: its page fault if there is one, and
/// any delay of it.
pub fn time_store(word: &mut u64) -> u64 {
    let value = core::hint::black_box(*word);
    let began = fenced();
    // SAFETY: a store through a reference that is ours alone.
    unsafe { core::ptr::write_volatile(word, value) };
    fenced().saturating_sub(began)
}

/// The counter, read after all earlier instructions and before any later one.
pub fn fenced() -> u64 {
    // SAFETY: every x86-64 processor has this fence.
    unsafe { _mm_lfence() };
    let ticks = now();
    // SAFETY: as above.
    unsafe { _mm_lfence() };
    ticks
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_store_takes_time_and_changes_nothing() {
        let mut word = 7;
        let took: u64 = (0..100).map(|_| time_store(&mut word)).sum();
        assert_eq!(word, 7);
        assert!(took > 0);
    }
}
