//! What a VMM holds in memory besides its guest's RAM, from /proc/PID/smaps.

use std::fs;

use anyhow::{Context, Result};

#[derive(Debug, Default, PartialEq, Eq)]
struct Mapping {
    start: u64,
    end: u64,
    pss_bytes: u64,
    writable: bool,
    /// Neither a file nor one of the kernel's own names, such as [heap].
    nameless: bool,
}

/// Proportional set size of everything but guest RAM, which is `memory_bytes` long.
///
/// # Errors
/// No such process, or no mappings that could be guest RAM of that size.
pub fn overhead_bytes(pid: u32, memory_bytes: u64) -> Result<u64> {
    let path = format!("/proc/{pid}/smaps");
    let text = fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
    without_ram(&parse(&text), memory_bytes)
}

fn without_ram(mappings: &[Mapping], memory_bytes: u64) -> Result<u64> {
    let ram = (0..mappings.len()).find_map(|first| ram_from(&mappings[first..], memory_bytes));
    let ram = ram.with_context(|| {
        format!("cannot tell guest RAM from the rest: no writable stretch has {memory_bytes} bytes")
    })?;
    Ok(mappings.iter().map(|m| m.pss_bytes).sum::<u64>() - ram.iter().map(|m| m.pss_bytes).sum::<u64>())
}

/// Guest RAM, if it begins with the first mapping: contiguous, writable, of just this size. Pieces
/// of it may be private mappings of the kernel's file; other mappings may touch it.
fn ram_from(mappings: &[Mapping], memory_bytes: u64) -> Option<&[Mapping]> {
    let first = mappings.first().filter(|m| m.nameless)?;
    let mut end = first.start;
    for (n, mapping) in mappings.iter().enumerate() {
        if mapping.start != end || !mapping.writable {
            return None;
        }
        end = mapping.end;
        if end - first.start >= memory_bytes {
            return (end - first.start == memory_bytes).then(|| &mappings[..=n]);
        }
    }
    None
}

fn parse(text: &str) -> Vec<Mapping> {
    let mut mappings: Vec<Mapping> = Vec::new();
    for line in text.lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        match words.as_slice() {
            ["Pss:", kib, "kB"] => {
                if let Some(mapping) = mappings.last_mut() {
                    mapping.pss_bytes = kib.parse().unwrap_or(0) * 1024;
                }
            }
            [range, access, _offset, _device, inode, name @ ..]
                if range.contains('-') && !range.contains(':') =>
            {
                let ends = range.split_once('-');
                let ends = ends.map(|(a, b)| (u64::from_str_radix(a, 16), u64::from_str_radix(b, 16)));
                let Some((Ok(start), Ok(end))) = ends else {
                    continue;
                };
                mappings.push(Mapping {
                    start,
                    end,
                    pss_bytes: 0,
                    writable: access.contains('w'),
                    nameless: *inode == "0" && (name.is_empty() || name[0].starts_with("[anon:")),
                });
            }
            _ => {}
        }
    }
    mappings
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMAPS: &str = "\
55d000000000-55d000100000 r-xp 00000000 08:01 77 /usr/bin/vmm
Size:               1024 kB
Pss:                 600 kB
Pss_Dirty:             0 kB
7f0000000000-7f0001000000 rw-p 00000000 00:00 0
Pss:               50000 kB
7f0001000000-7f0002000000 rw-p 00200000 08:01 78 /images/vmlinux
Pss:               10000 kB
7f0002000000-7f0010000000 rw-p 00000000 00:00 0
Pss:               50000 kB
7f0010000000-7f0010001000 rw-p 00000000 08:01 78 /images/vmlinux
Pss:                   0 kB
7f0020000000-7f0024000000 ---p 00000000 00:00 0
Pss:                   0 kB
7ffc00000000-7ffc00021000 rw-p 00000000 00:00 0 [stack]
Pss:                  20 kB
";

    #[test]
    fn guest_ram_is_left_out() {
        assert_eq!(without_ram(&parse(SMAPS), 256 << 20).unwrap(), 620 * 1024);
    }

    #[test]
    fn another_amount_of_ram_is_an_error() {
        assert!(without_ram(&parse(SMAPS), 128 << 20).is_err());
        assert!(without_ram(&parse(SMAPS), 512 << 20).is_err());
    }
}
