//! What both queues of a network device have in common: how long a turn is, and what is counted of
//! it.

use crate::warn::Limited;

/// Bytes of frames after which a queue has had its turn.
pub(super) const TURN_BYTES: usize = 1 << 20;

/// What drivers and taps do wrong.
pub(super) struct Mistakes {
    pub(super) broken: Limited,
    pub(super) length: Limited,
    pub(super) refused: Limited,
    pub(super) failed: Limited,
    pub(super) no_room: Limited,
}

impl Default for Mistakes {
    fn default() -> Self {
        Self {
            broken: Limited::new("virtio-net: broken request"),
            length: Limited::new("virtio-net: frame of a wrong length dropped"),
            refused: Limited::new("virtio-net: the tap did not take a frame"),
            failed: Limited::new("virtio-net: the tap failed"),
            no_room: Limited::new("virtio-net: frame dropped, the driver's buffers are too small"),
        }
    }
}
