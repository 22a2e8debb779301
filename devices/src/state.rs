//! What devices are at one instant, as plain data: for a VM that goes on elsewhere. Nothing of the
//! host is in it: no descriptor, no path, no sink.
//!
//! Saved from devices that are not in use meanwhile. State given to a device is trusted as little
//! as what a driver writes: it may have come from anywhere.

use serde::{Deserialize, Serialize};

use crate::rate_limiter::LimiterState;

/// A serial port.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SerialState {
    /// Divisor latch, low and high; interrupt enable and identification; line control and status;
    /// modem control and status; scratch.
    pub registers: [u8; 9],
    /// What the guest has not read.
    pub input: Vec<u8>,
    /// What the guest wrote and the sink had not taken.
    pub output: Vec<u8>,
}

/// ACPI's fixed events.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pm1State {
    /// `PM1_STS`.
    pub status: u16,
    /// `PM1_EN`.
    pub enable: u16,
}

/// PCI's configuration ports.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PciState {
    /// `CONFIG_ADDRESS`.
    pub address: u32,
    /// Reset control.
    pub reset_control: u8,
}

/// A virtqueue, as its driver described it, and how far the device has got.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueState {
    /// Entries.
    pub size: u32,
    /// Guest-physical addresses of the descriptors,
    pub desc_table: u64,
    /// the available ring,
    pub avail_ring: u64,
    /// and the used ring.
    pub used_ring: u64,
    /// The driver says that it may be used.
    pub ready: bool,
    /// The next entry of the available ring that is looked at.
    pub next_avail: u16,
    /// The next entry of the used ring that is written.
    pub next_used: u16,
}

/// A virtio device behind its registers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TransportState {
    /// Which kind of device.
    pub device_id: u32,
    /// Status, without DEVICE_NEEDS_RESET.
    pub status: u32,
    /// DEVICE_NEEDS_RESET.
    pub needs_reset: bool,
    /// InterruptStatus.
    pub interrupt_status: u32,
    /// ConfigGeneration.
    pub generation: u32,
    /// Which word of the device's features is read.
    pub device_features_sel: u32,
    /// Which word of the driver's features is written.
    pub driver_features_sel: u32,
    /// The driver's features.
    pub driver_features: u64,
    /// Which queue is described.
    pub queue_sel: u32,
    /// All queues.
    pub queues: Vec<QueueState>,
    /// What the device itself knows.
    pub device: DeviceState,
}

/// What a virtio device knows besides its queues.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum DeviceState {
    /// Nothing.
    #[default]
    Nothing,
    /// A balloon.
    Balloon(BalloonState),
    /// The rate limiters of a device that has any, in the order of its queues.
    Limiters(Vec<Option<LimiterState>>),
    /// Where persistent memory lies, and how much.
    Pmem { start: u64, bytes: u64 },
}

/// A balloon.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BalloonState {
    /// The size that the host wants, in pages.
    pub target_pages: u32,
    /// The size that the driver says it has.
    pub actual_pages: u32,
    /// What free pages are filled with.
    pub poison: u32,
    /// Free page hinting: what the host asked last,
    pub host_cmd: u32,
    /// what the guest answered,
    pub guest_cmd: Option<u32>,
    /// the number of the last run,
    pub last_run: u32,
    /// and whether its end is acknowledged.
    pub acknowledge_on_stop: bool,
    /// The pages in it: first page number, and how many.
    pub held: Vec<(u64, u64)>,
    /// Counters, in the order of their fields.
    pub counters: [u64; 8],
    /// The statistics buffer that the device keeps.
    pub kept: Option<u16>,
}

/// Why a device cannot be what it was said to be.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// A serial port with more input than it holds, or more output.
    #[error(
        "a serial port has {input} bytes of input and {output} of output: expected at most {most_input} and {most_output}"
    )]
    Serial {
        /// Input.
        input: usize,
        /// Output.
        output: usize,
        /// What there is room for.
        most_input: usize,
        /// What there is room for.
        most_output: usize,
    },
    /// Another device.
    #[error("a device of kind {found} was saved where kind {expected} is")]
    Device {
        /// What was saved.
        found: u32,
        /// What is here.
        expected: u32,
    },
    /// Other queues.
    #[error("device of kind {device}: {found} queues were saved, and it has {expected}")]
    Queues {
        /// Which.
        device: u32,
        /// What was saved.
        found: usize,
        /// What it has.
        expected: usize,
    },
    /// Another number of virtio devices.
    #[error("{found} virtio devices were saved, and there are {expected}")]
    Count {
        /// What was saved.
        found: usize,
        /// What there is.
        expected: usize,
    },
    /// A status that no driver gets to.
    #[error(
        "device of kind {device}: status {status:#x} with features {features:#x} is none that a driver gets to"
    )]
    Status {
        /// Which.
        device: u32,
        /// The status.
        status: u32,
        /// The driver's features.
        features: u64,
    },
    /// A queue that cannot be used.
    #[error("device of kind {device}, queue {queue}: {why}")]
    Queue {
        /// Which.
        device: u32,
        /// Which of its queues.
        queue: usize,
        /// What is wrong with it.
        why: String,
    },
    /// State of another device.
    #[error("device of kind {device}: what was saved of it is of another one")]
    Kind {
        /// Which.
        device: u32,
    },
    /// Persistent memory elsewhere, or of another length.
    #[error(
        "persistent memory of {} bytes at {:#x} was saved, and there is one of {} bytes at {:#x}: expected a file as long as the one that the guest had",
        found.1, found.0, expected.1, expected.0
    )]
    Pmem { found: (u64, u64), expected: (u64, u64) },
}
