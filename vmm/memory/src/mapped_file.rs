//! Guest RAM that lies in a flat file (see [`super::flat`]): a private mapping of it, read when it
//! is touched. VMs that go on from one file have the frames of the page cache in common until they
//! write, and starting one takes no time for its size.
//!
//! What another process writes to the file would show in the guest, and cutting it short would end
//! the VM: so it is mapped under a lease, and before that is given up [`Ram::leave_file`] copies
//! what still lies there.

use std::fs::File;
use std::sync::atomic::Ordering;

use super::flat::{FlatError, next_data};
use super::image::MAX_RUNS;
use super::page_set::PageSet;
use super::ram::Ram;
use super::{PageNo, PageRange};

/// Holes of at most this many pages are mapped with what is around them; larger ones, too, if there
/// are too many pieces.
const GAP_PAGES: u64 = 16;
/// Pages copied at a time.
const PIECE_PAGES: u64 = 2048;

impl Ram {
    /// Has RAM, to which nothing was written yet, hold what `file` does. Returns how many pages of
    /// it are mapped.
    ///
    /// # Errors
    /// The file is of another length, or cannot be mapped. Then a part may be: the memory is of no
    /// use.
    pub fn map_flat(&self, file: &File) -> Result<u64, FlatError> {
        self.check_length(file)?;
        let pieces = pieces(file, self.pages().end())?;
        let mut placement = self.placement();
        // As pages of slabs: what is given back of them is mapped afresh, and they are not parked.
        (placement.slabs, placement.slab_pages) = (true, PageSet::none(self.pages().pages()));
        self.maps_file.store(true, Ordering::Relaxed);
        for part in pieces.iter().flat_map(|piece| self.parts(*piece)) {
            part.map_file(file).map_err(FlatError::io("map the memory file"))?;
            self.advice_anew().for_each(|advice| _ = part.advise(advice));
            placement.slab_pages.insert_range(part.pages());
        }
        Ok(placement.slab_pages.count())
    }

    /// Whether a part of it may lie in a file.
    pub fn maps_file(&self) -> bool {
        self.maps_file.load(Ordering::Relaxed)
    }

    /// Has it hold what it does, in memory of its own. No vCPU runs and no device works meanwhile.
    ///
    /// # Errors
    /// There is no memory. What was not copied is in the file as before, but for the piece at which
    /// it failed.
    pub fn leave_file(&self) -> Result<(), FlatError> {
        let mut placement = self.placement();
        let pieces: Vec<PageRange> = placement.slab_pages.runs_of(self.pages(), PIECE_PAGES).collect();
        for part in pieces.into_iter().flat_map(|piece| self.parts(piece)) {
            part.copy_in_place().map_err(FlatError::io("copy what lies in the memory file"))?;
            self.advice_anew().for_each(|advice| _ = part.advise(advice));
            placement.slab_pages.remove_range(part.pages());
        }
        self.maps_file.store(false, Ordering::Relaxed);
        Ok(())
    }
}

