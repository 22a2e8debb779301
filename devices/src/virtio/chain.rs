//! A descriptor chain that has been checked, and streaming access to its buffers.

use std::ops::Deref;

use virtio_queue::DescriptorChain;
use vm_memory::{
    Bytes, GuestAddress, GuestMemory as _, GuestMemoryError, Permissions, ReadVolatile, WriteVolatile,
};

use crate::GuestMemory;
use crate::in_flight::InFlight;
use crate::reclaim::Gpa;

/// One contiguous buffer of a chain. It lay inside RAM when the chain was checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Buffer {
    /// First byte.
    pub start: Gpa,
    /// Length in bytes, at least 1.
    pub len_bytes: u32,
}

/// What is wrong with a chain.
#[derive(Debug, thiserror::Error)]
pub(super) enum ChainError {
    #[error("the chain has more descriptors than the queue ({0})")]
    TooLong(u16),
    #[error("the chain leaves its descriptor table or exceeds 4 GiB")]
    Truncated,
    #[error("a buffer of {len} bytes at {start} is outside RAM")]
    OutsideRam { start: Gpa, len: u32 },
    #[error("a device-readable buffer follows a device-writable one")]
    Order,
}

/// A checked chain: device-readable buffers, then device-writable ones.
///
/// [`Chain::read`] and [`Chain::write`] each keep a position. The buffers are guest memory that a
/// vCPU can change at any time, so read a field once and decide on the copy.
#[derive(Debug)]
pub struct Chain<'m> {
    memory: &'m GuestMemory,
    head: u16,
    readable: Vec<Buffer>,
    writable: Vec<Buffer>,
    read: Cursor,
    write: Cursor,
}

/// What a chain consists of, for a thread that serves it later. It holds the place of as many
/// buffers as the chain has descriptors.
#[derive(Debug)]
pub struct Detached {
    head: u16,
    readable: Vec<Buffer>,
    writable: Vec<Buffer>,
}

impl<'m> Chain<'m> {
    /// The chain of which these are the parts, from its start. `memory` is the one that they were
    /// checked against.
    pub(super) fn attach(memory: &'m GuestMemory, detached: Detached) -> Self {
        let Detached { head, readable, writable } = detached;
        Self { head, readable, writable, ..Self::new(memory) }
    }

    /// Its parts; it is empty afterwards.
    pub(super) fn detach(&mut self) -> Detached {
        Detached {
            head: self.head,
            readable: std::mem::take(&mut self.readable),
            writable: std::mem::take(&mut self.writable),
        }
    }

    pub(super) fn new(memory: &'m GuestMemory) -> Self {
        Self {
            memory,
            head: 0,
            readable: Vec::new(),
            writable: Vec::new(),
            read: Cursor::default(),
            write: Cursor::default(),
        }
    }

    /// Replaces the chain by the one that `descriptors` yields. On error it must not be used.
    pub(super) fn load<M>(
        &mut self,
        descriptors: DescriptorChain<M>,
        queue_size: u16,
    ) -> Result<(), ChainError>
    where
        M: Deref,
        M::Target: vm_memory::GuestMemory,
    {
        self.head = descriptors.head_index();
        self.readable.clear();
        self.writable.clear();
        self.read = Cursor::default();
        self.write = Cursor::default();

        // The iterator ends early on anything it cannot follow, so a chain is whole only if its
        // last descriptor says so.
        let mut expects_more = true;
        let mut descriptors = descriptors;
        for descriptor in descriptors.by_ref().take(usize::from(queue_size)) {
            expects_more = descriptor.has_next();
            let buffer = Buffer { start: Gpa(descriptor.addr().0), len_bytes: descriptor.len() };
            if descriptor.is_write_only() {
                self.push_checked(buffer, Permissions::Write)?;
            } else if !self.writable.is_empty() {
                return Err(ChainError::Order);
            } else {
                self.push_checked(buffer, Permissions::Read)?;
            }
        }
        match (expects_more, descriptors.next()) {
            (false, _) => Ok(()),
            (true, Some(_)) => Err(ChainError::TooLong(queue_size)),
            (true, None) => Err(ChainError::Truncated),
        }
    }

    fn push_checked(&mut self, buffer: Buffer, access: Permissions) -> Result<(), ChainError> {
        if buffer.len_bytes == 0 {
            return Ok(());
        }
        let outside = ChainError::OutsideRam { start: buffer.start, len: buffer.len_bytes };
        let len = usize::try_from(buffer.len_bytes).map_err(|_| ChainError::Truncated)?;
        if !self.memory.check_range(GuestAddress(buffer.start.0), len, access) {
            return Err(outside);
        }
        if matches!(access, Permissions::Write) { &mut self.writable } else { &mut self.readable }
            .push(buffer);
        Ok(())
    }

