//! Sizes as people write them.

use thiserror::Error;

use super::PAGE_BYTES;

/// Why a text is no size.
#[derive(Debug, Error, PartialEq, Eq, Clone)]
pub enum SizeError {
    /// It has no unit.
    #[error("{0:?} has no unit: expected a number with its unit, such as 64M, 512MiB or 2G")]
    NoUnit(String),
    /// It is something else.
    #[error("{0:?} is no size: expected a number with its unit, such as 64M, 512MiB or 2G")]
    NotASize(String),
    /// It is too little or too much.
    #[error("it cannot be {text}: expected {} to {}", written(*least), written(*most))]
    Range {
        /// What was written.
        text: String,
        /// The least there may be, in bytes.
        least: u64,
        /// The most.
        most: u64,
    },
    /// It is too little or too much for an index.
    #[error("an index of {text} is too small or too large: expected {}M or more", least >> 20)]
    Index {
        /// What was written.
        text: String,
        /// The least there may be, in bytes.
        least: u64,
    },
    /// It ends within a page.
    #[error("{0} is not a whole number of 4 KiB pages")]
    Pages(String),
}

/// A size in the largest unit that says it exactly.
pub fn written(bytes: u64) -> String {
    match bytes {
        0 => "0M".into(),
        _ if bytes.is_multiple_of(1 << 30) => format!("{}G", bytes >> 30),
        _ if bytes.is_multiple_of(1 << 20) => format!("{}M", bytes >> 20),
        _ => format!("{}K", bytes >> 10),
    }
}

/// Parses a size such as `64M`, `512MiB` or `2G` into bytes: whole pages between `least` and `most`
/// bytes.
pub fn parse_size(text: &str, least: u64, most: u64) -> Result<u64, SizeError> {
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let shift = match unit.to_ascii_lowercase().as_str() {
        "k" | "kib" => 10,
        "m" | "mib" => 20,
        "g" | "gib" => 30,
        "t" | "tib" => 40,
        "" if !number.is_empty() => return Err(SizeError::NoUnit(text.into())),
        _ => return Err(SizeError::NotASize(text.into())),
    };
    let bytes = number
        .parse::<u64>()
        .ok()
        .and_then(|n| n.checked_mul(1 << shift))
        .ok_or_else(|| SizeError::NotASize(text.into()))?;
    match bytes {
        _ if !(least..=most).contains(&bytes) => Err(SizeError::Range { text: text.into(), least, most }),
        _ if !bytes.is_multiple_of(PAGE_BYTES) => Err(SizeError::Pages(text.into())),
        _ => Ok(bytes),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn parse(text: &str) -> Result<u64, SizeError> {
        parse_size(text, 16 << 20, 1 << 40)
    }

    #[test]
    fn people_write_sizes_so() {
        assert_eq!(parse("64M"), Ok(64 << 20));
        assert_eq!(parse("2GiB"), Ok(2 << 30));
        assert_eq!(parse("20480k"), Ok(20 << 20));
        for wrong in ["", "0", "0M", "64", "M", "-1G", "1.5G", "8M", "20481k1", "99999999999999999999G", "2T"]
        {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
        assert_eq!(parse("20481k"), Err(SizeError::Pages("20481k".into())));
    }

    proptest! {
        #[test]
        fn rubbish_is_refused_and_never_panics(text in ".{0,30}") {
            let _ = parse(&text);
        }
    }
}
