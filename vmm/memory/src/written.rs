//! Which pages of guest RAM were written since they were last cleared: the log that a VM's vCPUs
//! and devices write to, and the part of it that the VMM itself writes.

use std::io;
use std::ops::Range;

use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use super::PAGE_BYTES;
use super::page::to_usize;
use super::page_set::{PageSet, WORD_PAGES};
use super::ram::Ram;

/// Which pages of guest RAM were written.
///
/// Sets are of all of RAM; what is left of their last word is 0.
///
/// A page's bit says that it may have been written since the bit was last cleared. To know what is
/// in a page, clear its bit, and *then* look: whatever is written after [`WriteLog::clear`] has
/// returned sets the bit again, what was written before is there to be seen, and may set the bit
/// once more. A write of the VMM's own that is under way while the log is read may be missing
/// there; the next read has it. So a bit that is not set is a reason not to look at a page; it is
/// no proof that the page is as it was, and a page is compared before it is replaced.
///
/// Pages that are given back set no bit: see [`Ram::discards`]. Nor do those of a slab that replace
/// what holds the same.
///
/// While the log is on KVM maps pages of 4 KiB only, and breaks up huge ones where bits are
/// cleared. The guest pays for its first write to each page after a clear: 10 to 22 us (shadow
/// paging), 27 to 31 us (nested paging, emulated). Its reads cost nothing. For 256 MiB reading the
/// log takes some 45 us, clearing 16,384 pages 0.1 to 3 ms, switching it on 0.1 ms. A page whose
/// bit is left set costs the guest nothing: leave the bits of pages that keep changing.
///
/// Clearing is seen by every user of this log: one of these has one user. After an error of `read`
/// or `clear` nothing is known of any page, until the log is stopped and started.
pub trait WriteLog: Send {
    /// Switches logging on; nothing, if it is on. After it every page counts as written.
    fn start(&mut self) -> io::Result<()>;

    /// Switches logging off; nothing, if it is off. What is written then is not logged, and the
    /// guest may have huge pages again.
    fn stop(&mut self) -> io::Result<()>;

    /// Replaces the contents of `written`. Clears nothing.
    ///
    /// # Errors
    /// Logging is off.
    fn read(&mut self, written: &mut PageSet) -> io::Result<()>;

    /// Clears the bits of `pages`, and leaves the others.
    ///
    /// # Errors
    /// Logging is off, or `pages` has room for other than all of RAM.
    fn clear(&mut self, pages: &PageSet) -> io::Result<()> {
        self.clear_in_parts(pages, &mut || {})
    }

    /// The same; `between` is called between two parts of the work, none of which takes long.
    ///
    /// # Errors
    /// Those of [`WriteLog::clear`].
    fn clear_in_parts(&mut self, pages: &PageSet, between: &mut dyn FnMut()) -> io::Result<()>;
}

/// The log of what the VMM itself writes: devices and loaders, by way of [`Ram::memory`]. For RAM
/// that belongs to no VM it is all there is.
pub struct OwnWrites {
    ram: Ram,
    /// None while it is off.
    written: Option<PageSet>,
}

impl OwnWrites {
    /// The log of `ram`, switched off.
    pub fn new(ram: &Ram) -> Self {
        Self { ram: ram.clone(), written: None }
    }

    /// Takes the bits that were set in guest memory since the last time.
    fn take(&mut self) {
        let Some(written) = &mut self.written else { return };
        let words = words(&self.ram);
        for (region, words) in self.ram.memory().iter().zip(words) {
            // Writers mark after they have written. So what is marked here can be read from here
            // on.
            let marked = (**region).bitmap().get_and_reset();
            let own = written.words_mut().get_mut(words).unwrap_or_default();
            own.iter_mut().zip(marked).for_each(|(own, marked)| *own |= marked);
        }
    }
}

impl WriteLog for OwnWrites {
    fn start(&mut self) -> io::Result<()> {
        if self.written.is_none() {
            self.written = Some(all_pages(&self.ram)?);
        }
        Ok(())
    }

    fn stop(&mut self) -> io::Result<()> {
        self.written = None;
        Ok(())
    }

    fn read(&mut self, written: &mut PageSet) -> io::Result<()> {
        self.take();
        written.clone_from(self.written.as_ref().ok_or_else(off)?);
        Ok(())
    }

    fn clear_in_parts(&mut self, pages: &PageSet, _: &mut dyn FnMut()) -> io::Result<()> {
        let written = self.written.as_mut().ok_or_else(off)?;
        let (found, expected) = (pages.words().len(), written.words().len());
        if found != expected {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("a bitmap of {found} words was to be cleared: expected {expected}"),
            ));
        }
        // Only what `take` has got so far. What was marked since is read next time, once more than
        // need be.
        written.subtract(pages);
        Ok(())
    }
}

/// Which words of a bitmap are those of each extent of `ram`.
pub fn words(ram: &Ram) -> Vec<Range<usize>> {
    let mut end = 0;
    let extents = ram.memory().iter().map(|region| {
        let start = end;
        end += to_usize(region.len().div_ceil(PAGE_BYTES * WORD_PAGES));
        start..end
    });
    extents.collect()
}