/// What of a file is mapped: its data, and holes that are not worth two mappings.
fn pieces(file: &File, end: PageNo) -> Result<Vec<PageRange>, FlatError> {
    let mut data = Vec::new();
    let mut at = PageNo(0);
    while let Some(run) = next_data(file, at, end)? {
        data.push(run);
        at = run.end();
    }
    let mut gap = GAP_PAGES;
    loop {
        let mut pieces: Vec<PageRange> = Vec::new();
        for run in &data {
            match pieces.last_mut() {
                Some(last) if run.first() - last.end() <= gap => {
                    *last = PageRange::between(last.first(), run.end());
                }
                _ => pieces.push(*run),
            }
        }
        // With a gap as long as RAM there is one.
        if pieces.len() <= MAX_RUNS {
            return Ok(pieces);
        }
        gap *= 4;
    }
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::os::unix::fs::FileExt;

    use devices::reclaim::Reclaim;
    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::flat::Zeros;
    use crate::image::{ImageError, Slabs};
    use crate::ram::Backing;
    use crate::slab::{Draft, Slab};
    use crate::{Gpa, PAGE, PAGE_BYTES};

    const BYTES: u64 = 16 << 20;

    struct NoSlabs;

    impl Slabs for NoSlabs {
        fn draft(&mut self, _: u64) -> io::Result<Draft> {
            Err(io::ErrorKind::Unsupported.into())
        }

        fn filled(&mut self, _: &Slab) -> io::Result<u32> {
            Err(io::ErrorKind::Unsupported.into())
        }

        fn known(&mut self, _: u64, _: u64) -> io::Result<Option<(u32, u64)>> {
            Err(io::ErrorKind::Unsupported.into())
        }
    }

    fn ram() -> Ram {
        Ram::new(BYTES, Backing::Anonymous).unwrap()
    }

    fn put(ram: &Ram, page: u64, value: u8) {
        ram.memory().write_slice(&[value; PAGE], GuestAddress(page * PAGE_BYTES)).unwrap();
    }

    fn byte(ram: &Ram, page: u64) -> u8 {
        ram.memory().read_obj(GuestAddress(page * PAGE_BYTES + 7)).unwrap()
    }

    fn file() -> File {
        let file = tempfile::tempfile().unwrap();
        file.set_len(BYTES).unwrap();
        for page in (0..10).chain(20..30).chain(1000..1100) {
            file.write_all_at(&[1 + (page % 200) as u8; PAGE], page * PAGE_BYTES).unwrap();
        }
        file
    }

    #[test]
    fn it_holds_what_the_file_does_and_writes_stay_here() {
        let (file, one, two) = (file(), ram(), ram());
        // Ten zeros between are mapped, and the rest of the file is not.
        assert_eq!((one.map_flat(&file).unwrap(), two.map_flat(&file).unwrap()), (130, 130));
        assert!(one.maps_file());
        put(&one, 5, 99);
        assert_eq!([0, 5, 15, 25, 500, 1099].map(|page| byte(&one, page)), [1, 99, 0, 26, 0, 100]);
        assert_eq!([5, 1099].map(|page| byte(&two, page)), [6, 100]);
        let mut page = [0; PAGE];
        file.read_exact_at(&mut page, 5 * PAGE_BYTES).unwrap();
        assert_eq!(page, [6; PAGE]);
        // What is given back is zeros, and not the file's.
        one.discard(Gpa(3 * PAGE_BYTES)..Gpa(6 * PAGE_BYTES)).unwrap();
        assert_eq!([2, 3, 5, 6].map(|page| byte(&one, page)), [3, 0, 0, 7]);
        // It is saved whole, whether it was touched or not.
        let saved = tempfile::tempfile().unwrap();
        saved.set_len(BYTES).unwrap();
        assert_eq!(two.save_flat(&saved, &PageSet::all(BYTES / PAGE_BYTES), Zeros::Skip).unwrap(), 120);
        assert!(matches!(two.copy_ahead(&mut NoSlabs), Err(ImageError::File)));
    }

    #[test]
    fn what_has_left_the_file_does_not_change_with_it() {
        let (file, ram) = (file(), ram());
        ram.map_flat(&file).unwrap();
        put(&ram, 1001, 77);
        ram.leave_file().unwrap();
        assert!(!ram.maps_file() && ram.slab_pages().is_empty());
        file.write_all_at(&[255; PAGE], 0).unwrap();
        file.set_len(PAGE_BYTES).unwrap();
        assert_eq!([0, 25, 1000, 1001, 2000].map(|page| byte(&ram, page)), [1, 26, 1, 77, 0]);
        ram.leave_file().unwrap();
        let short = super::tests::ram();
        assert!(matches!(short.map_flat(&file), Err(FlatError::Length { .. })));
    }
}
