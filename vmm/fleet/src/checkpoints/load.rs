//! Reads a checkpoint back: into slabs, of which those are shared that are there already.

use std::io;
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::Arc;

use machine::{handover, image_runs};
use memory::image::{ImageRun, SLAB_PAGES};
use memory::slab::{Draft, SlabError};
use memory::{PAGE, PAGE_BYTES, SlabPage};
use store::{Name, PageReader, SlabMap};

use super::origin::{Origin, Spans};
use super::shelf::STORE_LIMIT;
use super::{CheckpointError, Description, Shelf};
use crate::images::{Image, ImageSlab};

/// Pages that are written at a time.
const WRITE_PAGES: usize = 64;
/// An image has whole slabs, of which its memory may have a part: this many times its memory, at most.
const SLABS_PER_MEMORY: u64 = 8;

/// The image that the checkpoint `name` of `domain` is of. Slabs that images in `near` have are theirs. `tell` gets how many pages of how many
/// were read; false interrupts.
pub fn load(
    shelf: &Shelf,
    domain: &str,
    name: &Name,
    near: &[Arc<Image>],
    tell: &mut dyn FnMut(u64, u64) -> bool,
) -> Result<Image, CheckpointError> {
    let called = name.as_str();
    let unfit = |why: String| CheckpointError::Unfit { name: called.into(), why };
    let memory =
        |what| move |source: io::Error| CheckpointError::Memory { name: called.into(), what, source };
    let Some(store) = shelf.store(domain)? else {
        return Err(CheckpointError::Missing { name: called.into(), known: "none".into() });
    };
    let reading = store.read(STORE_LIMIT)?;
    let checkpoint = reading.load(name)?;
    let description = Description::parse(called, &checkpoint.meta)?;
    let spec = description.guest(called)?;
    if spec.domain != domain {
        return Err(unfit(format!("it is of domain {}, and lies in the store of {domain}", spec.domain)));
    }
    let (runs, slabs) = image_runs(&checkpoint.state).map_err(|error| unfit(os::one_line(&error)))?;
    if !checkpoint.slabs.iter().map(|slab| slab.pages).eq(slabs.iter().copied()) {
        return Err(unfit("its state speaks of other slabs than it has".into()));
    }
    check_size(&runs, &slabs, spec.vm.memory_bytes).map_err(unfit)?;
    let (mut reader, path) = (reading.pages(), shelf.path_of(domain));
    let used = Spans::of_slabs(&runs, slabs.len());
    let pages = |slab: &SlabMap| slab.runs.iter().map(|run| u64::from(run.pages)).sum::<u64>();
    let (mut done, total) = (0, checkpoint.slabs.iter().map(pages).sum());
    let mut made: Vec<ImageSlab> = Vec::with_capacity(slabs.len());
    for (map, used) in checkpoint.slabs.iter().zip(used) {
        let known = find(near, &path, map, &used).or_else(|| find_in(&made, &path, map, &used));
        let slab = match known {
            Some(slab) => slab,
            None => {
                let mut tell = |now| tell(done + now, total);
                let slab = fill(&mut reader, map, &mut tell).map_err(|error| match error {
                    FillError::Checkpoint(error) => error,
                    FillError::Slab(error) => memory("made")(io::Error::other(error)),
                    FillError::Io(error) => memory("made")(error),
                })?;
                slab.set_origin(Arc::new(Origin::new(&path, map.clone(), used)));
                slab
            }
        };
        done += pages(map);
        made.push(slab);
    }
    let state = handover::sealed("samepage-state", &checkpoint.state).map_err(memory("made"))?;
    tell(total, total);
    let said = (description.ready(), description.fill());
    Ok(Image::from_disk(spec, said, description.captured, state, made))
}

/// What would be made here is no more than a guest of this size can have.
pub(super) fn check_size(runs: &[ImageRun], slabs: &[u32], memory_bytes: u64) -> Result<(), String> {
    let pages: u64 = slabs.iter().map(|pages| u64::from(*pages)).sum();
    let most = (memory_bytes / PAGE_BYTES + SLAB_PAGES) * SLABS_PER_MEMORY;
    if pages > most || slabs.iter().any(|pages| u64::from(*pages) > SLAB_PAGES) {
        return Err(format!(
            "its slabs have {pages} pages: expected at most {most} for its memory, and {SLAB_PAGES} in each"
        ));
    }
    let is_inside = |run: &ImageRun| {
        let slab = slabs.get(run.slab as usize);
        let end = u64::from(run.slab_page.0).checked_add(run.pages);
        slab.zip(end).is_some_and(|(pages, end)| end <= u64::from(*pages))
    };
    match runs.iter().all(is_inside) {
        true => Ok(()),
        false => Err("its memory has pages that are in none of its slabs".into()),
    }
}

fn find(near: &[Arc<Image>], store: &Path, map: &SlabMap, used: &Spans) -> Option<ImageSlab> {
    near.iter().find_map(|image| find_in(image.slabs(), store, map, used))
}

/// The slab that has what `map` says, if there is one.
fn find_in(slabs: &[ImageSlab], store: &Path, map: &SlabMap, used: &Spans) -> Option<ImageSlab> {
    let is_it = |slab: &&ImageSlab| slab.origin().is_some_and(|origin| origin.is(store, map, used));
    slabs.iter().find(is_it).cloned()
}

enum FillError {
    Checkpoint(CheckpointError),
    Slab(SlabError),
    Io(io::Error),
}

impl From<SlabError> for FillError {
    fn from(error: SlabError) -> Self {
        Self::Slab(error)
    }
}

impl From<store::StoreError> for FillError {
    fn from(error: store::StoreError) -> Self {
        Self::Checkpoint(error.into())
    }
}

/// A sealed slab with the pages of `map`, and zeros else.
fn fill(
    reader: &mut PageReader<'_>,
    map: &SlabMap,
    tell: &mut dyn FnMut(u64) -> bool,
) -> Result<ImageSlab, FillError> {
    let draft = Draft::new(map.pages.into())?;
    let mut buffer = vec![[0; PAGE]; WRITE_PAGES];
    let mut done = 0;
    for run in &map.runs {
        for at in (0..run.pages).step_by(WRITE_PAGES) {
            if !tell(done) {
                return Err(store::StoreError::Interrupted.into());
            }
            let pages = &mut buffer[..WRITE_PAGES.min((run.pages - at) as usize)];
            reader.read(store::Place { page: run.place.page + at, ..run.place }, pages)?;
            draft.write(SlabPage(run.page + at), pages.as_flattened())?;
            done += pages.len() as u64;
        }
    }
    let file = draft.as_fd().try_clone_to_owned().map_err(FillError::Io)?;
    // It is looked at for its number, and mapped no longer than that.
    let inode = draft.seal()?.inode();
    Ok(ImageSlab::new(Arc::new(file.into()), map.pages.into(), inode))
}
