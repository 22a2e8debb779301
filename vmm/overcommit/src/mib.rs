//! Pages for people.

use std::fmt;

/// Pages, shown in MiB with the unit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mib(pub u64);

impl fmt::Display for Mib {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:.1} MiB", self.0 as f64 / 256.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mebibyte_is_256_pages() {
        assert_eq!((Mib(256).to_string(), Mib(384).to_string()), ("1.0 MiB".into(), "1.5 MiB".into()));
    }
}
