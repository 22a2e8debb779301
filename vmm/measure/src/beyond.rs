//! What lies beyond identity: pages that are nearly like another, and how well pages compress. By
//! sampling.
//!
//! The sample is of contents, each as likely as any other: of what is left when everything equal is
//! shared. For each of its pages all memory is searched for similar ones, as Difference Engine does
//! (Gupta and others, OSDI 2008): a page is a candidate if it has one of a few 64-byte blocks, at
//! places drawn for each measurement, in common. The smallest patch counts. It is an upper bound
//! for patching: a page to which others refer cannot itself be a patch, which is not taken into
//! account.

use std::collections::HashMap;

use serde::{Deserialize, Serialize};
use zstd_rs::{CompressionConfig, Compressor};

use super::delta::Reference;
use super::sample::Estimate;
use super::scan::{Progress, Scan};
use super::source::{PageReader, Source};
use super::{MeasureError, PAGE};

/// Bytes of a block that makes a candidate, and how many are looked at in each page.
const BLOCK: usize = 64;
const BLOCKS: usize = 4;
/// Candidates that are tried for a page, the first ones.
const MAX_CANDIDATES: usize = 16;
/// A patch of more bytes is not worth it, as in Difference Engine.
const MAX_PATCH: usize = PAGE / 2;
/// Pages that are read at a time.
const READ_PAGES: u64 = 4096;

/// What patches and compression would save of what sharing leaves.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Beyond {
    /// Different contents: the pages that ideal sharing leaves, zeros not counted.
    pub contents: u64,
    /// Of these, how many were looked at.
    pub sampled: u64,
    /// The part that has a page in memory from which it differs by a patch of half a page or less.
    pub near_duplicates: Estimate,
    /// Bytes of a patch, of those that have one.
    pub patch_bytes: Estimate,
    /// Part of the contents' memory that patches save.
    pub patches_save: Estimate,
    /// Bytes that a page takes compressed by itself: lz4.
    pub lz4_bytes: Estimate,
    /// The same with zstd.
    pub zstd_bytes: Estimate,
    /// Part of the contents' memory that lz4 saves, each page by itself.
    pub lz4_saves: Estimate,
    /// The same with zstd.
    pub zstd_saves: Estimate,
    /// Part of the contents' memory that is saved if each page is kept as the smaller of its patch
    /// and its lz4.
    pub patches_and_lz4_save: Estimate,
}

/// A page of the sample.
struct Sampled {
    number: u32,
    page: Box<[u8; PAGE]>,
    candidates: usize,
    patch_bytes: Option<usize>,
}

impl Scan {
    /// Compares the sampled contents more closely, in one more pass over `sources`, which are those
    /// of the scan. Pages that have changed since are left out.
    ///
    /// # Errors
    ///
    /// A source is gone, or `progress` asked to stop.
    pub fn look_beyond(
        &self,
        sources: &[&dyn Source],
        progress: Progress<'_>,
    ) -> Result<Beyond, MeasureError> {
        let contents: u64 = self.contents_by_set.iter().sum();
        let mut sample = self.read_sample(sources)?;
        let places = self.key.places::<BLOCKS>(PAGE / BLOCK).map(|place| place * BLOCK);
        let mut by_block: HashMap<[u8; BLOCK], Vec<usize>> = HashMap::new();
        for (n, sampled) in sample.iter().enumerate() {
            for block in places.iter().filter_map(|place| block(&sampled.page, *place)) {
                by_block.entry(*block).or_default().push(n);
            }
        }
        let total: u64 = sources.iter().map(|source| source.pages()).sum();
        let mut done = 0;
        for (guest, source) in sources.iter().enumerate() {
            let mut reader = source.open()?;
            let mut first = 0;
            for pages in source.extents() {
                for from in (first..first + pages).step_by(READ_PAGES as usize) {
                    if !progress(done, total) {
                        return Err(MeasureError::Interrupted);
                    }
                    let len = (first + pages - from).min(READ_PAGES);
                    reader.read(from, len, &mut |page, content| {
                        for block in places.iter().filter_map(|place| block(content, *place)) {
                            let alike = by_block.get(block).into_iter().flatten();
                            alike.for_each(|n| self.compare(&mut sample[*n], guest, page, content));
                        }
                    })?;
                    done += len;
                }
                first += pages;
            }
        }
        progress(total, total);
        Ok(summary(&sample, contents))
    }

