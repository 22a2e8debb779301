//! Drops pages again that are in the balloon and have got frames since.
//!
//! A guest that touches what it gave costs the host a frame. So does the host kernel itself: where
//! a whole huge page has gone into the balloon and one small page of it comes out again, the next
//! touch brings the whole of it back, and khugepaged fills what is missing around pages that are
//! there.

use std::io;
use std::ops::Range;
use std::time::Duration;

use devices::reclaim::{Gpa, Reclaim};
use devices::virtio::balloon::Handle;
use event_manager::MutEventSubscriber;

use super::timer::Timer;
use memory::ram::Ram;
use memory::resident::page_count;

/// From one sweep to the next: as often as khugepaged wakes up. A sweep reads 8 bytes for each page
/// of the balloon.
const PERIOD: Duration = Duration::from_secs(10);

/// Sweeps `balloon`, whose pages are in `ram`, every [`PERIOD`].
pub(super) fn sweeper(balloon: Handle, ram: Ram) -> io::Result<Box<dyn MutEventSubscriber>> {
    let timer = Timer::new()?;
    timer.every(PERIOD)?;
    // A part of a huge page of the pool cannot be given back alone, and looks the same ever after.
    Ok(timer.subscriber(move || balloon.sweep(|held| drop_again(&ram, &ram.units(held).0))))
}

/// Drops those of the pages that have frames. Returns how many.
fn drop_again(ram: &Ram, held: &[Range<Gpa>]) -> u64 {
    // Where the page table cannot be read, the balloon's status says so.
    let resident = ram.resident(held).unwrap_or_default();
    let mut failed = 0;
    ram.discard_all(&resident, &mut |range, _| failed += page_count(std::slice::from_ref(range)));
    page_count(&resident) - failed
}
