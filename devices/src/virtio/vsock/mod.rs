//! The socket device (Virtio 1.2, section 5.10): streams between programs in the guest and Unix
//! sockets of the host's, without a network. The host's side is Firecracker's: a client of the
//! listener says `CONNECT PORT\n`, and reads `OK PORT\n` if a program in the guest accepts; a
//! program in the guest that connects to a port of the host's is given what [`Dial`] finds for it.
//!
//! Three queues: to the guest, from the guest, events. The crate virtio-vsock reads packets, too,
//! but from one or two descriptors only, and a driver may cut them as it likes.
//!
//! Credit is kept both ways. What the guest sends and the host does not take fills a buffer of 64
//! KiB for that connection, and the guest gets no more room: so a program of the host's that never
//! reads stops its own connection, and no other. Connections, bytes and packets in a turn are
//! bounded.

mod connection;
mod mux;
mod packet;

use std::io;
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixListener;
use std::sync::Arc;

use virtio_bindings::virtio_ids::VIRTIO_ID_VSOCK;
use virtio_queue::{Queue, QueueT};

pub use self::mux::Dial;
use self::mux::Mux;
use self::packet::{HEADER_BYTES, Header, MAX_DATA_BYTES};
use super::drain::{Completion, MAX_PASSES, drain};
use super::gather::{Gathered, Room};
use super::{Activation, Interrupt, Progress, RingError, VirtioDevice, place, read_at};
use crate::GuestMemory;
use crate::state::{DeviceState, RestoreError};
use crate::warn::Limited;

/// What kind of device it is (Virtio 1.2, section 5).
pub const DEVICE_ID: u32 = VIRTIO_ID_VSOCK;
/// The least number of a guest's: those below have a meaning.
pub const MIN_CID: u32 = 3;
const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
const EVENTS: usize = 2;
const QUEUE_SIZES: [u16; 3] = [256; 3];
/// Bytes of data after which a queue has had its turn.
const TURN_BYTES: usize = 1 << 20;
/// The event for connections that are gone all at once (5.10.6.7).
const TRANSPORT_RESET: [u8; 4] = [0; 4];

/// The device.
pub struct Vsock {
    cid: u32,
    mux: Mux,
    active: Option<Active>,
    gathered: Gathered,
    packet: Vec<u8>,
    /// The driver is to get the event that its connections are gone.
    is_reset: bool,
    broken: Limited,
    malformed: Limited,
}

struct Active {
    memory: Arc<GuestMemory>,
    queues: [Option<Queue>; 3],
    interrupt: Interrupt,
}

impl Vsock {
    /// A device for guest number `cid`, whose host connects to `listener`, and is found by `dial`.
    /// Without a driver.
    pub fn new(cid: u32, listener: UnixListener, dial: Dial) -> io::Result<Self> {
        Ok(Self {
            cid,
            mux: Mux::new(cid.into(), listener, dial)?,
            active: None,
            gathered: Gathered::default(),
            packet: Vec::new(),
            is_reset: false,
            broken: Limited::new("virtio-vsock: broken request"),
            malformed: Limited::new("virtio-vsock: malformed packet dropped"),
        })
    }

    /// Takes the guest's packets.
    fn transmit(&mut self) -> Result<Progress, RingError> {
        let Some(Active { memory, queues, interrupt }) = &mut self.active else { return Ok(Progress::Idle) };
        let Some(queue) = &mut queues[TRANSMIT] else { return Ok(Progress::Idle) };
        let (mux, malformed, packet) = (&mut self.mux, &self.malformed, &mut self.packet);
        let mut turn_bytes = 0;
        drain(queue, memory, interrupt, &self.broken, |chain| {
            let mut header = [0; HEADER_BYTES];
            let read = chain.read(&mut header);
            let header = Header::parse(&header);
            let bytes = header.len as usize;
            let behind = (chain.readable_bytes() as usize).saturating_sub(HEADER_BYTES);
            if read < HEADER_BYTES || bytes > behind || bytes > MAX_DATA_BYTES {
                malformed.hit(format_args!("{bytes} bytes of data, {behind} behind a header of {read}"));
                return Completion::Written(0);
            }
            packet.resize(bytes, 0);
            let read = chain.read(packet);
            if let Err(why) = mux.take(&header, &packet[..read]) {
                malformed.hit(format_args!("{why}"));
            }
            turn_bytes += HEADER_BYTES + bytes;
            match turn_bytes >= TURN_BYTES {
                true => Completion::Last(0),
                false => Completion::Written(0),
            }
        })
    }

