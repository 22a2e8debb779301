//! Which stretches of a process's memory are its guest's RAM, by what is present: the rule, and
//! what it leaves out.
//!
//! RAM is data (writable, not executable) in anonymous memory, in shared memory (memfd, tmpfs,
//! hugetlbfs, SysV), or in a mapped file: QEMU, Firecracker, Cloud Hypervisor and crosvm use one of
//! these. A stretch counts from [`LEAST_BYTES`] on, and by what it *holds* (pages with a frame or
//! on swap), never by its length: address space is reserved by the tebibyte. The one that holds
//! most is RAM, and so is what holds at least a [`FRACTION`]th of that and is of the same kind, or
//! a [`OTHER_FRACTION`]th and is of another; and the rest of a file of which a part is. The same
//! pages mapped a second time are not counted again. A mapped file is RAM, as after a restore,
//! unless a longer stretch of memory holds at least an [`OTHER_FRACTION`]th of what it holds: then
//! it is the kernel that QEMU boots. Whatever else is large is left out, and listed with the
//! reason: what was meant is named with `--range`.

use std::fmt;
use std::ops::Range;

/// The smallest stretch that may be guest memory.
pub const LEAST_BYTES: u64 = 16 << 20;
/// A stretch of the same kind that holds less than this part of the largest one is something else.
pub const FRACTION: u64 = 16;
/// A stretch of another kind that holds less than this part of the largest one is something else,
/// such as a framebuffer.
pub const OTHER_FRACTION: u64 = 4;
/// Stretches that a sentence lists.
const LISTED: usize = 8;

/// Kinds of memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Anonymous,
    /// A memfd, shared memory, huge pages: a file in memory.
    Memory,
    /// A file of a disk.
    File,
    /// The heap, a stack, code, what is read only: never RAM.
    Other(&'static str),
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Anonymous => "anonymous",
            Self::Memory => "shared memory",
            Self::File => "mapped file",
            Self::Other(what) => what,
        })
    }
}

/// A part of a file that is mapped shared: every process that maps it has the same pages.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FilePart {
    /// The file: its device as `/proc` writes it, and its inode.
    pub file: (String, u64),
    /// Which bytes of it.
    pub bytes: Range<u64>,
}

/// A contiguous stretch of memory that may be a guest's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stretch {
    pub hvas: Range<u64>,
    /// Of its bytes, those that have a frame or are on swap.
    pub held_bytes: u64,
    /// Its kind.
    pub kind: Kind,
    /// The parts of it that are a shared file's, by address.
    pub parts: Vec<FilePart>,
}

impl Stretch {
    pub fn bytes(&self) -> u64 {
        self.hvas.end - self.hvas.start
    }

    /// Whether it and `other` map the same pages of a file.
    fn maps_pages_of(&self, other: &Self) -> bool {
        self.parts.iter().any(|a| {
            let overlap =
                |b: &FilePart| a.file == b.file && a.bytes.start < b.bytes.end && b.bytes.start < a.bytes.end;
            other.parts.iter().any(overlap)
        })
    }

    /// Whether it and `other` are parts of one file.
    fn is_of_file_of(&self, other: &Self) -> bool {
        self.parts.iter().any(|a| other.parts.iter().any(|b| a.file == b.file))
    }
}

fn mib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

impl fmt::Display for Stretch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Range { start, end } = self.hvas;
        let (held, size) = (mib(self.held_bytes), mib(self.bytes()));
        write!(f, "{start:x}-{end:x} ({held:.1} of {size:.1} MiB in memory, {})", self.kind)
    }
}

/// Stretches in a row, for sentences.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stretches(pub Vec<Stretch>);

impl fmt::Display for Stretches {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_empty() {
            return write!(f, "none at all");
        }
        for (n, stretch) in self.0.iter().take(LISTED).enumerate() {
            write!(f, "{}{stretch}", if n == 0 { "" } else { ", " })?;
        }
        match self.0.get(LISTED..) {
            None | Some([]) => Ok(()),
            Some(rest) => {
                let held = mib(rest.iter().map(|stretch| stretch.held_bytes).sum());
                write!(f, " and {} more that hold {held:.1} MiB", rest.len())
            }
        }
    }
}

/// Why a large stretch is not taken for RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// Nothing of it is in memory.
    Untouched,
    /// It holds little beside the largest.
    Small,
    /// Its pages are counted where they are mapped first.
    Again,
    /// Its kind is never RAM.
    Kind,
    /// A file, mapped beside longer memory that holds much.
    File,
    /// Other ranges were named.
    NotNamed,
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Untouched => "nothing of it is in memory",
            Self::Small => "holds little beside the largest",
            Self::Again => "the same pages as another range",
            Self::Kind => "no RAM by its kind",
            Self::File => "a file beside longer memory that is none",
            Self::NotNamed => "not named",
        })
    }
}

