//! How much one measurement takes.

/// Guests that one measurement takes: their number is packed into 16 bits of an index entry.
pub const MAX_SPACES: usize = 1 << 16;