/// All pages of `ram`.
fn all_pages(ram: &Ram) -> io::Result<PageSet> {
    let all = PageSet::all(ram.pages().pages());
    // Else an extent would begin inside a word. The layout never makes such.
    if words(ram).last().is_none_or(|last| last.end != all.words().len()) {
        return Err(io::Error::new(
            io::ErrorKind::Unsupported,
            "an extent of guest RAM is not whole in words of pages",
        ));
    }
    Ok(all)
}

fn off() -> io::Error {
    io::Error::other("the log of written pages is off: start it first")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ram::Backing;
    use crate::{Gpa, PageNo};
    use devices::reclaim::Reclaim;
    use vm_memory::{Bytes, GuestAddress};

    fn pages(set: &PageSet) -> Vec<u64> {
        set.iter().map(|page| page.0).collect()
    }

    fn read(log: &mut impl WriteLog) -> PageSet {
        let mut written = PageSet::all(70);
        log.read(&mut written).unwrap();
        written
    }

    #[test]
    fn all_pages_count_as_written_at_first_and_then_those_that_are() {
        // Not whole words of pages.
        let ram = Ram::new((16 << 20) + 5 * PAGE_BYTES, Backing::Anonymous).unwrap();
        let mut log = OwnWrites::new(&ram);
        log.start().unwrap();
        let all = read(&mut log);
        assert_eq!(pages(&all), (0..4096 + 5).collect::<Vec<_>>());
        log.clear(&all).unwrap();
        assert!(pages(&read(&mut log)).is_empty());
        // Two bytes in two pages; a word; from a file.
        ram.memory().write_slice(&[1, 2], GuestAddress(4 * PAGE_BYTES - 1)).unwrap();
        ram.memory()
            .store(7u16, GuestAddress(4100 * PAGE_BYTES), std::sync::atomic::Ordering::Release)
            .unwrap();
        let mut file = &[9u8; 10_000][..];
        ram.memory().read_exact_volatile_from(GuestAddress(100 * PAGE_BYTES), &mut file, 10_000).unwrap();
        let written = read(&mut log);
        assert_eq!(pages(&written), [3, 4, 100, 101, 102, 4100]);
        assert_eq!(read(&mut log), written, "reading clears nothing");
        ram.memory().read_obj::<u64>(GuestAddress(0x5000)).unwrap();
        let mut some = PageSet::none(4096 + 5);
        [4, 9].into_iter().for_each(|page| some.insert(PageNo(page)));
        log.clear(&some).unwrap();
        assert_eq!(pages(&read(&mut log)), [3, 100, 101, 102, 4100], "only what was to be cleared is");
        assert!(log.clear(&PageSet::none(4096)).is_err());
    }

    #[test]
    fn pages_above_the_hole_follow_those_below() {
        let ram = Ram::new((3 << 30) + (16 << 20), Backing::Anonymous).unwrap();
        let mut log = OwnWrites::new(&ram);
        log.start().unwrap();
        let all = read(&mut log);
        log.clear(&all).unwrap();
        ram.memory().write_obj(1u8, GuestAddress((4 << 30) + 2 * PAGE_BYTES)).unwrap();
        assert_eq!(pages(&read(&mut log)), [(3 << 18) + 2]);
    }

    #[test]
    fn it_is_switched_on_and_off_any_number_of_times() {
        let ram = Ram::new(16 << 20, Backing::Anonymous).unwrap();
        let mut log = OwnWrites::new(&ram);
        log.stop().unwrap();
        assert!(log.read(&mut PageSet::default()).is_err() && log.clear(&PageSet::none(4096)).is_err());
        log.start().unwrap();
        let all = read(&mut log);
        log.clear(&all).unwrap();
        log.start().unwrap();
        assert!(pages(&read(&mut log)).is_empty(), "it was on");
        log.stop().unwrap();
        assert!(log.read(&mut PageSet::default()).is_err());
        log.start().unwrap();
        assert_eq!(read(&mut log), all);
    }

    #[test]
    fn a_page_that_is_given_back_is_counted_and_not_logged() {
        let ram = Ram::new(16 << 20, Backing::Anonymous).unwrap();
        let mut log = OwnWrites::new(&ram);
        log.start().unwrap();
        let all = read(&mut log);
        log.clear(&all).unwrap();
        let (one, two) = (Gpa(0x3000)..Gpa(0x6000), Gpa(0x8000)..Gpa(0x9000));
        ram.discard(one.clone()).unwrap();
        assert_eq!(ram.discards(), 3);
        ram.discard_all(&[one, two], &mut |_, error| panic!("{error}"));
        assert_eq!(ram.discards(), 7);
        assert!(ram.discard(Gpa(0x3000)..Gpa(0x3001)).is_err());
        assert_eq!(ram.clone().discards(), 7, "nothing was given back");
        assert!(pages(&read(&mut log)).is_empty());
    }
}