/// The stretches taken for a guest's RAM, and those left out.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Choice {
    /// The guest's RAM, by address.
    pub taken: Vec<Stretch>,
    /// Other large stretches, the one that holds most first.
    pub left_out: Vec<(Stretch, Reason)>,
    /// Ranges were named, and the rule was not asked.
    pub is_named: bool,
}

impl Choice {
    /// By the rule, of stretches in any order.
    pub fn of(mut stretches: Vec<Stretch>) -> Self {
        stretches.sort_by_key(|stretch| {
            (std::cmp::Reverse(stretch.held_bytes), std::cmp::Reverse(stretch.bytes()), stretch.hvas.start)
        });
        let memory: Vec<(u64, u64)> = stretches
            .iter()
            .filter(|stretch| matches!(stretch.kind, Kind::Anonymous | Kind::Memory))
            .map(|stretch| (stretch.bytes(), stretch.held_bytes))
            .collect();
        let is_beside = |file: &Stretch| {
            let is_more =
                |&(bytes, held): &(u64, u64)| bytes > file.bytes() && held > file.held_bytes / OTHER_FRACTION;
            file.kind == Kind::File && memory.iter().any(is_more)
        };
        let mut choice = Self::default();
        for stretch in stretches {
            match is_beside(&stretch).then_some(Reason::File).or_else(|| choice.verdict(&stretch)) {
                None => choice.taken.push(stretch),
                Some(reason) if choice.is_worth_listing(&stretch) => {
                    choice.left_out.push((stretch, reason));
                }
                Some(_) => {}
            }
        }
        choice.taken.sort_by_key(|stretch| stretch.hvas.start);
        choice
    }

    /// Other large stretches in a process of which `ranges` were named.
    pub fn named(stretches: Vec<Stretch>, ranges: &[Range<u64>]) -> Self {
        let touches = |s: &Stretch| ranges.iter().any(|r| r.start < s.hvas.end && s.hvas.start < r.end);
        let (taken, rest): (Vec<_>, Vec<_>) = stretches.into_iter().partition(touches);
        let mut left_out = Self::of(rest);
        let mut others: Vec<_> =
            left_out.taken.drain(..).map(|stretch| (stretch, Reason::NotNamed)).collect();
        others.append(&mut left_out.left_out);
        Self { taken, left_out: others, is_named: true }
    }

    /// Why `stretch`, which holds no more than those before, is not RAM.
    fn verdict(&self, stretch: &Stretch) -> Option<Reason> {
        if let Kind::Other(_) = stretch.kind {
            return Some(Reason::Kind);
        }
        if stretch.bytes() < LEAST_BYTES {
            return Some(Reason::Small);
        }
        if stretch.held_bytes == 0 {
            return Some(Reason::Untouched);
        }
        let largest = self.taken.first()?;
        if self.taken.iter().any(|taken| taken.maps_pages_of(stretch)) {
            return Some(Reason::Again);
        }
        let fraction = if stretch.kind == largest.kind { FRACTION } else { OTHER_FRACTION };
        let is_ram = stretch.held_bytes >= largest.held_bytes / fraction
            || self.taken.iter().any(|taken| taken.is_of_file_of(stretch));
        (!is_ram).then_some(Reason::Small)
    }

    /// A stretch that is no candidate is listed if it holds much.
    fn is_worth_listing(&self, stretch: &Stretch) -> bool {
        match stretch.kind {
            Kind::Other(_) => stretch.held_bytes >= LEAST_BYTES,
            _ => stretch.bytes() >= LEAST_BYTES,
        }
    }

