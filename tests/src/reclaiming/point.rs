//! What is taken from a guest, what it works on then, and in which way it is taken.

/// Pages of a MiB.
pub const MIB_PAGES: u64 = 256;
/// What the built-in guest needs for itself, with some to spare, in pages.
const GUEST_OVERHEAD_PAGES: u64 = 4 * MIB_PAGES;

/// How a guest comes to what it is left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// Started with this much memory: the control.
    Sized,
    /// It frees what is beyond its working set, and its balloon takes of that.
    Balloon,
    /// It knows of nothing; the host pushes pages out to swap.
    Swap,
    /// It frees half of what is beyond its working set, its balloon takes up to half of what is to
    /// go, and swap the rest.
    Both,
}

impl Way {
    /// All of them, the control first.
    pub const ALL: [Self; 4] = [Self::Sized, Self::Balloon, Self::Swap, Self::Both];

    /// In tables and in JSON.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Sized => "control",
            Self::Balloon => "balloon",
            Self::Swap => "swap",
            Self::Both => "both",
        }
    }

    /// Whether the host pushes pages out.
    #[must_use]
    pub const fn swaps(self) -> bool {
        matches!(self, Self::Swap | Self::Both)
    }
}

/// One setting of the bench.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Point {
    /// RAM of the guest, in MiB.
    pub memory_mib: u64,
    /// Percent of it that is taken.
    pub reclaim_percent: u64,
    /// What the guest works on, in percent of what it is left.
    pub working_set_percent: u64,
}

impl Point {
    /// What the guest is left, in MiB.
    #[must_use]
    pub const fn left_mib(&self) -> u64 {
        self.memory_mib * (100 - self.reclaim_percent) / 100
    }

    /// What is to be taken, in pages.
    #[must_use]
    pub const fn reclaim_pages(&self) -> u64 {
        (self.memory_mib - self.left_mib()) * MIB_PAGES
    }

    /// The guest's working set in percent of the `pages` that it can fill: at least 1, at most 100.
    #[must_use]
    pub fn common_percent(&self, pages: u64) -> u64 {
        let working_set = self.left_mib() * MIB_PAGES * self.working_set_percent / 100;
        (working_set * 100).div_ceil(pages.max(1)).clamp(1, 100)
    }

    /// RAM of the control, in MiB: that which the others are left with, or more if its working set
    /// needs it: it must do the same work.
    #[must_use]
    pub fn control_mib(&self, working_set_pages: u64) -> u64 {
        self.left_mib().max((working_set_pages + GUEST_OVERHEAD_PAGES).div_ceil(MIB_PAGES))
    }
}

/// A fill with the working set as pages of class `common` and about `cold_pages` others, never
/// accessed again, of at most `most` in all: pages in all, and the percentage that is common.
#[must_use]
pub fn mix(working_set_pages: u64, cold_pages: u64, most: u64) -> (u64, u64) {
    let held = (working_set_pages + cold_pages).clamp(1, most.max(1));
    // Rounded down, so that there is a number of pages in all of which the working set is just this
    // percentage; of too few, up.
    let percent = (working_set_pages * 100 / held).clamp(1, 100);
    match (working_set_pages * 100).div_ceil(percent) {
        pages if pages <= most => (pages, percent),
        _ => (most, (percent + 1).min(100)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const QUARTER: Point = Point { memory_mib: 256, reclaim_percent: 75, working_set_percent: 50 };

    #[test]
    fn what_is_left_and_what_goes_is_all() {
        assert_eq!((QUARTER.left_mib(), QUARTER.reclaim_pages()), (64, 192 * MIB_PAGES));
        assert_eq!(QUARTER.common_percent(256 * MIB_PAGES), 13, "32 of 256 MiB, rounded up");
    }

    #[test]
    fn the_control_is_as_large_as_the_others_where_its_work_fits() {
        assert_eq!(QUARTER.control_mib(32 * MIB_PAGES), 64);
        assert_eq!(QUARTER.control_mib(77 * MIB_PAGES), 81);
    }

    #[test]
    fn a_mix_holds_the_working_set() {
        for (working_set, cold, most) in
            [(8000, 20_000, 65_000), (57_000, 3000, 65_000), (64_900, 50, 65_000)]
        {
            let (pages, percent) = mix(working_set, cold, most);
            let held = pages * percent / 100;
            assert!(held.abs_diff(working_set) <= 1 || pages == most, "{pages} pages, {percent} %");
            assert!((working_set..=most).contains(&pages), "{pages} pages");
            // A percent too little of the working set is this many pages too much.
            assert!(pages - held <= cold + pages / percent + 1, "{pages} pages, {percent} %");
        }
        assert_eq!(mix(1000, 0, 65_000), (1000, 100));
    }
}
