use std::os::fd::AsRawFd;

use super::*;

fn sealed(pages: u64) -> Slab {
    let draft = Draft::new(pages).unwrap();
    for page in 0..pages as u32 {
        draft.write(SlabPage(page), &[page as u8 + 1; PAGE]).unwrap();
    }
    draft.seal().unwrap()
}

fn memfd(flags: MemfdFlags, bytes: u64, seals: SealFlags) -> OwnedFd {
    let file = rustix::fs::memfd_create("test", flags | MemfdFlags::CLOEXEC).unwrap();
    rustix::fs::ftruncate(&file, bytes).unwrap();
    if !seals.is_empty() {
        rustix::fs::fcntl_add_seals(&file, seals).unwrap();
    }
    file
}

#[test]
fn what_was_written_is_there_and_stays() {
    let slab = sealed(3);
    assert_eq!((slab.pages(), slab.resident_bytes().unwrap()), (3, 3 * PAGE_BYTES));
    assert_eq!(slab.bytes(SlabPage(1), 1).unwrap(), [2; PAGE]);
    assert_eq!(slab.bytes(SlabPage(0), 3).unwrap().len(), 3 * PAGE);
    assert!(slab.bytes(SlabPage(1), 3).is_none() && slab.bytes(SlabPage(u32::MAX), 2).is_none());
    assert!(slab.file.write_at(&[9], 0).is_err(), "written to");
    assert!(slab.file.set_len(PAGE_BYTES).is_err() && slab.file.set_len(4 * PAGE_BYTES).is_err(), "resized");
    assert_eq!(slab.bytes(SlabPage(0), 1).unwrap(), [1; PAGE]);
}

#[test]
fn it_travels() {
    let slab = sealed(2);
    let received = Slab::receive(slab.file.try_clone().unwrap().into(), 2).unwrap();
    drop(slab);
    assert_eq!(received.bytes(SlabPage(0), 2).unwrap()[PAGE..], [2; PAGE]);
}

#[test]
fn others_may_run_between_the_parts_in_which_memory_is_reserved() {
    for pages in [1, 256, 257, 600] {
        let mut parts = 0;
        let draft = Draft::reserved(pages, &mut || parts += 1).unwrap();
        assert_eq!(parts, pages.div_ceil(RESERVE_PAGES as u64), "{pages} pages");
        let slab = draft.seal().unwrap();
        assert_eq!((slab.pages(), slab.resident_bytes().unwrap()), (pages, pages * PAGE_BYTES));
    }
}

#[test]
fn writing_beyond_the_end_is_refused() {
    let draft = Draft::new(2).unwrap();
    for (page, bytes) in [(2, PAGE), (1, 2 * PAGE), (0, PAGE - 1), (u32::MAX, PAGE)] {
        assert!(draft.write(SlabPage(page), &vec![1; bytes]).is_err(), "{page} {bytes}");
    }
    assert!(matches!(Draft::new(0), Err(SlabError::Size { .. })));
    assert!(matches!(Draft::new(MAX_SLAB_PAGES + 1), Err(SlabError::Size { .. })));
}

#[test]
fn a_draft_that_is_mapped_for_writing_cannot_be_sealed() {
    let draft = Draft::new(1).unwrap();
    // SAFETY: a new mapping, which is not used.
    let mapped = unsafe {
        rustix::mm::mmap(std::ptr::null_mut(), PAGE, ProtFlags::WRITE, MapFlags::SHARED, &draft.file, 0)
            .unwrap()
    };
    assert!(matches!(draft.seal(), Err(SlabError::Kernel { what: "seal", .. })));
    // SAFETY: it is not used.
    unsafe { rustix::mm::munmap(mapped, PAGE).unwrap() };
}

/// What a process that lies may send.
#[test]
fn what_is_no_slab_is_refused() {
    let sealing = MemfdFlags::ALLOW_SEALING | MemfdFlags::NOEXEC_SEAL;
    let refused = |file: OwnedFd, pages| Slab::receive(file, pages).unwrap_err();
    for missing in [SealFlags::WRITE, SealFlags::GROW, SealFlags::SHRINK, SealFlags::SEAL] {
        let file = memfd(sealing, PAGE_BYTES, SEALS.difference(missing));
        assert!(matches!(refused(file, 1), SlabError::NotSealed { .. }), "without {missing:?}");
    }
    let future = SEALS.difference(SealFlags::WRITE).union(SealFlags::FUTURE_WRITE);
    assert!(matches!(refused(memfd(sealing, PAGE_BYTES, future), 1), SlabError::NotSealed { .. }));
    let executable = memfd(MemfdFlags::ALLOW_SEALING, PAGE_BYTES, SEALS.difference(SealFlags::EXEC));
    assert!(matches!(refused(executable, 1), SlabError::NotSealed { .. }));
    for (bytes, pages) in [(PAGE_BYTES, 2), (2 * PAGE_BYTES, 1), (PAGE_BYTES - 1, 1)] {
        assert!(matches!(refused(memfd(sealing, bytes, SEALS), pages), SlabError::WrongSize { .. }));
    }
    for pages in [0, u64::MAX, MAX_SLAB_PAGES + 1] {
        assert!(matches!(refused(memfd(sealing, PAGE_BYTES, SEALS), pages), SlabError::Size { .. }));
    }
    let plain = File::open("/proc/self/exe").unwrap();
    assert!(matches!(refused(plain.into(), 1), SlabError::NotSealed { seals: 0 }));
    let (reader, _writer) = io::pipe().unwrap();
    assert!(matches!(refused(reader.into(), 1), SlabError::NotSealed { seals: 0 }));
}

#[test]
fn huge_pages_are_refused() {
    let huge = MemfdFlags::HUGETLB | MemfdFlags::ALLOW_SEALING | MemfdFlags::NOEXEC_SEAL;
    let file = memfd(huge, 2 << 20, SEALS);
    assert!(matches!(Slab::receive(file, 512), Err(SlabError::NotOrdinary)));
}

#[test]
fn its_descriptor_is_not_inherited() {
    let slab = sealed(1);
    let flags = rustix::io::fcntl_getfd(&slab.file).unwrap();
    assert!(flags.contains(rustix::io::FdFlags::CLOEXEC), "{}", slab.as_fd().as_raw_fd());
}