    /// What a reader of the numbers should know: the ranges taken and left out, each as `--range`
    /// takes it.
    pub fn note(&self, pid: u32) -> Option<String> {
        if self.left_out.is_empty() {
            return None;
        }
        let sum = |stretches: &mut dyn Iterator<Item = &Stretch>| {
            mib(stretches.map(|stretch| stretch.held_bytes).sum())
        };
        let taken = sum(&mut self.taken.iter());
        let left = sum(&mut self.left_out.iter().map(|(stretch, _)| stretch));
        let mut text = match self.is_named {
            true => format!(
                "process {pid} has {left:.1} MiB in large mappings outside the ranges that were named:"
            ),
            false => {
                let taken_ranges =
                    self.taken.iter().take(LISTED).map(|stretch| format!(" --range {pid}:{stretch}"));
                format!(
                    "process {pid}: {taken:.1} MiB taken for guest memory, {left:.1} MiB in large mappings left out; taken:{}; \
                     left out:",
                    taken_ranges.collect::<String>()
                )
            }
        };
        for (stretch, reason) in self.left_out.iter().take(LISTED) {
            text.push_str(&format!(" --range {pid}:{stretch}: {reason};"));
        }
        match self.left_out.len().saturating_sub(LISTED) {
            0 => {}
            more => text.push_str(&format!(" and {more} more;")),
        }
        match self.is_named {
            true => _ = text.pop(),
            false => {
                text.push_str(
                    " name what you mean with --range, once for each range, and nothing else is measured",
                );
            }
        }
        Some(text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn stretch(at: u64, size: u64, held: u64, kind: Kind) -> Stretch {
        let start = at << 40;
        Stretch { hvas: start..start + size * MIB, held_bytes: held * MIB, kind, parts: Vec::new() }
    }

    fn of_file(at: u64, size: u64, held: u64, inode: u64, from: u64) -> Stretch {
        let bytes = from * MIB..(from + size) * MIB;
        let part = FilePart { file: ("00:1".into(), inode), bytes };
        Stretch { parts: vec![part], ..stretch(at, size, held, Kind::Memory) }
    }

    /// Which are taken, by their places; and why the others are not.
    fn choice(stretches: &[Stretch]) -> (Vec<u64>, Vec<(u64, Reason)>) {
        let choice = Choice::of(stretches.to_vec());
        let at = |stretch: &Stretch| stretch.hvas.start >> 40;
        (
            choice.taken.iter().map(at).collect(),
            choice.left_out.iter().map(|(stretch, reason)| (at(stretch), *reason)).collect(),
        )
    }

    #[test]
    fn a_reservation_does_not_hide_ram() {
        for reserved in [2 << 10, 1 << 20] {
            let all = [stretch(1, reserved, 0, Kind::Anonymous), stretch(2, 64, 3, Kind::Anonymous)];
            assert_eq!(choice(&all), (vec![2], vec![(1, Reason::Untouched)]));
        }
        // Nor one of which a page is used.
        let mut all = [stretch(1, 1 << 20, 0, Kind::Anonymous), stretch(2, 64, 60, Kind::Anonymous)];
        all[0].held_bytes = 4096;
        assert_eq!(choice(&all), (vec![2], vec![(1, Reason::Small)]));
    }

    #[test]
    fn a_framebuffer_is_distinguished_from_ram_of_another_kind() {
        for kind in [Kind::Memory, Kind::File] {
            let all = [stretch(1, 256, 100, kind), stretch(2, 16, 16, Kind::Anonymous)];
            assert_eq!(choice(&all), (vec![1], vec![(2, Reason::Small)]));
        }
        // Of the same kind it cannot be; and RAM may be of two kinds.
        let all = [stretch(1, 256, 100, Kind::Anonymous), stretch(2, 16, 16, Kind::Anonymous)];
        assert_eq!(choice(&all).0, [1, 2]);
        let all = [stretch(1, 256, 100, Kind::Anonymous), stretch(2, 256, 200, Kind::Memory)];
        assert_eq!(choice(&all).0, [1, 2]);
    }

    #[test]
    fn a_kernel_that_is_mapped_is_distinguished_from_a_restored_guests_ram() {
        // QEMU with a vmlinux, before and after its guest has used much.
        for held in [20, 80] {
            let all = [stretch(1, 54, 48, Kind::File), stretch(2, 192, held, Kind::Anonymous)];
            assert_eq!(choice(&all), (vec![2], vec![(1, Reason::File)]));
        }
        let restored = [stretch(1, 256, 20, Kind::File), stretch(2, 16, 16, Kind::Anonymous)];
        assert_eq!(choice(&restored).0, [1, 2]);
        let reserved = [stretch(1, 256, 20, Kind::File), stretch(2, 1 << 20, 1, Kind::Anonymous)];
        assert_eq!(choice(&reserved).0, [1]);
    }

    #[test]
    fn one_file_is_one_ram_and_its_pages_count_once() {
        let all = [of_file(1, 3072, 2000, 7, 0), of_file(2, 1024, 2, 7, 3072), of_file(3, 4096, 1500, 7, 0)];
        assert_eq!(choice(&all), (vec![1, 2], vec![(3, Reason::Again)]));
        let others = [of_file(1, 3072, 2000, 7, 0), of_file(2, 1024, 2, 8, 0)];
        assert_eq!(choice(&others), (vec![1], vec![(2, Reason::Small)]));
    }

    #[test]
    fn what_is_large_and_no_ram_is_listed() {
        let code = Kind::Other("executable");
        let all = [stretch(1, 64, 20, Kind::Anonymous), stretch(2, 1024, 300, code), stretch(3, 64, 2, code)];
        assert_eq!(choice(&all), (vec![1], vec![(2, Reason::Kind)]));
        let note = Choice::of(all.to_vec()).note(7).unwrap();
        for words in [
            "20.0 MiB taken for guest memory",
            "300.0 MiB",
            "--range 7:20000000000-20040000000 (300.0 of 1024.0 MiB",
        ] {
            assert!(note.contains(words), "{note}");
        }
        assert_eq!(Choice::of(all[..1].to_vec()).note(7), None);
    }

    #[test]
    fn what_was_not_named_is_listed() {
        let all = vec![stretch(1, 64, 20, Kind::Anonymous), stretch(2, 64, 60, Kind::Anonymous)];
        let named = (1 << 40)..(1 << 40) + 4096;
        let choice = Choice::named(all, std::slice::from_ref(&named));
        assert_eq!(choice.left_out.iter().map(|(_, reason)| *reason).collect::<Vec<_>>(), [Reason::NotNamed]);
    }
}
