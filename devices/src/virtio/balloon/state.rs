//! What the balloon and the host's side of it share.

use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::{Config, Statistics};
use crate::reclaim::Gpa;

/// The host's way to a balloon. Clones share it.
#[derive(Clone, Debug)]
pub struct Handle(Arc<Mutex<State>>);

#[derive(Debug)]
struct State {
    config: Config,
    target_pages: u32,
}

/// What has happened since the VM began. Never goes back, not even with a driver's reset.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Pages the driver gave by the inflate queue, repeated ones too.
    pub inflated_pages: u64,
    /// Pages it took back by the deflate queue.
    pub deflated_pages: u64,
    /// Bytes given back to the host because of the inflate queue.
    pub reclaimed_bytes: u64,
    /// Bytes given back by free page reporting.
    pub reported_bytes: u64,
    /// Bytes given back by free page hinting.
    pub hinted_bytes: u64,
    /// Times the host would not take a range back.
    pub failed_discards: u64,
    /// Pages named outside RAM, and requests that made no sense.
    pub refused: u64,
}

/// Why hinting could not be started or stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HintError {
    /// It was not offered, or the driver does not want it.
    #[error(
        "free page hinting is not available: expected a balloon with free_page_hinting and a guest driver that has it"
    )]
    Unavailable,
}

/// Where hinting stands (Virtio 1.2, section 5.5.6.4).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HintStatus {
    /// What the host has asked: 0 stop, 1 done, 2 and up the run's number.
    pub host_cmd: u32,
    /// What the guest last answered, if it has.
    pub guest_cmd: Option<u32>,
}

impl Handle {
    pub(super) fn new(config: Config) -> Self {
        Self(Arc::new(Mutex::new(State { config, target_pages: config.target_pages })))
    }

    /// What the balloon was made with.
    pub fn config(&self) -> Config {
        self.lock().config
    }

    /// Whether a driver runs the device.
    pub fn has_driver(&self) -> bool {
        false
    }

    /// The size the host wants, in pages.
    pub fn target_pages(&self) -> u32 {
        self.lock().target_pages
    }

    /// Asks the driver for another size. The caller checks it against RAM.
    pub fn set_target(&self, pages: u32) {
        self.lock().target_pages = pages;
    }

    /// The size the driver says it has reached (`actual` in configuration space).
    pub fn actual_pages(&self) -> u32 {
        0
    }

    /// The pages the driver has given and not taken back, as ranges in ascending order.
    pub fn held(&self) -> Vec<Range<Gpa>> {
        Vec::new()
    }

    /// Asks the driver for fresh statistics. False if it has left no buffer to ask with (yet).
    pub fn request_statistics(&self) -> bool {
        false
    }

    /// The latest statistics, once there are some.
    pub fn statistics(&self) -> Option<Statistics> {
        None
    }

    /// What has happened so far.
    pub fn counters(&self) -> Counters {
        Counters::default()
    }

    /// Starts a run of free page hinting. With `acknowledge_on_stop` the guest is told that the run is done as
    /// soon as it has reported everything, and may use the pages again.
    pub fn start_hinting(&self, acknowledge_on_stop: bool) -> Result<(), HintError> {
        let _ = acknowledge_on_stop;
        Err(HintError::Unavailable)
    }

    /// Ends the run: the guest may use all hinted pages again.
    pub fn stop_hinting(&self) -> Result<(), HintError> {
        Err(HintError::Unavailable)
    }

    /// Where hinting stands.
    pub fn hinting(&self) -> Result<HintStatus, HintError> {
        Err(HintError::Unavailable)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
