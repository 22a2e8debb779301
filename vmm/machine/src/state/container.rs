//! The form in which state travels: sections with digests, which are checked before anything in
//! them is read.
//!
//! ```text
//! magic   8 bytes  "SAMEPAGE"
//! format  u32      1
//! count   u32      sections, at most 256
//! table   count times: kind u32, version u32, length u64, BLAKE3 digest of the section 32 bytes
//! digest  32 bytes BLAKE3 of everything before
//! sections, one after the other, to the end
//! ```
//!
//! Numbers are little-endian. A section is a structure of `state` in postcard's format, which is
//! documented and stable; of another version it is another structure, and older ones stay readable.
//! The digests are against accidents: a writer of the file can write them, and everything that
//! follows treats what it reads as hostile.

use serde::Serialize;
use serde::de::DeserializeOwned;
use thiserror::Error;

const MAGIC: &[u8; 8] = b"SAMEPAGE";
/// The only form there is so far.
pub const FORMAT: u32 = 1;
/// More than any VM has.
pub const MAX_BYTES: usize = 16 << 20;
const MAX_SECTIONS: usize = 256;
const HEADER_BYTES: usize = 16;
const ENTRY_BYTES: usize = 48;
const DIGEST_BYTES: usize = 32;

/// Why bytes are no state.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum ContainerError {
    /// Too many, or too few.
    #[error("it has {bytes} bytes: expected {least} to {MAX_BYTES}")]
    Length {
        /// How many.
        bytes: usize,
        /// The least.
        least: usize,
    },
    /// Something else altogether.
    #[error("it does not begin as a state does")]
    Magic,
    /// Written by another build.
    #[error("it is of format {0}, and this build of samepage reads {FORMAT}")]
    Format(u32),
    /// A table that cannot be.
    #[error("it says that it has {0} sections: expected at most {MAX_SECTIONS}")]
    Sections(u32),
    /// Not what was written.
    #[error("the digest of {0} does not fit: it was damaged")]
    Digest(&'static str),
    /// The lengths do not add up.
    #[error("its sections do not end where it does")]
    Lengths,
    /// One that must be there is not.
    #[error("it has no {0}")]
    Missing(&'static str),
    /// One is there twice.
    #[error("it has two of {0}")]
    Twice(&'static str),
    /// One of a kind that is not known.
    #[error("it has a section of kind {0}, which this build of samepage does not know")]
    Kind(u32),
    /// Written by a newer build.
    #[error("its {what} is of version {version}, and this build of samepage reads up to {known}")]
    Version {
        /// Which.
        what: &'static str,
        /// What it says.
        version: u32,
        /// What is known.
        known: u32,
    },
    /// Not what should be in it.
    #[error("its {what} cannot be read: {why}")]
    Decode {
        /// Which.
        what: &'static str,
        /// What is wrong.
        why: postcard::Error,
    },
}

/// A section on its way out.
pub struct Section {
    kind: u32,
    version: u32,
    bytes: Vec<u8>,
}

impl Section {
    /// One of this kind and version.
    pub fn of(kind: u32, version: u32, value: &impl Serialize) -> Result<Self, postcard::Error> {
        Ok(Self { kind, version, bytes: postcard::to_allocvec(value)? })
    }
}

#[cfg(test)]
impl Section {
    pub fn kind(&self) -> u32 {
        self.kind
    }

    pub fn raw(kind: u32, version: u32, bytes: Vec<u8>) -> Self {
        Self { kind, version, bytes }
    }
}

/// All of `sections` in one.
pub fn write(sections: &[Section]) -> Vec<u8> {
    let mut out = MAGIC.to_vec();
    out.extend(FORMAT.to_le_bytes());
    out.extend((sections.len() as u32).to_le_bytes());
    for Section { kind, version, bytes } in sections {
        out.extend(kind.to_le_bytes());
        out.extend(version.to_le_bytes());
        out.extend((bytes.len() as u64).to_le_bytes());
        out.extend(blake3::hash(bytes).as_bytes());
    }
    let digest = blake3::hash(&out);
    out.extend(digest.as_bytes());
    sections.iter().for_each(|section| out.extend(&section.bytes));
    out
}

/// A section that has the digest that was written.
#[derive(Clone, Copy, Debug)]
pub struct Found<'a> {
    /// What is in it.
    pub kind: u32,
    /// In which form.
    pub version: u32,
    bytes: &'a [u8],
}

/// The sections of `bytes`, in order.
pub fn read(bytes: &[u8]) -> Result<Vec<Found<'_>>, ContainerError> {
    let least = HEADER_BYTES + DIGEST_BYTES;
    if !(least..=MAX_BYTES).contains(&bytes.len()) {
        return Err(ContainerError::Length { bytes: bytes.len(), least });
    }
    if !bytes.starts_with(MAGIC) {
        return Err(ContainerError::Magic);
    }
    let (format, count) = (u32_at(bytes, 8), u32_at(bytes, 12));
    if format != FORMAT {
        return Err(ContainerError::Format(format));
    }
    let sections = count as usize;
    if sections > MAX_SECTIONS {
        return Err(ContainerError::Sections(count));
    }
    let table_end = HEADER_BYTES + sections * ENTRY_BYTES;
    let Some((table, rest)) = bytes.split_at_checked(table_end) else { return Err(ContainerError::Lengths) };
    let Some((digest, mut rest)) = rest.split_at_checked(DIGEST_BYTES) else {
        return Err(ContainerError::Lengths);
    };
    if blake3::hash(table).as_bytes() != digest {
        return Err(ContainerError::Digest("its table"));
    }
    let mut found = Vec::with_capacity(sections);
    for entry in table[HEADER_BYTES..].as_chunks::<ENTRY_BYTES>().0 {
        let length = usize::try_from(u64_at(entry, 8)).ok();
        let Some((bytes, after)) = length.and_then(|length| rest.split_at_checked(length)) else {
            return Err(ContainerError::Lengths);
        };
        rest = after;
        if blake3::hash(bytes).as_bytes() != &entry[16..] {
            return Err(ContainerError::Digest("a section"));
        }
        found.push(Found { kind: u32_at(entry, 0), version: u32_at(entry, 4), bytes });
    }
    if rest.is_empty() { Ok(found) } else { Err(ContainerError::Lengths) }
}

impl Found<'_> {
    /// As it was written.
    pub fn bytes(&self) -> &[u8] {
        self.bytes
    }

    /// What is in it, which must be all of it.
    pub fn decode<T: DeserializeOwned>(&self, what: &'static str, version: u32) -> Result<T, ContainerError> {
        if self.version != version {
            return Err(ContainerError::Version { what, version: self.version, known: version });
        }
        match postcard::take_from_bytes(self.bytes) {
            Ok((value, [])) => Ok(value),
            Ok(_) => Err(ContainerError::Decode { what, why: postcard::Error::DeserializeBadEncoding }),
            Err(why) => Err(ContainerError::Decode { what, why }),
        }
    }
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..).and_then(|rest| rest.first_chunk()).copied().map_or(0, u32::from_le_bytes)
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    bytes.get(at..).and_then(|rest| rest.first_chunk()).copied().map_or(0, u64::from_le_bytes)
}
