//! A split virtqueue, the driver's side (Virtio 1.2, section 2.7).
//!
//! Chains are sent in rounds: descriptors are handed out from the first one on, and again from the
//! first one when every chain is back. That needs no free list, and no balloon queue needs more.

use core::sync::atomic::{AtomicU32, Ordering, fence};

use super::{StartError, Transport, register};

/// The most entries a ring has here.
pub const ENTRIES_MAX: u16 = 32;
/// Words of 32 bits that a ring takes: one page, whatever its size.
pub const WORDS: usize = 1024;

// Where the parts lie in the page, in words. Each begins on a boundary that any ring of 32 entries
// is happy with.
const DESCRIPTORS: usize = 0;
const AVAILABLE: usize = 128;
const USED: usize = 256;

const NEXT: u16 = 1;
const WRITE: u16 = 2;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Buffer {
    /// Guest-physical address of its first byte.
    pub gpa: u64,
    pub len_bytes: u32,
    /// Whether the device may write it, and only that; otherwise it may read it, and only that.
    pub writable: bool,
}

/// There is no room for a chain before another is back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Full;

/// The device used a descriptor that it was not given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Unusable;

#[derive(Debug)]
pub struct Ring<'m> {
    words: &'m [AtomicU32],
    gpa: u64,
    queue: u32,
    entries: u16,
    /// The next descriptor to hand out.
    next: u16,
    /// What was put into the available ring, all told.
    available: u16,
    /// What was taken from the used ring, all told.
    used: u16,
}

impl<'m> Ring<'m> {
    /// Makes queue number `queue` over `words`, which lie at `gpa` (page-aligned), and makes it
    /// known to the device. It has as many entries as the device allows, up to [`ENTRIES_MAX`].
    ///
    /// # Errors
    /// [`StartError::Queue`] if the device has no such queue or `words` are fewer than [`WORDS`].
    pub fn start(
        transport: &mut impl Transport,
        queue: u32,
        words: &'m [AtomicU32],
        gpa: u64,
    ) -> Result<Self, StartError> {
        let words = words.get(..WORDS).ok_or(StartError::Queue(queue))?;
        for word in words {
            word.store(0, Ordering::Relaxed);
        }
        transport.write(register::QUEUE_SEL, queue);
        let most = transport.read(register::QUEUE_NUM_MAX).min(ENTRIES_MAX.into());
        let entries = 1 << most.checked_ilog2().ok_or(StartError::Queue(queue))?;
        transport.write(register::QUEUE_NUM, entries);
        for (low, at) in [
            (register::QUEUE_DESC_LOW, DESCRIPTORS),
            (register::QUEUE_DRIVER_LOW, AVAILABLE),
            (register::QUEUE_DEVICE_LOW, USED),
        ] {
            let address = gpa + 4 * at as u64;
            transport.write(low, address as u32);
            transport.write(low + 4, (address >> 32) as u32);
        }
        transport.write(register::QUEUE_READY, 1);
        if transport.read(register::QUEUE_READY) != 1 {
            return Err(StartError::Queue(queue));
        }
        Ok(Self { words, gpa, queue, entries: entries as u16, next: 0, available: 0, used: 0 })
    }

    /// How many entries it has: the descriptors that may be out at a time.
    pub fn entries(&self) -> usize {
        self.entries.into()
    }

    /// How many chains the device has not used yet.
    pub fn in_flight(&self) -> u16 {
        self.available.wrapping_sub(self.used)
    }

    /// Guest-physical address of the ring's page.
    pub fn gpa(&self) -> u64 {
        self.gpa
    }

    /// Makes a chain of `buffers` available. The device learns of it by [`Ring::notify`]. An empty
    /// chain is [`Full`] too: there is no such thing.
    ///
    /// # Errors
    /// [`Full`], and nothing done.
    pub fn add(&mut self, buffers: &[Buffer]) -> Result<(), Full> {
        self.add_linked(buffers, None)
    }

    /// As [`Ring::add`], but the last descriptor goes on to the first: what no driver may do.
    ///
    /// # Errors
    /// [`Full`], and nothing done.
    pub fn add_loop(&mut self, buffers: &[Buffer]) -> Result<(), Full> {
        self.add_linked(buffers, Some(self.next))
    }

    fn add_linked(&mut self, buffers: &[Buffer], last_to: Option<u16>) -> Result<(), Full> {
        let head = self.next;
        if buffers.is_empty() || buffers.len() > usize::from(self.entries - head) {
            return Err(Full);
        }
        for (buffer, index) in buffers.iter().zip(head..) {
            let is_last = usize::from(index - head) + 1 == buffers.len();
            let next = if is_last { last_to } else { Some(index + 1) };
            let flags = if buffer.writable { WRITE } else { 0 } | if next.is_some() { NEXT } else { 0 };
            let at = DESCRIPTORS + 4 * usize::from(index);
            let link = u32::from(flags) | u32::from(next.unwrap_or(0)) << 16;
            let (low, high) = (buffer.gpa as u32, (buffer.gpa >> 32) as u32);
            for (word, value) in self.words[at..].iter().zip([low, high, buffer.len_bytes, link]) {
                word.store(value, Ordering::Relaxed);
            }
            self.next = index + 1;
        }
        self.offer(head);
        Ok(())
    }

    /// The available ring is 16-bit entries after two 16-bit fields; only this side writes it, so
    /// that a whole word may be rewritten for a half of it.
    fn offer(&mut self, head: u16) {
        let slot = usize::from(self.available % self.entries);
        let entry = &self.words[AVAILABLE + 1 + slot / 2];
        let (shift, before) = (16 * (slot % 2), entry.load(Ordering::Relaxed));
        entry.store(before & !(0xffff << shift) | u32::from(head) << shift, Ordering::Relaxed);
        self.available = self.available.wrapping_add(1);
        // A device that sees the index sees the entry and the descriptors. Flags stay 0: every use
        // is notified.
        self.words[AVAILABLE].store(u32::from(self.available) << 16, Ordering::Release);
    }

    /// Notifies the device of the queue.
    pub fn notify(&self, transport: &mut impl Transport) {
        fence(Ordering::SeqCst);
        transport.write(register::QUEUE_NOTIFY, self.queue);
    }

    /// Whether the device has used a chain that was not taken yet. Reads memory only.
    pub fn has_used(&self) -> bool {
        self.used_index() != self.used
    }

    /// Takes the next chain that the device has used: how many bytes it says it wrote.
    ///
    /// # Errors
    /// [`Unusable`] if the device used more than it was given, or a descriptor it was not given.
    pub fn take_used(&mut self) -> Result<Option<u32>, Unusable> {
        let ready = self.used_index().wrapping_sub(self.used);
        if ready == 0 {
            return Ok(None);
        }
        let at = USED + 1 + 2 * usize::from(self.used % self.entries);
        let (id, len) = (self.words[at].load(Ordering::Relaxed), self.words[at + 1].load(Ordering::Relaxed));
        if ready > self.in_flight() || id >= u32::from(self.next) {
            return Err(Unusable);
        }
        self.used = self.used.wrapping_add(1);
        if self.in_flight() == 0 {
            self.next = 0;
        }
        Ok(Some(len))
    }

    /// Takes everything that the device has used. True if it has used all that it was given.
    ///
    /// # Errors
    /// [`Unusable`].
    pub fn all_used(&mut self) -> Result<bool, Unusable> {
        while self.take_used()?.is_some() {}
        Ok(self.in_flight() == 0)
    }

    fn used_index(&self) -> u16 {
        (self.words[USED].load(Ordering::Acquire) >> 16) as u16
    }
}
