//! Names of checkpoints: they are names of files.

use std::fmt;

use crate::error::StoreError;

const MAX_BYTES: usize = 80;

/// What a checkpoint is called.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Name(String);

impl Name {
    /// One that is possible.
    pub fn new(name: &str) -> Result<Self, StoreError> {
        let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
        let fits = (1..=MAX_BYTES).contains(&name.len()) && !name.starts_with('.');
        match fits && name.chars().all(allowed) {
            true => Ok(Self(name.into())),
            // It may be as long as a user's or a file's mistake is.
            false => Err(StoreError::Name(name.chars().take(2 * MAX_BYTES).collect())),
        }
    }

    /// As text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_leads_nowhere_else() {
        for good in ["a", "warm-1", "fleet.web_0", &"n".repeat(80)] {
            assert_eq!(Name::new(good).unwrap().as_str(), good);
        }
        for bad in ["", ".", "..", ".a", "a/b", "/a", "a b", "ä", "a\0", "a\n", &"n".repeat(81)] {
            assert!(matches!(Name::new(bad), Err(StoreError::Name(_))), "{bad:?}");
        }
    }
}
