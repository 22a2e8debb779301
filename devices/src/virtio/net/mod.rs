//! The network device (Virtio 1.2, section 5.1): one pair of queues, over an Ethernet tap of the
//! host's.
//!
//! Offered besides the transport's features: checksums and TCP segmentation left to the other side,
//! both ways, so that a frame may have 64 KiB and a checksum that was not computed; receive buffers
//! that are joined for one frame (5.1.6.4); a MAC address, and an MTU where one is configured. Not
//! offered: a control queue, and so no filters (every frame of the tap's goes to the guest), no
//! second pair of queues; UDP fragmentation.
//!
//! A frame is copied once on its way, through a buffer of the device's own, in both directions. So
//! guest memory is written by this process's ordinary stores only, which merging sees
//! ([`crate::in_flight`] is about other ways), and what a driver changes while a frame is sent is
//! changed before it is copied or not at all.
//!
//! The header before each frame (5.1.6) goes between driver and tap as it is, but for
//! `num_buffers`: the kernel checks what a guest writes there, as it must from any process.

mod frame;
mod receive;
mod tap;
mod turn;

use std::fmt;
use std::os::fd::BorrowedFd;
use std::str::FromStr;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use virtio_bindings::virtio_net as bits;
use virtio_queue::Queue;

use self::frame::{Frame, HEADER_BYTES, MAX_BYTES, MIN_BYTES};
use self::receive::Receiver;
pub use self::tap::{Offload, Tap};
use self::turn::{Mistakes, TURN_BYTES};
use super::drain::{Completion, drain};
use super::{Activation, Interrupt, Progress, RingError, VirtioDevice, place, read_at};
use super::{restore_limiters, save_limiters};
use crate::GuestMemory;
use crate::rate_limiter::Limiter;
use crate::state::{DeviceState, RestoreError};

/// What kind of device it is (Virtio 1.2, section 5).
pub const DEVICE_ID: u32 = VIRTIO_ID_NET;
/// The queue that the driver receives from, and the one that it sends by.
const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
/// Room for some milliseconds at 10 Gbit/s; what Linux fills with receive buffers.
const QUEUE_SIZES: [u16; 2] = [256; 2];
/// An Ethernet address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Mac(pub [u8; 6]);

/// Why a text is no address of an interface.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} is no MAC address of an interface: expected six bytes in hexadecimal, as in 02:00:00:00:00:01, whose first is even \
     (it is no group's) and that are not all 0"
)]
pub struct MacError(String);

impl Mac {
    /// An address that is administered locally and no group's, made of `bytes`.
    pub fn local(mut bytes: [u8; 6]) -> Self {
        bytes[0] = bytes[0] & !1 | 2;
        Self(bytes)
    }
}

impl FromStr for Mac {
    type Err = MacError;

    fn from_str(text: &str) -> Result<Self, MacError> {
        let wrong = || MacError(text.to_owned());
        let mut bytes = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            let part = parts.next().filter(|part| part.len() == 2).ok_or_else(wrong)?;
            let digits = part.bytes().all(|byte| byte.is_ascii_hexdigit());
            *byte = u8::from_str_radix(part, 16).ok().filter(|_| digits).ok_or_else(wrong)?;
        }
        match parts.next().is_none() && bytes[0] & 1 == 0 && bytes != [0; 6] {
            true => Ok(Self(bytes)),
            false => Err(wrong()),
        }
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl TryFrom<String> for Mac {
    type Error = MacError;

    fn try_from(text: String) -> Result<Self, MacError> {
        text.parse()
    }
}

impl From<Mac> for String {
    fn from(mac: Mac) -> Self {
        mac.to_string()
    }
}

/// What the driver reads of its interface.
#[derive(Clone, Copy, Debug)]
pub struct Config {
    pub mac: Mac,
    /// The longest packet, without the Ethernet header; None leaves it to the driver.
    pub mtu: Option<u16>,
}

/// What may pass. A frame is an operation, and as many bytes as it has without its header.
#[derive(Clone, Debug, Default)]
pub struct Limiters {
    /// To the guest.
    pub receive: Limiter,
    /// From it.
    pub transmit: Limiter,
}

/// The device.
pub struct Net {
    config: Config,
    tap: Box<dyn Tap>,
    limiters: Limiters,
    receiver: Receiver,
    transmit: Frame,
    active: Option<Active>,
    mistakes: Mistakes,
}

struct Active {
    memory: Arc<GuestMemory>,
    receive: Option<Queue>,
    transmit: Option<Queue>,
    interrupt: Interrupt,
}

impl Net {
    /// A device on `tap` without a driver.
    pub fn new(config: Config, tap: Box<dyn Tap>) -> Self {
        Self::limited(config, tap, Limiters::default())
    }

    /// One that lets no more pass than `limiters` say.
    pub fn limited(config: Config, tap: Box<dyn Tap>, limiters: Limiters) -> Self {
        Self {
            config,
            tap,
            limiters,
            receiver: Receiver::default(),
            transmit: Frame::default(),
            active: None,
            mistakes: Mistakes::default(),
        }
    }

