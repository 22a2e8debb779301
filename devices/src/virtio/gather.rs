//! Several chains for one piece of data, put in the used ring all at once.
//!
//! What [`super::drain`] does chain by chain is not enough for a packet that fills several buffers:
//! a driver that sees the first of them before the last takes the packet for a broken one. Chains
//! that are too few are left in the ring.

use std::sync::atomic::Ordering;

use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress};

use super::chain::{Buffer, Chain};
use super::ring_error::RingError;
use crate::GuestMemory;
use crate::warn::Limited;

/// Bytes of the used ring before its first element, of an element, and before its index.
const USED_HEADER: u64 = 4;
const USED_ELEMENT: u64 = 8;
const USED_INDEX: u64 = 2;

/// Chains taken from a queue that are not in its used ring yet. Kept between uses for its
/// allocations' sake.
#[derive(Debug, Default)]
pub(super) struct Gathered {
    /// Head and device-writable bytes of each. One that is broken has none.
    chains: Vec<(u16, u32)>,
    /// Their device-writable buffers, in order.
    buffers: Vec<Buffer>,
    /// Where in the available ring the first of them was.
    first: u16,
}

/// What became of a search for chains with room for some data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Room {
    /// They are gathered.
    Found,
    /// The driver has not offered enough, and notifies when it offers more. None was taken.
    TooLittle,
    /// As many chains as may be gathered have too little room. The driver has them back, empty.
    Never,
}

impl Gathered {
    /// Takes chains from `queue` until they have room for `bytes`: at most `most`, and never more
    /// than the queue has entries. Adds to `looked` for each chain that was looked at; what is
    /// broken is counted in `broken`.
    pub(super) fn take(
        &mut self,
        queue: &mut Queue,
        memory: &GuestMemory,
        (bytes, most): (usize, usize),
        broken: &Limited,
        looked: &mut usize,
    ) -> Result<Room, RingError> {
        self.chains.clear();
        self.buffers.clear();
        self.first = queue.next_avail();
        let mut room = 0;
        let mut chain = Chain::new(memory);
        for _ in 0..most.min(queue.size().into()) {
            let Some(descriptors) = next(queue, memory)? else {
                queue.set_next_avail(self.first);
                return Ok(Room::TooLittle);
            };
            *looked += 1;
            let head = descriptors.head_index();
            if head >= queue.size() {
                // No such descriptor, so there is nothing that could be put in the used ring.
                broken.hit(format_args!("head {head} in a queue of {}", queue.size()));
                continue;
            }
            match chain.load(descriptors, queue.size()) {
                Ok(()) if chain.writable().is_empty() => broken.hit(format_args!("nowhere to write to")),
                Err(error) => broken.hit(format_args!("{error}")),
                Ok(()) => {
                    self.buffers.extend_from_slice(chain.writable());
                    self.chains.push((head, chain.writable_bytes()));
                    room += u64::from(chain.writable_bytes());
                    if room >= bytes as u64 {
                        return Ok(Room::Found);
                    }
                    continue;
                }
            }
            self.chains.push((head, 0));
        }
        self.chains.iter_mut().for_each(|(_, bytes)| *bytes = 0);
        put(queue, memory, &self.chains)?;
        Ok(Room::Never)
    }

    /// How many there are.
    pub(super) fn count(&self) -> usize {
        self.chains.len()
    }

    /// Bytes that they have room for.
    pub(super) fn room(&self) -> usize {
        self.chains.iter().map(|(_, bytes)| *bytes as usize).sum()
    }

    /// Leaves them in the queue that they were just taken from.
    pub(super) fn put_back(&mut self, queue: &mut Queue) {
        queue.set_next_avail(self.first);
        self.chains.clear();
    }

    /// Fills them with `data`, for which they have room, and puts them in the used ring.
    pub(super) fn fill(
        &mut self,
        queue: &mut Queue,
        memory: &GuestMemory,
        data: &[u8],
    ) -> Result<(), RingError> {
        let mut rest = data;
        for buffer in &self.buffers {
            let (now, later) = rest.split_at(rest.len().min(buffer.len_bytes as usize));
            memory
                .write_slice(now, GuestAddress(buffer.start.0))
                .map_err(virtio_queue::Error::GuestMemory)?;
            rest = later;
        }
        let mut left = data.len();
        for (_, bytes) in &mut self.chains {
            *bytes = left.min(*bytes as usize) as u32;
            left -= *bytes as usize;
        }
        put(queue, memory, &self.chains)
    }
}

/// The next available chain. Without one the driver has been told to notify when there is one.
fn next<'m>(
    queue: &mut Queue,
    memory: &'m GuestMemory,
) -> Result<Option<virtio_queue::DescriptorChain<&'m GuestMemory>>, RingError> {
    if let Some(chain) = queue.iter(memory)?.next() {
        return Ok(Some(chain));
    }
    match queue.enable_notification(memory)? {
        // It came in between.
        true => Ok(queue.iter(memory)?.next()),
        false => Ok(None),
    }
}

/// Puts `chains`, at most as many as the queue has entries, in the used ring, where the driver sees
/// all of them or none.
fn put(queue: &mut Queue, memory: &GuestMemory, chains: &[(u16, u32)]) -> Result<(), RingError> {
    let failed = virtio_queue::Error::GuestMemory;
    let (ring, mut next_used) = (queue.used_ring(), queue.next_used());
    for (head, bytes) in chains {
        let slot = u64::from(next_used % queue.size());
        let at = GuestAddress(ring + USED_HEADER + USED_ELEMENT * slot);
        let element = u64::from(*head) | u64::from(*bytes) << 32;
        memory.write_obj(element.to_le(), at).map_err(failed)?;
        next_used = next_used.wrapping_add(1);
    }
    queue.set_next_used(next_used);
    let index = GuestAddress(ring + USED_INDEX);
    Ok(memory.store(next_used.to_le(), index, Ordering::Release).map_err(failed)?)
}
