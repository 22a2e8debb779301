//! Statistics (5.5.6.3): a buffer stays with the device, which uses it when the host wants new
//! ones.

use core::sync::atomic::{AtomicU32, Ordering};

use super::{Driver, F_DEFLATE_ON_OOM, Rings, STATISTICS_WORDS};
use crate::content::PAGE_SIZE;
use crate::in_use::InUse;
use crate::virtio::Transport;
use crate::virtio::ring::{Buffer, Ring, Unusable};

/// VIRTIO_BALLOON_S_MINFLT.
const MINOR_FAULTS: u16 = 3;
/// VIRTIO_BALLOON_S_MEMFREE.
const FREE_MEMORY: u16 = 4;
/// VIRTIO_BALLOON_S_MEMTOT.
const TOTAL_MEMORY: u16 = 5;
/// VIRTIO_BALLOON_S_AVAIL.
const AVAILABLE_MEMORY: u16 = 6;
/// There are tags from 0 to below this.
const TAGS: u16 = 16;
/// A tag of 16 bits and a value of 64, with nothing between.
const STAT_BYTES: usize = 10;
const BUFFER_BYTES: usize = STAT_BYTES * TAGS as usize;

impl<T: Transport> Driver<'_, T> {
    /// Sends fresh statistics when the device has used the buffer.
    pub(super) fn step_statistics(&mut self, rings: &mut Rings<'_>, in_use: &InUse) -> Result<(), Unusable> {
        let Some(ring) = &mut rings.statistics else { return Ok(()) };
        if ring.all_used()? {
            self.send_statistics(ring, in_use);
        }
        Ok(())
    }

    fn send_statistics(&mut self, ring: &mut Ring<'_>, in_use: &InUse) {
        let mut bytes = [0; BUFFER_BYTES];
        for (tag, stat) in (0..TAGS).zip(bytes.chunks_exact_mut(STAT_BYTES)) {
            stat[..2].copy_from_slice(&tag.to_le_bytes());
            stat[2..].copy_from_slice(&self.statistic(tag, in_use).to_le_bytes());
        }
        store_bytes(&self.words[STATISTICS_WORDS..], &bytes);
        let gpa = self.gpa + 4 * STATISTICS_WORDS as u64;
        // There is room: nothing else is out.
        let _ = ring.add(&[Buffer { gpa, len_bytes: BUFFER_BYTES as u32, writable: false }]);
        ring.notify(&mut self.transport);
        self.statistics_sent += 1;
    }

    /// This guest has no swap, no caches, no huge pages that it allocates one by one, and no OOM
    /// killer: those are 0. Sizes are in bytes. As in Linux, the balloon is not part of the total
    /// unless it gives way by itself.
    fn statistic(&self, tag: u16, in_use: &InUse) -> u64 {
        let ballooned = if self.features & F_DEFLATE_ON_OOM == 0 { self.pages.given() } else { 0 };
        match tag {
            MINOR_FAULTS => self.first_writes,
            FREE_MEMORY | AVAILABLE_MEMORY => self.free_pages(in_use) * PAGE_SIZE as u64,
            TOTAL_MEMORY => self.mem_pages.saturating_sub(ballooned) * PAGE_SIZE as u64,
            _ => 0,
        }
    }
}

/// Stores `bytes`, padded with zeros to whole words.
pub(super) fn store_bytes(words: &[AtomicU32], bytes: &[u8]) {
    for (word, four) in words.iter().zip(bytes.chunks(4)) {
        let mut value = [0; 4];
        value[..four.len()].copy_from_slice(four);
        word.store(u32::from_le_bytes(value), Ordering::Relaxed);
    }
}
