use std::fs;
use std::path::PathBuf;
use std::sync::Arc;

use tempfile::TempDir;

use super::*;
use crate::PAGE;
use crate::content::Content;
use crate::scan::{Options, scan};
use crate::source::file::FileSource;

const LOW: u64 = 3 << 30;
/// Frames from 4 GiB on.
const HIGH: u64 = (4 << 30) / PAGE_BYTES;

// Entries of /proc/kpageflags.
const FREE: u64 = 1 << 10;
const SLAB: u64 = 1 << 7;
const ANON: u64 = 1 << 5 | 1 << 12;
const CACHE: u64 = 1 << 3 | 1 << 5;
const RESERVED: u64 = 1 << 32;
const HOLE: u64 = 1 << 20;

fn flag_file(dir: &TempDir, flags: &[u64]) -> PathBuf {
    let path = dir.path().join("kpageflags");
    fs::write(&path, flags.iter().flat_map(|flags| flags.to_le_bytes()).collect::<Vec<_>>()).unwrap();
    path
}

fn image(dir: &TempDir, name: &str, contents: &[u32]) -> PathBuf {
    let path = dir.path().join(name);
    let pages: Vec<_> = contents.iter().map(|content| content.to_le_bytes().repeat(PAGE / 4)).collect();
    fs::write(&path, pages.concat()).unwrap();
    path
}

fn counts([pages, zero, self_duplicates, cross_duplicates, distinct]: [u64; 5]) -> TypeCounts {
    TypeCounts { pages, zero, self_duplicates, cross_duplicates, distinct, shared_now: 0 }
}

#[test]
fn every_page_is_counted_with_its_type() {
    let dir = tempfile::tempdir().unwrap();
    let flags = [FREE, FREE, SLAB, ANON, ANON, ANON, CACHE, CACHE, RESERVED, HOLE].repeat(10);
    let ram = pc_ram("it", &[100 * PAGE_BYTES], LOW).unwrap();
    let error = PageTypes::of_flags(&flag_file(&dir, &flags), &ram, LOW).unwrap_err();
    // A tenth of holes is too much.
    assert!(matches!(error, PageTypesError::Holes { holes: 10, pages: 100, .. }), "{error}");
    let flags = [FREE, FREE, SLAB, ANON, ANON, ANON, CACHE, CACHE, RESERVED, RESERVED].repeat(10);
    let types = Arc::new(PageTypes::of_flags(&flag_file(&dir, &flags), &ram, LOW).unwrap());
    // Each ten pages: zeros that are free, one content of the first guest's that all slab pages
    // have, what is in both guests, what is the second one's own, and so on.
    let first: Vec<u32> = (0..10).flat_map(|n| [0, 500 + n, 1, 2, 600 + n, 0, 3, 3, 700 + n, 0]).collect();
    let second: Vec<u32> = (0..10).flat_map(|n| [0, 500 + n, 9, 2, 800 + n, 0, 3, 9, 700 + n, 0]).collect();
    let open = |name: &str, contents: &[u32]| {
        FileSource::open(&image(&dir, name, contents), name.into())
            .unwrap()
            .with_page_types(Some(types.clone()))
    };
    let (a, b) = (open("a", &first), open("b", &second));
    let without = FileSource::open(&image(&dir, "c", &first), "c".into()).unwrap();
    for threads in [1, 3] {
        let options = Options { threads, index_limit_bytes: 1 << 30, ..Options::default() };
        let scan = scan(&[&a, &b, &without], &options, &mut |_, _| true).unwrap();
        let by_type = scan.by_type.as_ref().unwrap();
        let of = |guest: usize, kind: PageType| by_type[guest][kind.code()];
        assert_eq!(of(0, PageType::Free), counts([20, 10, 0, 0, 10]));
        assert_eq!(of(0, PageType::Slab), counts([10, 0, 9, 0, 1]));
        assert_eq!(of(0, PageType::Anonymous), counts([30, 10, 9, 0, 11]));
        assert_eq!(of(0, PageType::PageCache), counts([20, 0, 19, 0, 1]));
        assert_eq!(of(0, PageType::Kernel), counts([20, 10, 0, 0, 10]));
        assert_eq!(of(1, PageType::Free), counts([20, 10, 0, 10, 0]));
        assert_eq!(of(1, PageType::Slab), counts([10, 0, 9, 0, 1]));
        assert_eq!(of(1, PageType::Anonymous), counts([30, 10, 9, 1, 10]));
        assert_eq!(of(1, PageType::PageCache), counts([20, 0, 19, 1, 0]));
        assert_eq!(of(1, PageType::Kernel), counts([20, 10, 0, 10, 0]));
        assert_eq!(by_type[2], [TypeCounts::default(); TYPES], "nothing is known of it");
        // All of the first two together are all that there is of them.
        let mut all = TypeCounts::default();
        by_type.iter().flatten().for_each(|counts| all.add(counts));
        let (found, third) = (Content::of(&scan), 100);
        assert_eq!((all.pages, all.present()), (200, found.present() - third));
        assert_eq!(all.distinct, found.distinct);
    }
}