    /// The head index, which identifies the chain to [`complete`](super::drain::complete).
    pub fn head(&self) -> u16 {
        self.head
    }

    /// Buffers the device may read, in order.
    pub fn readable(&self) -> &[Buffer] {
        &self.readable
    }

    /// Buffers the device may write, in order.
    pub fn writable(&self) -> &[Buffer] {
        &self.writable
    }

    /// Bytes the device may read. Fits: a chain's buffers sum to less than 4 GiB.
    pub fn readable_bytes(&self) -> u32 {
        total(&self.readable)
    }

    /// Bytes the device may write.
    pub fn writable_bytes(&self) -> u32 {
        total(&self.writable)
    }

    /// Copies the next bytes of the device-readable part out. Returns how many, less than
    /// `data.len()` only at the end of the part.
    pub fn read(&mut self, data: &mut [u8]) -> usize {
        let mut done = 0;
        while let Some((address, room)) = self.read.next(&self.readable, data.len() - done) {
            if self.memory.read_slice(&mut data[done..done + room], address).is_err() {
                break;
            }
            done += room;
        }
        done
    }

    /// Copies `data` to the next bytes of the device-writable part. Returns how many fitted.
    pub fn write(&mut self, data: &[u8]) -> usize {
        let mut done = 0;
        while let Some((address, room)) = self.write.next(&self.writable, data.len() - done) {
            if self.memory.write_slice(&data[done..done + room], address).is_err() {
                break;
            }
            done += room;
        }
        done
    }

    /// Fills the next `bytes` bytes of the device-writable part from `source`, straight into guest
    /// memory. Returns how many: less only where `source`, or the part, ends.
    pub fn write_from(
        &mut self,
        source: &mut impl ReadVolatile,
        bytes: usize,
        in_flight: &dyn InFlight,
    ) -> Result<usize, GuestMemoryError> {
        let mut done = 0;
        while let Some((address, room)) = self.write.next(&self.writable, bytes - done) {
            let mut filled = 0;
            // A read may bring less than there is.
            while filled < room {
                let (from, end) = (address.0 + filled as u64, address.0 + room as u64);
                let mut read = Ok(0);
                in_flight.during(Gpa(from)..Gpa(end), &mut || {
                    read = self.memory.read_volatile_from(GuestAddress(from), source, room - filled);
                });
                match read? {
                    0 => return Ok(done + filled),
                    read => filled += read,
                }
            }
            done += room;
        }
        Ok(done)
    }

    /// Has `sink` take the next `bytes` bytes of the device-readable part, straight from guest
    /// memory. Returns how many: less only where the part ends. A sink that takes no more is an
    /// error.
    pub fn read_into(
        &mut self,
        sink: &mut impl WriteVolatile,
        bytes: usize,
    ) -> Result<usize, GuestMemoryError> {
        let mut done = 0;
        while let Some((address, room)) = self.read.next(&self.readable, bytes - done) {
            self.memory.write_all_volatile_to(address, sink, room)?;
            done += room;
        }
        Ok(done)
    }

    /// Writes the last byte of the device-writable part, wherever the position is. False if that
    /// part is empty.
    pub fn write_last(&mut self, byte: u8) -> bool {
        let Some(buffer) = self.writable.last() else { return false };
        let last = GuestAddress(buffer.start.0 + u64::from(buffer.len_bytes) - 1);
        self.memory.write_obj(byte, last).is_ok()
    }
}

fn total(buffers: &[Buffer]) -> u32 {
    buffers.iter().fold(0, |sum, buffer| sum.saturating_add(buffer.len_bytes))
}

/// A position in a list of buffers.
#[derive(Clone, Copy, Debug, Default)]
struct Cursor {
    buffer: usize,
    offset: u32,
}

impl Cursor {
    /// The address and length of the next contiguous piece of at most `max` bytes, which is then
    /// passed. None at the end or if `max` is 0.
    fn next(&mut self, buffers: &[Buffer], max: usize) -> Option<(GuestAddress, usize)> {
        let buffer = buffers.get(self.buffer)?;
        let left = buffer.len_bytes - self.offset;
        let piece = u32::try_from(max).unwrap_or(u32::MAX).min(left);
        if piece == 0 {
            return None;
        }
        // Cannot overflow: the whole buffer lies inside RAM.
        let address = GuestAddress(buffer.start.0 + u64::from(self.offset));
        if piece == left {
            self.buffer += 1;
            self.offset = 0;
        } else {
            self.offset += piece;
        }
        Some((address, piece as usize))
    }
}

#[cfg(test)]
mod tests;
