//! How much a fleet file may ask for.

/// The most guests of one fleet.
pub const MAX_GUESTS: usize = 1024;
/// The longest name of a fleet or guest: it is part of a socket's path.
pub(super) const MAX_NAME_BYTES: usize = 32;

/// The longest a guest may be given to become ready: a day.
pub(super) const MAX_READY_SECONDS: u32 = 24 * 60 * 60;