#[test]
fn several_passes_do_not_count_types() {
    let dir = tempfile::tempdir().unwrap();
    let contents: Vec<u32> = (1..=20_000).collect();
    let ram = pc_ram("it", &[20_000 * PAGE_BYTES], LOW).unwrap();
    let types = PageTypes::of_flags(&flag_file(&dir, &vec![ANON; 20_000]), &ram, LOW).unwrap();
    let file = FileSource::open(&image(&dir, "a", &contents), "a".into()).unwrap();
    let file = file.with_page_types(Some(Arc::new(types)));
    let options = Options { threads: 1, index_limit_bytes: 300_000, ..Options::default() };
    let scan = scan(&[&file], &options, &mut |_, _| true).unwrap();
    assert!(scan.passes > 1 && scan.by_type.is_none(), "{} passes", scan.passes);
}

#[test]
fn ram_is_below_and_above_the_hole() {
    let ram = |stretches: &[u64], low| pc_ram("it", stretches, low);
    let gib = (1 << 30) / PAGE_BYTES;
    assert_eq!(ram(&[1 << 30], LOW).unwrap(), [Ram { first: 0, pages: gib }]);
    let split = [Ram { first: 0, pages: 3 * gib }, Ram { first: HIGH, pages: gib }];
    assert_eq!(ram(&[4 << 30], LOW).unwrap(), split);
    assert_eq!(ram(&[3 << 30, 1 << 30], LOW).unwrap(), split);
    // Later mappings tend to lie below earlier ones.
    assert_eq!(ram(&[1 << 30, 3 << 30], LOW).unwrap(), [split[1], split[0]]);
    assert_eq!(
        ram(&[2 << 30, 1 << 30], 2 << 30).unwrap(),
        [Ram { first: 0, pages: 2 * gib }, Ram { first: HIGH, pages: gib }]
    );
    let error = ram(&[1 << 30, 1 << 30], LOW).unwrap_err().to_string();
    assert!(error.contains("--low-memory") && error.contains("3072 MiB"), "{error}");
}

#[test]
fn a_map_that_does_not_fit_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let low = 64 * PAGE_BYTES;
    let ram = pc_ram("it", &[96 * PAGE_BYTES], low).unwrap();
    let of = |flags: &[u64]| PageTypes::of_flags(&flag_file(&dir, flags), &ram, low);
    let good = |used: u64| {
        let mut flags = vec![HOLE; (HIGH + 40) as usize];
        flags[..64].fill(ANON);
        // Reserved frames may be anywhere.
        flags[64..80].fill(RESERVED);
        flags[HIGH as usize..].fill(CACHE);
        flags[HIGH as usize + 32..].fill(used);
        flags
    };
    let types = of(&good(RESERVED)).unwrap();
    let pages = types.pages();
    assert_eq!((pages[PageType::Anonymous.code()], pages[PageType::PageCache.code()]), (64, 32));
    assert_eq!((types.of(63), types.of(64)), (PageType::Anonymous, PageType::PageCache));
    let short = of(&good(RESERVED)[..HIGH as usize + 31]).unwrap_err();
    assert!(matches!(short, PageTypesError::Short { end, .. } if end == HIGH + 32), "{short}");
    let outside = of(&good(SLAB)).unwrap_err();
    assert!(matches!(outside, PageTypesError::Outside { frame, .. } if frame == HIGH + 32), "{outside}");
    assert!(
        outside.to_string().contains("slab") && outside.to_string().contains("--low-memory"),
        "{outside}"
    );
    let odd = dir.path().join("odd");
    fs::write(&odd, [0; 12]).unwrap();
    assert!(matches!(PageTypes::of_flags(&odd, &ram, low), Err(PageTypesError::Unaligned { bytes: 12, .. })));
    let gone = PageTypes::of_flags(&dir.path().join("gone"), &ram, low);
    assert!(matches!(gone, Err(PageTypesError::Read { .. })));
}

#[test]
fn what_an_agent_tells_is_put_where_its_frames_are() {
    let ram = [Ram { first: 0, pages: 8 }, Ram { first: HIGH, pages: 4 }];
    let types = PageTypes::of_runs("vm", &format!("k2f4s3h{}at", HIGH - 9), &ram).unwrap();
    let letters: String = (0..12).map(|page| types.of(page).letter()).collect();
    assert_eq!(letters, "kkffffssathh", "frames that are not reported are holes");
    assert!(PageTypes::of_runs("vm", "k2?", &ram).is_err());
    // A guest may say anything.
    let types = PageTypes::of_runs("vm", &"f4294967295".repeat(50), &ram).unwrap();
    assert_eq!(types.pages()[PageType::Free.code()], 12);
}

#[test]
fn what_is_shared_now_is_counted_by_type() {
    use vm_memory::{Bytes, GuestAddress};

    use memory::ram::{Backing, Ram as GuestRam};
    let ram = GuestRam::new(4096 * PAGE_BYTES, Backing::Anonymous).unwrap();
    ram.set_huge_pages(false).unwrap();
    for page in 0..40u64 {
        let at = GuestAddress(page * PAGE_BYTES);
        // Every other page is on the zero frame, which is shared.
        match page % 2 {
            0 => assert_eq!(ram.memory().read_obj::<u64>(at).unwrap(), 0),
            _ => ram.memory().write_obj(page, at).unwrap(),
        }
    }
    let space = Space { name: "us".into(), pid: std::process::id(), extents: ram.extents() };
    let types = PageTypes::of_runs("us", "s10a4086", &[Ram { first: 0, pages: 4096 }]).unwrap();
    let shared = types.shared(&space).unwrap();
    assert_eq!((shared[PageType::Slab.code()], shared[PageType::Anonymous.code()]), (5, 15));
    assert_eq!(shared.iter().sum::<u64>(), 20);
}
