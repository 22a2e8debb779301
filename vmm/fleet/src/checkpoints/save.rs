//! Saves an image: of each slab those pages that the guest's memory has.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use machine::image_runs;
use memory::PAGE;
use store::{Compression, Name, Page};

use super::load::check_size;
use super::origin::{Origin, Spans};
use super::shelf::STORE_LIMIT;
use super::{CheckpointError, CheckpointInfo, Description, Shelf};
use crate::images::Image;

/// Pages that are read at a time.
const READ_PAGES: usize = 64;
/// The most that a state may have: as in the process that reads it.
const MAX_STATE_BYTES: u64 = 16 << 20;

/// Saves `image` as `name`. `tell` gets how many pages of how many were looked at; false interrupts, and then nothing was saved.
pub fn save(
    image: &Image,
    name: &Name,
    shelf: &Shelf,
    (compression, suspended): (Compression, Option<String>),
    tell: &mut dyn FnMut(u64, u64) -> bool,
) -> Result<CheckpointInfo, CheckpointError> {
    let called = name.as_str();
    let memory =
        |what| move |source: io::Error| CheckpointError::Memory { name: called.into(), what, source };
    if image.has_disks() {
        return Err(CheckpointError::Overlays { name: called.into() });
    }
    let state = read_state(image).map_err(memory("read"))?;
    let (runs, slabs) = image_runs(&state).map_err(|error| memory("read")(io::Error::other(error)))?;
    // What could not be read back is not saved.
    check_size(&runs, &slabs, image.spec.vm.memory_bytes)
        .map_err(|why| CheckpointError::Unfit { name: called.into(), why })?;
    let used = Spans::of_slabs(&runs, image.slabs().len());
    let description = Description::of(called, image, suspended)?;
    let domain = &image.spec.domain;
    let (store, path) = (shelf.open(domain)?, shelf.path_of(domain));
    let writing = store.write(STORE_LIMIT)?;
    let mut save = writing.save(name, compression)?;
    let (mut done, total) = (0, used.iter().map(Spans::pages).sum());
    let mut buffer = vec![[0; PAGE]; READ_PAGES];
    for (slab, used) in image.slabs().iter().zip(&used) {
        save.slab(u32::try_from(slab.pages).unwrap_or(u32::MAX))?;
        let known = slab.origin().and_then(|origin| origin.runs(&path, used));
        if known.is_some_and(|runs| save.refer(&runs).unwrap_or(false)) {
            done += used.pages();
            continue;
        }
        for (first, end) in used.iter() {
            for at in (first..end).step_by(READ_PAGES) {
                if !tell(done, total) {
                    return Err(store::StoreError::Interrupted.into());
                }
                let pages = READ_PAGES.min((end - at) as usize);
                read_pages(&slab.file, at, &mut buffer[..pages]).map_err(memory("read"))?;
                for (number, page) in (at..).zip(&buffer[..pages]) {
                    save.page(number, page)?;
                }
                done += pages as u64;
            }
        }
    }
    let mut info = CheckpointInfo::of(called, &description);
    let (saved, maps) = save.commit(description.encode(called)?, state)?;
    // The next image that has one of these slabs refers to where its pages lie now.
    for ((slab, used), map) in image.slabs().iter().zip(used).zip(maps) {
        slab.set_origin(Arc::new(Origin::new(&path, map, used)));
    }
    tell(total, total);
    info.saved = Some(saved);
    Ok(info)
}

fn read_state(image: &Image) -> io::Result<Vec<u8>> {
    let file = File::from(image.state().try_clone()?);
    let bytes = file.metadata()?.len();
    if bytes > MAX_STATE_BYTES {
        return Err(io::Error::other(format!(
            "its state has {bytes} bytes: expected at most {MAX_STATE_BYTES}"
        )));
    }
    let mut state = vec![0; usize::try_from(bytes).map_err(io::Error::other)?];
    file.read_exact_at(&mut state, 0)?;
    Ok(state)
}

fn read_pages(file: &File, first: u32, pages: &mut [Page]) -> io::Result<()> {
    file.read_exact_at(pages.as_flattened_mut(), u64::from(first) * PAGE as u64)
}
