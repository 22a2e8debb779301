//! Pressure stall information of memory: of the host, or of a control group.
//!
//! Source: the kernel's Documentation/accounting/psi.rst.

use std::fs;
use std::path::Path;

/// Percent of the last ten seconds.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Psi {
    /// In which at least one task waited for memory.
    pub some_avg10_percent: f64,
    /// In which all did that had anything to do.
    pub full_avg10_percent: f64,
}

impl Psi {
    /// From a file; None where it is not there, or says something else.
    pub fn at(path: &Path) -> Option<Self> {
        Self::parse(&fs::read_to_string(path).ok()?)
    }

    /// Parses `some avg10=0.00 avg60=...` and `full avg10=...`.
    fn parse(text: &str) -> Option<Self> {
        let avg10 = |kind: &str| {
            let line = text.lines().find_map(|line| line.strip_prefix(kind))?;
            let value: f64 = line.split_whitespace().find_map(|w| w.strip_prefix("avg10="))?.parse().ok()?;
            value.is_finite().then_some(value)
        };
        Some(Self { some_avg10_percent: avg10("some")?, full_avg10_percent: avg10("full")? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_broken_file_is_an_absent_one() {
        assert_eq!(Psi::parse("some avg10=NaN\nfull avg10=0\n"), None);
        assert_eq!(Psi::parse(""), None);
        assert_eq!(Psi::parse("some avg10=1.00\n"), None, "of processors there was no full once");
    }
}
