//! The use of frames by a guest's kernel, as runs of frames of one type.

use core::fmt;

use super::ParseError;
use super::fields::{Fields, bad, number};
use crate::page_type::PageType;

/// Runs in one reply.
pub const MAX_RUNS: usize = 32;

/// Frames in one run; more of them are several runs. With this a reply always fits in a line.
const MAX_RUN_FRAMES: u32 = 99_999;

/// Runs of frames, one after the other, written as a letter for the type and, unless it is 1, a
/// number: `k159fs2`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FrameRuns {
    types: [PageType; MAX_RUNS],
    counts: [u32; MAX_RUNS],
    len: u8,
}

impl FrameRuns {
    pub const fn new() -> Self {
        Self { types: [PageType::Hole; MAX_RUNS], counts: [0; MAX_RUNS], len: 0 }
    }

    /// Appends a frame. False if there is no room for it.
    pub fn push(&mut self, kind: PageType) -> bool {
        let len = usize::from(self.len);
        if let Some(last) = len.checked_sub(1)
            && self.types[last] == kind
            && self.counts[last] < MAX_RUN_FRAMES
        {
            self.counts[last] += 1;
            return true;
        }
        self.push_run(kind, 1)
    }

    fn push_run(&mut self, kind: PageType, frames: u32) -> bool {
        let len = usize::from(self.len);
        if len == MAX_RUNS {
            return false;
        }
        self.types[len] = kind;
        self.counts[len] = frames;
        self.len += 1;
        true
    }

    /// Type and length of each run.
    pub fn iter(&self) -> impl Iterator<Item = (PageType, u32)> {
        self.types.into_iter().zip(self.counts).take(usize::from(self.len))
    }

    /// Frames in all runs.
    pub fn frames(&self) -> u64 {
        self.iter().map(|(_, frames)| u64::from(frames)).sum()
    }

    fn parse(text: &str) -> Result<Self, ParseError> {
        let mut runs = Self::new();
        for run in frame_runs(text) {
            let (kind, frames) = run?;
            if frames > MAX_RUN_FRAMES || !runs.push_run(kind, frames) {
                return Err(bad("runs", text, "at most 32 runs of at most 99999 frames each"));
            }
        }
        Ok(runs)
    }
}

impl Default for FrameRuns {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Display for FrameRuns {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (kind, frames) in self.iter() {
            write!(f, "{}", kind.letter())?;
            if frames != 1 {
                write!(f, "{frames}")?;
            }
        }
        Ok(())
    }
}

/// Type and length of each run in a text in the format of [`FrameRuns`], of any length. Stops after
/// the first one that is not understood.
pub fn frame_runs(text: &str) -> impl Iterator<Item = Result<(PageType, u32), ParseError>> {
    let mut rest = text;
    core::iter::from_fn(move || {
        let letter = rest.chars().next()?;
        let after = &rest[letter.len_utf8()..];
        let digits = after.bytes().take_while(u8::is_ascii_digit).count();
        let frames = match &after[..digits] {
            "" => Some(1),
            digits => number(digits).and_then(|n| u32::try_from(n).ok()).filter(|n| *n > 0),
        };
        let run = PageType::from_letter(letter).zip(frames);
        let here = rest;
        rest = if run.is_some() { &after[digits..] } else { "" };
        Some(
            run.ok_or_else(|| bad("runs", here, "runs of frames: a letter of f s t a c o k h, and a number")),
        )
    })
}

/// The content of an `ok command=frames` line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Frames {
    /// The first frame not reported. Equal to the one asked for if there are no more.
    pub next: u64,
    /// The frames before it, from the one that was asked for.
    pub runs: FrameRuns,
}

impl Frames {
    /// Parses the words after `command=frames`.
    pub(super) fn parse(rest: &str) -> Result<Self, ParseError> {
        let fields = Fields::parse(rest, ["next", "runs"], "next, runs")?;
        Ok(Self { next: fields.number(0)?, runs: FrameRuns::parse(fields.text(1)?.1)? })
    }
}

impl fmt::Display for Frames {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "next={} runs={}", self.next, self.runs)
    }
}

#[cfg(test)]
mod tests {
    use std::string::ToString;
    use std::vec::Vec;

    use super::*;

    #[test]
    fn frames_of_one_type_are_one_run() {
        let mut runs = FrameRuns::new();
        for letter in "kkkfsskk".chars() {
            assert!(runs.push(PageType::from_letter(letter).unwrap()));
        }
        assert_eq!((runs.to_string().as_str(), runs.frames()), ("k3fs2k2", 8));
        for _ in 0..2 * MAX_RUN_FRAMES {
            assert!(runs.push(PageType::Hole));
        }
        assert_eq!(runs.to_string(), "k3fs2k2h99999h99999");
    }

    #[test]
    fn what_does_not_fit_is_left_out() {
        let mut runs = FrameRuns::new();
        let types = [PageType::Free, PageType::Slab].into_iter().cycle();
        assert_eq!(types.take(100).take_while(|kind| runs.push(*kind)).count(), MAX_RUNS);
        assert_eq!(runs.frames(), MAX_RUNS as u64);
        assert!(runs.push(PageType::Slab), "the last run may grow");
    }

    #[test]
    fn rubbish_ends_the_runs() {
        let good: Vec<_> = frame_runs("k2fx3f").collect();
        assert_eq!(good[..2], [Ok((PageType::Kernel, 2)), Ok((PageType::Free, 1))]);
        assert!(good.len() == 3 && good[2].is_err(), "{good:?}");
        for rubbish in ["3", "f0", "k99999999999", "f-1", "\u{e9}", "f 1"] {
            assert!(frame_runs(rubbish).any(|run| run.is_err()), "{rubbish}");
        }
        assert!(FrameRuns::parse("f100000").is_err() && FrameRuns::parse(&"fk".repeat(17)).is_err());
    }
}
