//! Memory in a file: a raw image, or an ELF core.

use std::fs::{File, Metadata};
use std::io::ErrorKind;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::core::{Core, Part};
use super::{EachPage, PageReader, Source, Unread, hand_on};
pub use crate::error::ImageError;
use crate::page_types::PageTypes;
use crate::{MeasureError, PAGE};
use image::format::{Class, Format};
use memory::PAGE_BYTES;
use memory::page_buffer::PageBuffer;
use os::named_file;

/// Pages read in one call: 256 KiB stay in the second-level cache from the read to the hash.
const BATCH_PAGES: usize = 64;

/// Memory in a file.
#[derive(Debug)]
pub struct FileSource {
    name: String,
    path: PathBuf,
    file: File,
    bytes: u64,
    modified: (i64, i64),
    /// Where its memory is.
    parts: Vec<Part>,
    notes: Vec<String>,
    page_types: Option<Arc<PageTypes>>,
}

impl FileSource {
    /// Opens the image or core at `path`, called `name` in reports.
    ///
    /// # Errors
    /// It is neither, or may not be read.
    pub fn open(path: &Path, name: String) -> Result<Self, ImageError> {
        let path = path.to_owned();
        let (file, meta) = match named_file::any(&path) {
            Ok(opened) => opened,
            Err(source) => return Err(ImageError::Open { path, source }),
        };
        let bytes = meta.len();
        match bytes {
            _ if !meta.is_file() => return Err(ImageError::Kind { path }),
            0 => return Err(ImageError::Empty { path }),
            _ => {}
        }
        let format = match Format::of_file(&file) {
            Ok(format) => format,
            Err(source) => return Err(ImageError::Read { path, at: 0, source }),
        };
        let Core { parts, notes } = match format {
            Some(Format { class: Class::Core, .. }) => Core::open(&path, &file, bytes)?,
            Some(format) => return Err(ImageError::Format { path, format }),
            None if bytes < PAGE_BYTES => return Err(ImageError::LessThanAPage { path, bytes }),
            None if !bytes.is_multiple_of(PAGE_BYTES) => return Err(ImageError::Unaligned { path, bytes }),
            None => Core { parts: vec![Part { at: 0, pages: bytes / PAGE_BYTES }], notes: Vec::new() },
        };
        let modified = modified(&meta);
        Ok(Self { name, path, file, bytes, modified, parts, notes, page_types: None })
    }

    /// The same, with what its pages are used for, if that is known.
    pub fn with_page_types(self, page_types: Option<Arc<PageTypes>>) -> Self {
        Self { page_types, ..self }
    }

    /// Notes on it for readers of the numbers.
    pub fn notes(&self) -> impl Iterator<Item = String> {
        self.notes.iter().map(|note| format!("{}: {note}", self.name))
    }

    /// Whether the file was written since it was opened.
    pub fn was_written(&self) -> bool {
        self.file.metadata().is_ok_and(|meta| meta.len() != self.bytes || modified(&meta) != self.modified)
    }

    /// Where page number `page` is.
    fn place(&self, page: u64) -> u64 {
        let mut before = 0;
        for Part { at, pages } in &self.parts {
            if page < before + pages {
                return at + (page - before) * PAGE_BYTES;
            }
            before += pages;
        }
        // Outside every part: nothing can be read there.
        self.bytes
    }
}

fn modified(meta: &Metadata) -> (i64, i64) {
    (meta.mtime(), meta.mtime_nsec())
}

impl Source for FileSource {
    fn name(&self) -> &str {
        &self.name
    }

    fn extents(&self) -> Vec<u64> {
        self.parts.iter().map(|part| part.pages).collect()
    }

    fn is_live(&self) -> bool {
        false
    }

    fn page_types(&self) -> Option<&PageTypes> {
        self.page_types.as_deref()
    }

    fn open(&self) -> Result<Box<dyn PageReader + '_>, MeasureError> {
        Ok(Box::new(Reader { image: self, buffer: PageBuffer::new(BATCH_PAGES) }))
    }
}

struct Reader<'a> {
    image: &'a FileSource,
    buffer: PageBuffer,
}

impl PageReader for Reader<'_> {
    fn read(&mut self, first: u64, pages: u64, each: EachPage<'_>) -> Result<Unread, MeasureError> {
        let FileSource { path, file, bytes, .. } = self.image;
        let place = self.image.place(first);
        for start in (first..first + pages).step_by(BATCH_PAGES) {
            let len = (first + pages - start).min(BATCH_PAGES as u64) as usize;
            let buffer = &mut self.buffer[..len * PAGE];
            let at = place + (start - first) * PAGE_BYTES;
            file.read_exact_at(buffer, at).map_err(|source| match source.kind() {
                ErrorKind::UnexpectedEof => ImageError::Shrunk { path: path.clone(), at, bytes: *bytes },
                _ => ImageError::Read { path: path.clone(), at, source },
            })?;
            hand_on(start, buffer, each);
        }
        Ok(Unread::default())
    }
}
