//! A virtqueue that is broken as a whole.

/// The ring itself cannot be used: not one bad buffer, but the structure that buffers come in.
#[derive(Debug, thiserror::Error)]
#[error("the virtqueue cannot be used any more until the driver resets the device")]
pub struct RingError(#[from] virtio_queue::Error);
