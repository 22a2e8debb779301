//! Takes up the host's swap, to see what is done without: memory of our own, paged out until there
//! is room for no more.
#![expect(unsafe_code, reason = "advises the kernel about mappings of its own")]

use vm_memory::{MmapRegion, VolatileMemory};

use super::page_out::{PageOutError, has_swap};
use super::{Hva, PAGE};
use kernel_view::pagemap::Pagemap;

/// Bytes that are written and paged out at a time.
const CHUNK_BYTES: usize = 4 << 20;
/// Swap is full once nothing of this many chunks in a row went there: the kernel keeps some slots
/// per processor.
const LAST_TRIES: u32 = 3;
/// Every byte of every page: not zero, so that it takes a slot, and the same everywhere, so that
/// zram keeps next to nothing.
const FILLING: u8 = 0xa5;

/// Swap that is taken. Dropped, it is free again.
#[derive(Debug, Default)]
pub struct SwapFiller {
    chunks: Vec<MmapRegion>,
}

impl SwapFiller {
    /// Takes all the swap there is, unless `go_on` says no before. Returns how much it has now, in
    /// pages.
    ///
    /// # Errors
    /// There is no swap, or it cannot be seen.
    pub fn fill(&mut self, mut go_on: impl FnMut() -> bool) -> Result<u64, PageOutError> {
        let (mut pagemap, mut entries) = (Pagemap::open_self()?, Vec::new());
        let mut swapped = |chunk: &MmapRegion| -> Result<u64, PageOutError> {
            pagemap.read(Hva::of(chunk.as_ptr()), CHUNK_BYTES / PAGE, &mut entries)?;
            Ok(entries.iter().filter(|entry| entry.swapped()).count() as u64)
        };
        let filling = vec![FILLING; CHUNK_BYTES];
        let mut tries = LAST_TRIES;
        while tries > 0 && go_on() {
            match has_swap() {
                Err(PageOutError::SwapFull { .. }) => break,
                other => other?,
            }
            // With less than 4 MiB of memory left this stops; the swap taken so far stays taken.
            let Ok(chunk) = MmapRegion::<()>::new(CHUNK_BYTES) else { break };
            chunk.as_volatile_slice().copy_from(&filling);
            // SAFETY: the range is the mapping just made; the advice keeps its contents. What it
            // did the page table tells.
            unsafe { libc::madvise(chunk.as_ptr().cast(), CHUNK_BYTES, libc::MADV_PAGEOUT) };
            if swapped(&chunk)? > 0 {
                self.chunks.push(chunk);
                tries = LAST_TRIES;
            } else {
                tries -= 1;
            }
        }
        self.chunks.iter().map(swapped).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_swap_it_says_so_and_an_interrupt_ends_it() {
        let mut filler = SwapFiller::default();
        assert_eq!(filler.fill(|| false).unwrap(), 0);
        if matches!(has_swap(), Err(PageOutError::NoSwap)) {
            assert!(matches!(filler.fill(|| true), Err(PageOutError::NoSwap)));
        }
    }
}
