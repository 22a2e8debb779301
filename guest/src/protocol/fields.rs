//! `key=value` words, with each key known, taken once and, unless optional, there.

use super::{MAX_LINE, ParseError, Word, line};

/// A line's first word and the rest of it.
pub(super) fn split(text: &str) -> Result<(&str, &str), ParseError> {
    let text = text.strip_suffix('\n').unwrap_or(text);
    let text = text.strip_suffix('\r').unwrap_or(text);
    if text.len() >= MAX_LINE {
        return Err(ParseError::TooLong);
    }
    let text = line::checked(text.as_bytes())?.trim_ascii();
    if text.is_empty() {
        return Err(ParseError::Empty);
    }
    let end = text.find([' ', '\t']).unwrap_or(text.len());
    Ok((&text[..end], text[end..].trim_ascii_start()))
}

/// The values of a line, in the order of the keys asked for.
pub(super) struct Fields<'a, const N: usize> {
    keys: [&'static str; N],
    values: [Option<&'a str>; N],
}

impl<'a, const N: usize> Fields<'a, N> {
    /// Reads `rest`, in which only `keys` may stand. `expected` names them in an error.
    pub(super) fn parse(
        rest: &'a str,
        keys: [&'static str; N],
        expected: &'static str,
    ) -> Result<Self, ParseError> {
        let mut values = [None; N];
        for word in rest.split_ascii_whitespace() {
            let (key, value) =
                word.split_once('=').ok_or_else(|| ParseError::NotAField { found: Word::of(word) })?;
            let slot = keys
                .iter()
                .position(|known| *known == key)
                .ok_or_else(|| ParseError::UnknownKey { key: Word::of(key), expected })?;
            if values[slot].replace(value).is_some() {
                return Err(ParseError::RepeatedKey { key: keys[slot] });
            }
        }
        Ok(Self { keys, values })
    }

    /// The value of key number `slot` and the key.
    pub(super) fn text(&self, slot: usize) -> Result<(&'static str, &'a str), ParseError> {
        let key = self.keys[slot];
        self.values[slot].map(|value| (key, value)).ok_or(ParseError::MissingKey { key })
    }

    /// A number that must be there.
    pub(super) fn number(&self, slot: usize) -> Result<u64, ParseError> {
        let (key, value) = self.text(slot)?;
        number(value).ok_or_else(|| bad(key, value, "a number below 2^64"))
    }

    /// A number that may be missing.
    pub(super) fn optional(&self, slot: usize) -> Result<Option<u64>, ParseError> {
        self.values[slot].map(|_| self.number(slot)).transpose()
    }

    /// A percentage that must be there.
    pub(super) fn percent(&self, slot: usize) -> Result<u8, ParseError> {
        let (key, value) = self.text(slot)?;
        match number(value) {
            Some(percent @ 0..=100) => Ok(percent as u8),
            _ => Err(bad(key, value, "a percentage from 0 to 100")),
        }
    }
}

/// A decimal or `0x` hexadecimal number.
pub(super) fn number(text: &str) -> Option<u64> {
    let (digits, radix) = match text.strip_prefix("0x") {
        Some(digits) => (digits, 16),
        None => (text, 10),
    };
    // `from_str_radix` takes a sign.
    digits
        .bytes()
        .all(|byte| byte.is_ascii_hexdigit())
        .then(|| u64::from_str_radix(digits, radix).ok())
        .flatten()
}

/// The error for a value that its key does not take.
pub(super) fn bad(key: &'static str, value: &str, expected: &'static str) -> ParseError {
    ParseError::BadValue { key, value: Word::of(value), expected }
}
