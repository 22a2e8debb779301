//! The mappings of a process, from `/proc/PID/maps`. Needs no privilege for a process of the same
//! user.
//!
//! Source: proc_pid_maps(5).

use std::io;
use std::ops::Range;

use super::Hva;

/// The lines of process `pid`: see [`Mapping::parse`]. `NotFound` means that there is no such
/// process.
pub fn of(pid: u32) -> io::Result<String> {
    std::fs::read_to_string(format!("/proc/{pid}/maps"))
}

/// The lines of this process.
pub fn own() -> io::Result<String> {
    std::fs::read_to_string("/proc/self/maps")
}

/// One line of `maps`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mapping<'a> {
    /// Its addresses; the end is not below the start.
    pub hvas: Range<Hva>,
    /// Permissions, and whether it is shared: `rw-p`.
    pub permissions: &'a str,
    /// Where in the file it begins, in bytes.
    pub offset: u64,
    /// The file system, as `major:minor` in hexadecimal.
    pub device: &'a str,
    /// The number of the file; 0 for memory that is of none.
    pub inode: u64,
    /// The file's path, or what the kernel calls it; may be empty.
    pub name: &'a str,
}

impl<'a> Mapping<'a> {
    /// Reads a line of `maps`, or the first of a mapping in `smaps`. None if it is no such line.
    pub fn parse(line: &'a str) -> Option<Self> {
        let mut fields = line.splitn(6, ' ');
        let hvas = addresses(fields.next()?)?;
        let permissions = fields.next()?;
        let offset = hex(fields.next()?)?;
        let device = fields.next()?;
        let inode = fields.next()?.parse().ok()?;
        let name = fields.next().unwrap_or("").trim();
        Some(Self { hvas, permissions, offset, device, inode, name })
    }

    /// How long it is.
    pub fn bytes(&self) -> u64 {
        self.hvas.end - self.hvas.start
    }
}

/// Two addresses such as `7f12a0000000-7f12a0040000`.
pub(super) fn addresses(text: &str) -> Option<Range<Hva>> {
    let (start, end) = text.split_once('-')?;
    let (start, end) = (hex(start)?, hex(end)?);
    (start <= end).then_some(Hva(start)..Hva(end))
}

fn hex(text: &str) -> Option<u64> {
    u64::from_str_radix(text, 16).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_read_with_and_without_a_name() {
        let line =
            "7f12a0000000-7f12a0040000 rw-p 00003000 00:01 4711                       /memfd:a b (deleted)";
        let mapping = Mapping {
            hvas: Hva(0x7f12_a000_0000)..Hva(0x7f12_a004_0000),
            permissions: "rw-p",
            offset: 0x3000,
            device: "00:01",
            inode: 4711,
            name: "/memfd:a b (deleted)",
        };
        assert_eq!(mapping.bytes(), 0x40000);
        assert_eq!(Mapping::parse(line), Some(mapping));
        assert_eq!(Mapping::parse("1000-3000 rw-p 00000000 00:00 0 ").map(|m| m.name), Some(""));
        for other in ["", "Rss:    8 kB", "3000-1000 rw-p 00000000 00:00 0", "1000-3000 rw-p 00000000 00:00"]
        {
            assert_eq!(Mapping::parse(other), None, "{other}");
        }
    }

    #[test]
    fn every_line_of_ours_is_read() {
        let text = own().unwrap();
        assert!(
            text.lines().count() > 3 && text.lines().all(|line| Mapping::parse(line).is_some()),
            "{text}"
        );
        assert_eq!(of(u32::MAX).unwrap_err().kind(), io::ErrorKind::NotFound);
    }
}