    /// The pages of the sample that still hold what they held.
    fn read_sample(&self, sources: &[&dyn Source]) -> Result<Vec<Sampled>, MeasureError> {
        let mut sample = Vec::new();
        let mut reader: Option<(usize, Box<dyn PageReader + '_>)> = None;
        for (tag, number) in &self.sample {
            let (guest, page) = self.numbering.place(*number);
            let open = match reader.take() {
                Some((same, reader)) if same == guest => reader,
                _ => sources[guest].open()?,
            };
            let (_, open) = reader.insert((guest, open));
            open.read(page, 1, &mut |_, content| {
                if self.key.tag(content) == *tag {
                    let page = Box::new(*content);
                    sample.push(Sampled { number: *number, page, candidates: 0, patch_bytes: None });
                }
            })?;
        }
        Ok(sample)
    }

    fn compare(&self, sampled: &mut Sampled, guest: usize, page: u64, content: &[u8; PAGE]) {
        // An equal page is shared and no reference: it is on the same frame.
        let is_itself = || self.numbering.place(sampled.number) == (guest, page);
        if sampled.candidates == MAX_CANDIDATES || is_itself() || *sampled.page == *content {
            return;
        }
        sampled.candidates += 1;
        let bytes = Reference::new(content).patch_bytes(&sampled.page);
        if bytes <= MAX_PATCH {
            sampled.patch_bytes = Some(sampled.patch_bytes.map_or(bytes, |best| best.min(bytes)));
        }
    }
}

/// The block at a place, unless it is of zeros, which every second page has.
fn block(page: &[u8; PAGE], place: usize) -> Option<&[u8; BLOCK]> {
    page[place..].first_chunk::<BLOCK>().filter(|block| **block != [0; BLOCK])
}

fn summary(sample: &[Sampled], contents: u64) -> Beyond {
    let whole = PAGE as f64;
    let patches: Vec<f64> =
        sample.iter().map(|sampled| sampled.patch_bytes.map_or(whole, |bytes| bytes as f64)).collect();
    let patched: Vec<f64> = patches.iter().copied().filter(|bytes| *bytes < whole).collect();
    let has_patch: Vec<f64> = patches.iter().map(|bytes| f64::from(u8::from(*bytes < whole))).collect();
    let lz4: Vec<f64> =
        sample.iter().map(|s| lz4_flex::block::compress(&s.page[..]).len().min(PAGE) as f64).collect();
    let mut zstd = Compressor::new(CompressionConfig::DEFAULT).ok();
    let mut packed = Vec::new();
    let zstd: Vec<f64> = sample
        .iter()
        .map(|sampled| {
            packed.clear();
            // Incompressible pages are kept as they are.
            let done =
                zstd.as_mut().is_some_and(|zstd| zstd.compress(&sampled.page[..], None, &mut packed).is_ok());
            if done { packed.len().min(PAGE) as f64 } else { whole }
        })
        .collect();
    let both: Vec<f64> = patches.iter().zip(&lz4).map(|(a, b)| a.min(*b)).collect();
    let of = |values: &[f64]| Estimate::of(values, contents);
    let saves = |bytes: &[f64]| of(&bytes.iter().map(|bytes| 1.0 - bytes / whole).collect::<Vec<_>>());
    Beyond {
        contents,
        sampled: sample.len() as u64,
        near_duplicates: of(&has_patch),
        patch_bytes: Estimate::of(
            &patched,
            if sample.len() as u64 == contents { patched.len() as u64 } else { u64::MAX },
        ),
        patches_save: saves(&patches),
        lz4_bytes: of(&lz4),
        zstd_bytes: of(&zstd),
        lz4_saves: saves(&lz4),
        zstd_saves: saves(&zstd),
        patches_and_lz4_save: saves(&both),
    }
}
