//! The host's swap, from `/proc/swaps`.

use std::io;

/// All active swap together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Swaps {
    /// Size, in KiB.
    pub kib: u64,
    /// Used, in KiB.
    pub used_kib: u64,
}

impl Swaps {
    /// Of this host, now.
    pub fn read() -> io::Result<Self> {
        std::fs::read_to_string("/proc/swaps").map(|text| Self::parse(&text))
    }

    fn parse(text: &str) -> Self {
        Swap::each(text).fold(Self::default(), |all, one| Self {
            kib: all.kib.saturating_add(one.kib),
            used_kib: all.used_kib.saturating_add(one.used_kib),
        })
    }
}

/// One active swap device or file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Swap<'a> {
    /// Its path, as far as its first space.
    pub name: &'a str,
    /// Size, in KiB.
    pub kib: u64,
    /// Used, in KiB.
    pub used_kib: u64,
}

impl<'a> Swap<'a> {
    /// Those in the text of `/proc/swaps`.
    pub fn each(text: &'a str) -> impl Iterator<Item = Self> {
        text.lines().skip(1).filter_map(|line| {
            let name = line.split_ascii_whitespace().next()?;
            // A file's name may have spaces in it (as \040, perhaps not always); the numbers are at
            // the end.
            let mut fields = line.split_ascii_whitespace().rev();
            let (used_kib, kib) = (fields.nth(1)?.parse().ok()?, fields.next()?.parse().ok()?);
            Some(Self { name, kib, used_kib })
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn swap_is_added_up() {
        let none = "Filename\tType\tSize\tUsed\tPriority\n";
        assert_eq!(Swaps::parse(none), Swaps::default());
        let two =
            format!("{none}/dev/zram0   partition\t262140\t\t512\t\t100\n/a\\040b  file\t1000\t\t0\t\t-2\n");
        assert_eq!(Swaps::parse(&two), Swaps { kib: 263_140, used_kib: 512 });
        let first = Swap { name: "/dev/zram0", kib: 262_140, used_kib: 512 };
        assert_eq!(Swap::each(&two).next(), Some(first));
    }
}