    /// Gives the guest what is for it.
    fn receive(&mut self) -> Result<Progress, RingError> {
        let Some(Active { memory, queues, interrupt }) = &mut self.active else { return Ok(Progress::Idle) };
        let Some(queue) = &mut queues[RECEIVE] else { return Ok(Progress::Idle) };
        let all_seen = self.mux.look();
        let first_used = queue.next_used();
        let (mut turn_bytes, mut looked) = (0, 0);
        queue.disable_notification(&**memory)?;
        let progress = loop {
            if turn_bytes >= TURN_BYTES || looked >= MAX_PASSES * usize::from(queue.size()) {
                break Progress::More;
            }
            if !self.mux.has_work() {
                break if all_seen { Progress::Idle } else { Progress::More };
            }
            match self.gathered.take(queue, memory, (HEADER_BYTES, 1), &self.broken, &mut looked)? {
                Room::TooLittle => break Progress::Idle,
                Room::Never => continue,
                Room::Found => {}
            }
            let room = self.gathered.room().min(HEADER_BYTES + MAX_DATA_BYTES);
            match self.mux.give(&mut self.packet, room) {
                Some(bytes) => {
                    turn_bytes += bytes;
                    self.gathered.fill(queue, memory, &self.packet[..bytes])?;
                }
                None => self.gathered.put_back(queue),
            }
        };
        interrupt.used_since(first_used, queue, memory)?;
        Ok(progress)
    }

    /// Tells the driver of what has happened to all of its connections.
    fn tell(&mut self) -> Result<Progress, RingError> {
        let Some(Active { memory, queues, interrupt }) = &mut self.active else { return Ok(Progress::Idle) };
        let Some(queue) = queues[EVENTS].as_mut().filter(|_| self.is_reset) else {
            return Ok(Progress::Idle);
        };
        let first_used = queue.next_used();
        let bytes = TRANSPORT_RESET.len();
        if self.gathered.take(queue, memory, (bytes, 1), &self.broken, &mut 0)? == Room::Found {
            self.gathered.fill(queue, memory, &TRANSPORT_RESET)?;
            self.is_reset = false;
        }
        interrupt.used_since(first_used, queue, memory)?;
        Ok(Progress::Idle)
    }
}

impl VirtioDevice for Vsock {
    fn device_id(&self) -> u32 {
        DEVICE_ID
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        0
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_at(&u64::from(self.cid).to_le_bytes(), offset, data);
    }

    fn activate(&mut self, activation: Activation) {
        let mut queues = activation.queues.into_iter();
        let queues = std::array::from_fn(|_| queues.next().flatten());
        self.active = Some(Active { memory: activation.memory, queues, interrupt: activation.interrupt });
    }

    fn process_queue(&mut self, index: usize) -> Result<Progress, RingError> {
        match index {
            TRANSMIT => {
                let sent = self.transmit()?;
                // Most packets are answered.
                let received = self.receive()?;
                if received == Progress::More { Ok(received) } else { Ok(sent) }
            }
            RECEIVE => self.receive(),
            _ => self.tell(),
        }
    }

    fn source(&self) -> Option<(BorrowedFd<'_>, usize)> {
        Some((self.mux.events(), RECEIVE))
    }

    fn reset(&mut self) {
        self.active = None;
        self.is_reset = false;
        self.mux.close_all();
    }

    fn queue_place(&self, index: usize) -> Option<(u16, u16)> {
        place(self.active.as_ref()?.queues.get(index)?.as_ref())
    }

    /// The host's ends of its connections are elsewhere.
    fn restore(&mut self, state: &DeviceState) -> Result<(), RestoreError> {
        match state {
            DeviceState::Nothing => {
                self.is_reset = self.active.is_some();
                Ok(())
            }
            _ => Err(RestoreError::Kind { device: DEVICE_ID }),
        }
    }
}

#[cfg(test)]
mod tests;
