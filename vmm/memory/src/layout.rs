//! Where guest RAM lies in guest-physical space: up to 3 GiB from address 0, the rest from 4 GiB
//! on, with the hole for devices between them.

/// First guest-physical address of the device hole.
pub const HOLE_START: u64 = 3 << 30;
/// First guest-physical address above the hole.
pub const HOLE_END: u64 = 4 << 30;
/// The least RAM a guest may have.
pub const MIN_RAM_BYTES: u64 = 16 << 20;
/// The most RAM a guest may have.
pub const MAX_RAM_BYTES: u64 = 1 << 40;

/// One contiguous stretch of guest-physical RAM, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stretch {
    /// Guest-physical address of its first byte.
    pub gpa: u64,
    /// Its length.
    pub bytes: u64,
}

/// The stretches of a guest with `bytes` of RAM, in rising order.
pub fn stretches(bytes: u64) -> Vec<Stretch> {
    let low = bytes.min(HOLE_START);
    let mut all = vec![Stretch { gpa: 0, bytes: low }];
    if bytes > low {
        all.push(Stretch { gpa: HOLE_END, bytes: bytes - low });
    }
    all
}

/// What files that a guest has as memory are aligned to: Linux takes up memory by sections of this size.
const FILE_ALIGN: u64 = 128 << 20;

/// Where such files lie, of these lengths, beside `ram_bytes` of RAM: behind it, and above the hole.
pub fn file_starts(ram_bytes: u64, lengths: impl IntoIterator<Item = u64>) -> Vec<u64> {
    let ram_end = stretches(ram_bytes).iter().map(|stretch| stretch.gpa + stretch.bytes).max();
    let mut end = ram_end.unwrap_or_default().max(HOLE_END);
    let mut start = |length| {
        let start = end.next_multiple_of(FILE_ALIGN);
        end = start.saturating_add(length);
        start
    };
    lengths.into_iter().map(&mut start).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn every_byte_has_one_place_outside_the_hole(pages in 1u64..(MAX_RAM_BYTES >> 12)) {
            let bytes = pages << 12;
            let all = stretches(bytes);
            prop_assert_eq!(all.iter().map(|s| s.bytes).sum::<u64>(), bytes);
            for s in &all {
                prop_assert!(s.gpa + s.bytes <= HOLE_START || s.gpa >= HOLE_END);
            }
        }
    }

    #[test]
    fn files_lie_behind_ram_and_apart_from_each_other() {
        const GIB: u64 = 1 << 30;
        assert_eq!(file_starts(256 << 20, [2 << 20, 2 << 20]), [4 * GIB, 4 * GIB + (128 << 20)]);
        assert_eq!(file_starts(4 * GIB, [3 * GIB, 1]), [5 * GIB, 8 * GIB]);
        assert_eq!(file_starts(4 * GIB + 4096, [1]), [5 * GIB + (128 << 20)]);
    }
}