    /// The configuration space: `mac`, `status` and `max_virtqueue_pairs` (without a meaning, as
    /// their features are not offered), `mtu`.
    fn config(&self) -> [u8; 12] {
        let mut config = [0; 12];
        config[..6].copy_from_slice(&self.config.mac.0);
        config[10..].copy_from_slice(&self.config.mtu.unwrap_or(0).to_le_bytes());
        config
    }

    fn set_offload(&mut self, features: u64) {
        let has = |bit: u32| features & 1 << bit != 0;
        let checksum = has(bits::VIRTIO_NET_F_GUEST_CSUM);
        let (tso4, tso6) = (has(bits::VIRTIO_NET_F_GUEST_TSO4), has(bits::VIRTIO_NET_F_GUEST_TSO6));
        let offload = Offload {
            checksum,
            // A driver must not accept these without checksums (5.1.3.1), and the kernel would not.
            tso4: checksum && tso4,
            tso6: checksum && tso6,
            ecn: checksum && (tso4 || tso6) && has(bits::VIRTIO_NET_F_GUEST_ECN),
        };
        if let Err(error) = self.tap.set_offload(offload) {
            self.mistakes.failed.hit(format_args!("{offload:?}: {error}"));
        }
    }

    fn send(&mut self) -> Result<Progress, RingError> {
        let Some(Active { memory, transmit: Some(queue), interrupt, .. }) = &mut self.active else {
            return Ok(Progress::Idle);
        };
        let (frame, tap, mistakes) = (&mut self.transmit, &mut *self.tap, &self.mistakes);
        let limiter = &self.limiters.transmit;
        let mut turn_bytes = 0;
        drain(queue, memory, interrupt, &mistakes.broken, |chain| {
            let bytes = chain.readable_bytes() as usize;
            if let Err(wait) = limiter.take(frame::bytes_on_wire(bytes.min(MAX_BYTES))) {
                return Completion::Later(wait);
            }
            match frame.room(bytes) {
                Some(room) if bytes >= MIN_BYTES => {
                    let read = chain.read(room);
                    turn_bytes += read;
                    if let Err(error) = tap.send(&room[..read]) {
                        mistakes.refused.hit(format_args!("{error}"));
                    }
                }
                _ => mistakes.length.hit(format_args!("{bytes} bytes, {HEADER_BYTES} of them the header's")),
            }
            match turn_bytes >= TURN_BYTES {
                true => Completion::Last(0),
                false => Completion::Written(0),
            }
        })
    }
}

impl VirtioDevice for Net {
    fn device_id(&self) -> u32 {
        DEVICE_ID
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        let always = [
            bits::VIRTIO_NET_F_CSUM,
            bits::VIRTIO_NET_F_GUEST_CSUM,
            bits::VIRTIO_NET_F_MAC,
            bits::VIRTIO_NET_F_GUEST_TSO4,
            bits::VIRTIO_NET_F_GUEST_TSO6,
            bits::VIRTIO_NET_F_GUEST_ECN,
            bits::VIRTIO_NET_F_HOST_TSO4,
            bits::VIRTIO_NET_F_HOST_TSO6,
            bits::VIRTIO_NET_F_HOST_ECN,
            bits::VIRTIO_NET_F_MRG_RXBUF,
        ];
        let mtu = self.config.mtu.map(|_| bits::VIRTIO_NET_F_MTU);
        always.into_iter().chain(mtu).fold(0, |features, bit| features | 1 << bit)
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_at(&self.config(), offset, data);
    }

    fn activate(&mut self, mut activation: Activation) {
        self.set_offload(activation.features);
        self.receiver.start(activation.features);
        let mut queue = |index: usize| activation.queues.get_mut(index).and_then(Option::take);
        self.active = Some(Active {
            receive: queue(RECEIVE),
            transmit: queue(TRANSMIT),
            memory: activation.memory,
            interrupt: activation.interrupt,
        });
    }

    fn process_queue(&mut self, index: usize) -> Result<Progress, RingError> {
        match (index, &mut self.active) {
            (RECEIVE, Some(Active { memory, receive: Some(queue), interrupt, .. })) => {
                let (tap, limiter) = (&mut *self.tap, &self.limiters.receive);
                self.receiver.receive(queue, memory, interrupt, (tap, limiter), &self.mistakes)
            }
            (TRANSMIT, _) => self.send(),
            _ => Ok(Progress::Idle),
        }
    }

    fn source(&self) -> Option<(BorrowedFd<'_>, usize)> {
        Some((self.tap.readable(), RECEIVE))
    }

    fn reset(&mut self) {
        self.active = None;
        self.receiver.stop();
    }

    fn queue_place(&self, index: usize) -> Option<(u16, u16)> {
        let active = self.active.as_ref()?;
        place(if index == RECEIVE { active.receive.as_ref() } else { active.transmit.as_ref() })
    }

    fn save(&self) -> DeviceState {
        save_limiters(&[&self.limiters.receive, &self.limiters.transmit])
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), RestoreError> {
        restore_limiters(DEVICE_ID, &[&self.limiters.receive, &self.limiters.transmit], state)
    }
}

#[cfg(test)]
mod tests;
