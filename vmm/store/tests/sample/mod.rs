//! Contents of checkpoints that follow from a seed, saved and read back.
#![allow(clippy::unwrap_used, reason = "what fails in a test is to be seen")]
#![allow(dead_code, reason = "each test uses a part of it")]

use std::path::Path;
use std::time::Duration;

use splitmix::SplitMix64;
use store::{Compression, Hook, Name, PAGE, Page, Saved, Store, StoreError};

/// How long one waits for the store, which is free.
pub const LIMIT: Duration = Duration::from_secs(10);

/// Pages of each slab; None is absent.
pub type Content = Vec<Vec<Option<Page>>>;

/// A page of its own: half of it does not compress.
pub fn page(number: u64) -> Page {
    let mut random = SplitMix64::new(number);
    let mut page = [number as u8 | 1; PAGE];
    page[..PAGE / 2].as_chunks_mut::<8>().0.iter_mut().for_each(|word| *word = random.draw().to_le_bytes());
    page
}

/// Slabs of so many pages: a quarter is absent, a quarter in common to all seeds, some twice.
pub fn content(seed: u64, slabs: &[u32]) -> Content {
    let mut random = SplitMix64::new(seed);
    let mut one = |n: u32| match random.below(8) {
        0 | 1 => None,
        2 | 3 => Some(page(u64::from(n % 50))),
        4 => Some(page(seed << 32)),
        _ => Some(page(seed << 32 | random.below(1 << 31))),
    };
    slabs.iter().map(|pages| (0..*pages).map(&mut one).collect()).collect()
}

/// The same, after a part of the pages was written.
pub fn later(content: &Content, seed: u64) -> Content {
    let mut random = SplitMix64::new(!seed);
    let mut content = content.clone();
    for page in content.iter_mut().flatten() {
        if random.below(10) == 0 {
            *page = Some(self::page(random.draw()));
        }
    }
    content
}

pub fn name(name: &str) -> Name {
    Name::new(name).unwrap()
}

pub fn open(path: &Path, hook: Option<std::sync::Arc<dyn Hook>>) -> Result<Store, StoreError> {
    Store::with_hook(&path.join("store"), hook)
}

/// Saves it, with its name and seed beside it.
pub fn save(store: &Store, called: &str, content: &Content) -> Result<Saved, StoreError> {
    let writing = store.write(LIMIT)?;
    let mut save = writing.save(&name(called), Compression::Lz4)?;
    for slab in content {
        save.slab(slab.len() as u32)?;
        for (n, page) in (0..).zip(slab) {
            page.as_ref().map_or(Ok(()), |page| save.page(n, page))?;
        }
    }
    Ok(save.commit(called.into(), format!("state of {called}").into())?.0)
}

/// What is there of it.
pub fn load(store: &Store, called: &str) -> Result<Content, StoreError> {
    let reading = store.read(LIMIT)?;
    let checkpoint = reading.load(&name(called))?;
    assert_eq!(checkpoint.state, format!("state of {called}").into_bytes());
    assert_eq!(reading.meta(&name(called))?, called.as_bytes());
    let mut pages = reading.pages();
    let mut content = Content::new();
    for slab in &checkpoint.slabs {
        let mut found = vec![None; slab.pages as usize];
        for run in &slab.runs {
            let mut read = vec![[0; PAGE]; run.pages as usize];
            pages.read(run.place, &mut read)?;
            for (at, page) in (run.page as usize..).zip(read) {
                found[at] = Some(page);
            }
        }
        content.push(found);
    }
    Ok(content)
}

/// The names of the checkpoints.
pub fn names(store: &Store) -> Vec<String> {
    store.read(LIMIT).unwrap().names().unwrap().iter().map(|name| name.as_str().to_owned()).collect()
}

/// The names of all files, with their directory.
pub fn files(path: &Path) -> Vec<String> {
    let mut found = Vec::new();
    for dir in ["packs", "checkpoints"] {
        for entry in std::fs::read_dir(path.join("store").join(dir)).unwrap() {
            found.push(format!("{dir}/{}", entry.unwrap().file_name().to_str().unwrap()));
        }
    }
    found.sort();
    found
}

/// Whether it is verified, and how many files are damaged else.
pub fn damage(store: &Store) -> Vec<store::Damage> {
    store.read(LIMIT).unwrap().verify(&mut |_, _| true).unwrap().damage
}
