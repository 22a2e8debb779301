//! The one loop over a virtqueue, so that no device touches ring indices.
//!
//! Everything in a ring comes from the guest and may change while it is read. The bounds: a chain
//! has at most as many descriptors as the queue ([`Chain`] checks it before the device sees it), a
//! pass takes at most as many chains as the queue has entries, and there are at most [`MAX_PASSES`]
//! passes before the caller is asked to come back. A device whose requests can be large ends its
//! turn earlier ([`Completion::Last`]).

use std::time::Duration;

use virtio_queue::{Queue, QueueOwnedT, QueueT};

use super::Progress;
use super::interrupt::Interrupt;
use super::ring_error::RingError;
use crate::GuestMemory;
use crate::virtio::chain::Chain;
use crate::warn::Limited;

/// Passes over a queue before the caller gets a chance to do something else. One pass empties what
/// a well-behaved driver queued; the others catch what it added meanwhile. A driver that keeps up
/// for this long is either very fast or hostile, and in both cases other devices must get their
/// turn.
pub const MAX_PASSES: usize = 8;

/// What a device did with a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Completion {
    /// It is finished, with the number of bytes written to its device-writable part, from its
    /// start.
    Written(u32),
    /// As `Written`, of a long chain: [`drain`] returns with [`Progress::More`], so that others get
    /// their turn.
    Last(u32),
    /// The device keeps it and calls [`complete`] with its head later.
    Held,
    /// As `Held`, and the device has no room for another: [`drain`] returns, and is called again
    /// once one is complete.
    HeldLast,
    /// A rate limit holds it back for this long: it stays in the ring, untouched, and so do those
    /// behind it.
    Later(Duration),
}

/// Takes every available chain from `queue`, calls `each` with it, and puts it in the used ring.
///
/// A broken chain (too long, looping, outside RAM, readable after writable) never reaches `each`:
/// it is counted in `broken` and completed with length 0. The driver is interrupted once, if it
/// wants to be.
pub fn drain(
    queue: &mut Queue,
    memory: &GuestMemory,
    interrupt: &Interrupt,
    broken: &Limited,
    mut each: impl FnMut(&mut Chain<'_>) -> Completion,
) -> Result<Progress, RingError> {
    let mut completed = false;
    let mut progress = Progress::More;
    let mut chain = Chain::new(memory);
    'passes: for _ in 0..MAX_PASSES {
        queue.disable_notification(memory)?;
        for _ in 0..queue.size() {
            let Some(descriptors) = queue.iter(memory)?.next() else {
                break;
            };
            let head = descriptors.head_index();
            if head >= queue.size() {
                // No such descriptor, so there is nothing that could be put in the used ring.
                broken.hit(format_args!("head {head} in a queue of {}", queue.size()));
                continue;
            }
            let completion = match chain.load(descriptors, queue.size()) {
                Ok(()) => each(&mut chain),
                Err(error) => {
                    broken.hit(format_args!("{error}"));
                    Completion::Written(0)
                }
            };
            if let Completion::Later(wait) = completion {
                queue.go_to_previous_position();
                progress = Progress::Later(wait);
                break 'passes;
            }
            if let Completion::Written(bytes) | Completion::Last(bytes) = completion {
                queue.add_used(memory, head, bytes)?;
                completed = true;
            }
            if matches!(completion, Completion::Last(_) | Completion::HeldLast) {
                break 'passes;
            }
        }
        if !queue.enable_notification(memory)? {
            progress = Progress::Idle;
            break;
        }
    }
    if completed {
        interrupt.used_buffers(queue, memory)?;
    }
    Ok(progress)
}

/// Completes a chain that a device had [`Completion::Held`]. `written` counts as in
/// [`Completion::Written`].
pub fn complete(
    queue: &mut Queue,
    memory: &GuestMemory,
    interrupt: &Interrupt,
    head: u16,
    written: u32,
) -> Result<(), RingError> {
    queue.add_used(memory, head, written)?;
    interrupt.used_buffers(queue, memory)
}
