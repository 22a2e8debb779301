//! When merging has settled.

use super::Progress;

/// Merging has settled when this many full passes brought nothing new: the first pass after a
/// change only remembers what it saw.
const SETTLED_PASSES: u64 = 3;

/// Follows an engine until it has settled. The one definition, for users, experiments and benches.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Settling {
    most_pages: u64,
    passes_then: u64,
}

impl Settling {
    /// The engine is so far now. Whether more is merged than ever before.
    pub fn saw(&mut self, progress: &Progress) -> bool {
        let more = progress.merged_pages > self.most_pages;
        if more {
            *self = Self { most_pages: progress.merged_pages, passes_then: progress.full_passes };
        }
        more
    }

    /// Whether nothing new can be expected from `progress` on, which was the last one seen.
    pub fn is_over(&self, progress: &Progress) -> bool {
        progress.full_passes >= self.passes_then.saturating_add(SETTLED_PASSES)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_over_when_passes_bring_nothing_new() {
        let mut settling = Settling::default();
        let mut saw = |merged_pages, full_passes| {
            let progress = Progress { merged_pages, full_passes, ..Progress::default() };
            (settling.saw(&progress), settling.is_over(&progress))
        };
        assert_eq!(saw(0, 2), (false, false));
        assert_eq!(saw(10, 2), (true, false));
        assert_eq!(saw(9, 4), (false, false));
        assert_eq!(saw(11, 4), (true, false));
        assert_eq!(saw(11, 7), (false, true));
        assert_eq!(saw(12, 8), (true, false));
    }
}
