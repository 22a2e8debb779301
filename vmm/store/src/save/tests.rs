use super::*;
use crate::store::Store;
use std::time::Duration;

/// Pages whose digests are equal are told apart by their bytes.
#[test]
fn equal_digests_are_not_equal_pages() {
    let dir = tempfile::tempdir().unwrap();
    let mut store = Store::open(&dir.path().join("s")).unwrap();
    // Two different digests in all.
    store.key.page_bits = 1;
    let page = |n: u32| {
        let mut page = [7; PAGE];
        page[..4].copy_from_slice(&n.to_le_bytes());
        page
    };
    let name = |n: u32| Name::new(&format!("c{n}")).unwrap();
    let writing = store.write(Duration::from_secs(1)).unwrap();
    for n in 0..3 {
        let mut save = writing.save(&name(n), Compression::Lz4).unwrap();
        save.slab(200).unwrap();
        (0..200).for_each(|at| save.page(at, &page(at / 2 + n)).unwrap());
        save.commit(Vec::new(), Vec::new()).unwrap();
    }
    for n in 0..3 {
        let mut reader = writing.pages();
        for run in &writing.load(&name(n)).unwrap().slabs[0].runs {
            let mut found = vec![[0; PAGE]; run.pages as usize];
            reader.read(run.place, &mut found).unwrap();
            (run.page..).zip(found).for_each(|(at, found)| assert!(found == page(at / 2 + n), "{n} {at}"));
        }
    }
}
