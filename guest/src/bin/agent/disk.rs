//! The first disk of a Linux guest, read through its kernel's page cache.

use core::ffi::CStr;

use guest::content::{PAGE_SIZE, Page, PageKey, check_page};
use guest::protocol::{Class, Disk, DiskDone, Done, ErrorCode, Reply, Text};

use crate::sys::{self, Access, EIO, ENOENT, Errno, Fd};

const PATH: &CStr = c"/dev/vda";

/// Pages of one read: what Linux reads ahead is twice as much.
const BUFFER_PAGES: usize = 16;

/// The disk. It is open from the first read on: what the page cache has of a disk goes when the
/// last one closes it.
pub(crate) struct Cached {
    file: Option<Fd>,
    buffer: Option<&'static mut [Page]>,
}

impl Cached {
    /// A disk not opened yet; it may not exist.
    pub(crate) const NEW: Self = Self { file: None, buffer: None };

    /// Carries out a command before it returns.
    pub(crate) fn obey(&mut self, action: Disk) -> Reply {
        let done = match action {
            Disk::Read { first, pages, seed } => self.read(first, pages, seed),
            Disk::Drop => {
                if let Some(file) = self.file.take() {
                    file.close();
                }
                Ok(DiskDone::Drop)
            }
        };
        match done {
            Ok(done) => Reply::Ok(Done::Disk(done)),
            Err(ENOENT) => Reply::Err {
                code: ErrorCode::Unsupported,
                message: Text::of(format_args!("this guest has no disk: {PATH:?} is not there")),
            },
            Err(EIO) if self.file.is_some() => Reply::Err {
                code: ErrorCode::Failed,
                message: Text::of(format_args!("{PATH:?} ends before that, or cannot be read there: {EIO}")),
            },
            Err(error) => {
                Reply::Err { code: ErrorCode::Failed, message: Text::of(format_args!("{PATH:?}: {error}")) }
            }
        }
    }

    fn read(&mut self, first: u64, pages: u64, seed: Option<u64>) -> Result<DiskDone, Errno> {
        let file = match self.file {
            Some(file) => file,
            None => *self.file.insert(Fd::open(PATH, Access::Read)?),
        };
        let buffer = match &mut self.buffer {
            Some(buffer) => buffer,
            empty => empty.insert(sys::map(BUFFER_PAGES)?),
        };
        let result = read_checked(file, buffer, first, pages, seed);
        // Leave no copy of the data outside the page cache: not in a page given back by this
        // process either.
        buffer.iter_mut().for_each(|page| page.fill(0));
        sys::discard(buffer);
        result
    }
}

fn read_checked(
    file: Fd,
    buffer: &mut [Page],
    first: u64,
    pages: u64,
    seed: Option<u64>,
) -> Result<DiskDone, Errno> {
    let (mut done, mut wrong, mut ns) = (0, 0, 0);
    while done < pages {
        let count = (pages - done).min(BUFFER_PAGES as u64);
        let number = first.checked_add(done).ok_or(EIO)?;
        let offset = number.checked_mul(PAGE_SIZE as u64).ok_or(EIO)?;
        let part = &mut buffer[..count as usize];
        let began = sys::now_nanos();
        file.read_pages_at(part, offset)?;
        ns += sys::now_nanos().saturating_sub(began);
        if let Some(seed) = seed {
            let is_wrong = |(n, page): &(u64, &Page)| {
                let key =
                    PageKey { seed, class: Class::Unique, index: number.wrapping_add(*n), generation: 0 };
                !check_page(page, key)
            };
            wrong += (0..).zip(part.iter()).filter(is_wrong).count() as u64;
        }
        done += count;
    }
    Ok(DiskDone::Read { pages, wrong, ns })
}
