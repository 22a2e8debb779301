//! Numbers of 64 bits that drivers write in two halves.

pub(super) fn set_low(number: &mut u64, value: u32) {
    *number = *number & !0xffff_ffff | u64::from(value);
}

pub(super) fn set_high(number: &mut u64, value: u32) {
    *number = *number & 0xffff_ffff | u64::from(value) << 32;
}
