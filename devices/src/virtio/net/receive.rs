//! Frames from the tap into the driver's buffers.

use std::io::ErrorKind;

use virtio_bindings::virtio_net::VIRTIO_NET_F_MRG_RXBUF;
use virtio_queue::{Queue, QueueT};

use super::frame::{Frame, MAX_BYTES, MIN_BYTES, NUM_BUFFERS, bytes_on_wire};
use super::tap::Tap;
use super::turn::{Mistakes, TURN_BYTES};
use crate::GuestMemory;
use crate::rate_limiter::Limiter;
use crate::virtio::drain::MAX_PASSES;
use crate::virtio::gather::{Gathered, Room};
use crate::virtio::{Interrupt, Progress, RingError};

/// What there is between tap and driver.
#[derive(Debug, Default)]
pub(super) struct Receiver {
    frame: Frame,
    /// Bytes of the frame that waits for buffers; 0 if none does.
    waiting_bytes: usize,
    /// Whether it has been let through by the limiter.
    is_let_through: bool,
    gathered: Gathered,
    /// Whether a frame may fill several chains.
    mergeable: bool,
}

impl Receiver {
    /// There is a driver, with `features`.
    pub(super) fn start(&mut self, features: u64) {
        self.mergeable = features & 1 << VIRTIO_NET_F_MRG_RXBUF != 0;
        (self.waiting_bytes, self.is_let_through) = (0, false);
    }

    /// There is none any more; a frame for it is lost, as on a wire.
    pub(super) fn stop(&mut self) {
        (self.waiting_bytes, self.is_let_through) = (0, false);
    }

    /// Takes frames from `tap` until it has none or the driver has no buffers for them, or for a
    /// turn: so many bytes, or so many chains, each of which may be a small frame and a system
    /// call.
    pub(super) fn receive(
        &mut self,
        queue: &mut Queue,
        memory: &GuestMemory,
        interrupt: &Interrupt,
        (tap, limiter): (&mut dyn Tap, &Limiter),
        mistakes: &Mistakes,
    ) -> Result<Progress, RingError> {
        let first_used = queue.next_used();
        let (mut turn_bytes, mut looked) = (0, 0);
        let most = if self.mergeable { queue.size().into() } else { 1 };
        queue.disable_notification(memory)?;
        let progress = loop {
            if turn_bytes >= TURN_BYTES || looked >= MAX_PASSES * usize::from(queue.size()) {
                break Progress::More;
            }
            if self.waiting_bytes == 0 {
                // One that is dropped costs a turn no less.
                turn_bytes += MIN_BYTES;
                match tap.receive(self.frame.whole()) {
                    Ok(bytes) if (MIN_BYTES..=MAX_BYTES).contains(&bytes) => self.waiting_bytes = bytes,
                    Ok(bytes) => {
                        mistakes.length.hit(format_args!("{bytes} bytes from the host"));
                        continue;
                    }
                    Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                    Err(error) => {
                        if error.kind() != ErrorKind::WouldBlock {
                            mistakes.failed.hit(format_args!("{error}"));
                        }
                        break Progress::Idle;
                    }
                }
            }
            let bytes = self.waiting_bytes;
            if !self.is_let_through {
                if let Err(wait) = limiter.take(bytes_on_wire(bytes)) {
                    break Progress::Later(wait);
                }
                self.is_let_through = true;
            }
            match self.gathered.take(queue, memory, (bytes, most), &mistakes.broken, &mut looked)? {
                Room::TooLittle => break Progress::Idle,
                Room::Never => mistakes.no_room.hit(format_args!("{bytes} bytes")),
                Room::Found => {
                    turn_bytes += bytes;
                    let frame = self.frame.first(bytes);
                    frame[NUM_BUFFERS].copy_from_slice(&(self.gathered.count() as u16).to_le_bytes());
                    self.gathered.fill(queue, memory, frame)?;
                }
            }
            (self.waiting_bytes, self.is_let_through) = (0, false);
        };
        interrupt.used_since(first_used, queue, memory)?;
        Ok(progress)
    }
}
