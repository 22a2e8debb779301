//! Sizes as people write them.

use crate::memory::PAGE_BYTES;
use crate::memory::layout::{MAX_RAM_BYTES, MIN_RAM_BYTES};

/// Parses guest memory such as `64M`, `512MiB` or `2G` into bytes, and checks that a guest can have it.
pub(super) fn memory(text: &str) -> Result<u64, String> {
    let expected = "expected a number with its unit, such as 64M, 512MiB or 2G";
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let shift = match unit.to_ascii_lowercase().as_str() {
        "k" | "kib" => 10,
        "m" | "mib" => 20,
        "g" | "gib" => 30,
        "t" | "tib" => 40,
        "" if !number.is_empty() => return Err(format!("{text:?} has no unit: {expected}")),
        _ => return Err(format!("{text:?} is no size: {expected}")),
    };
    let bytes = number
        .parse::<u64>()
        .ok()
        .and_then(|n| n.checked_mul(1 << shift))
        .ok_or_else(|| format!("{text:?} is no size: {expected}"))?;
    if !(MIN_RAM_BYTES..=MAX_RAM_BYTES).contains(&bytes) {
        let (least, most) = (MIN_RAM_BYTES >> 20, MAX_RAM_BYTES >> 30);
        return Err(format!("a guest cannot have {text}: expected {least}M to {most}G"));
    }
    if !bytes.is_multiple_of(PAGE_BYTES) {
        return Err(format!("{text} is not a whole number of 4 KiB pages"));
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::memory;
    use proptest::prelude::*;

    #[test]
    fn people_write_sizes_so() {
        assert_eq!(memory("64M"), Ok(64 << 20));
        assert_eq!(memory("2GiB"), Ok(2 << 30));
        assert_eq!(memory("20480k"), Ok(20 << 20));
        for wrong in ["", "0", "0M", "64", "M", "-1G", "1.5G", "8M", "20481k1", "99999999999999999999G", "2T"] {
            assert!(memory(wrong).is_err(), "{wrong}");
        }
    }

    proptest! {
        #[test]
        fn rubbish_is_refused_and_never_panics(text in ".{0,30}") {
            let _ = memory(&text);
        }
    }
}
