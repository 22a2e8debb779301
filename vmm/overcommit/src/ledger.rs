//! The ledger: every page of every guest in exactly one class, the host's overhead, debt and cover.
//!
//! Savings are a loan. *Debt* is the number of frames that would be needed at once if every shared
//! page were written (*sharing debt*) and every promised page without a frame were touched (*demand
//! debt*). *Cover* is what could pay: free memory, swap, and what balloons would bring for certain.
//! What a balloon holds is neither promised nor owed.

use serde::{Deserialize, Serialize};

/// A guest's pages by class. Their sum is what it was promised, always.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Classes {
    /// Never touched, or given back, and not in the balloon.
    pub absent: u64,
    /// Of the image that the guest went on from, and not touched yet: a frame is there, and may be shared by all.
    #[serde(default)]
    pub image: u64,
    /// In the balloon, and without a frame.
    pub ballooned: u64,
    /// On the zero page.
    pub zero: u64,
    /// Alone on their frame.
    pub private: u64,
    /// On a frame with others.
    pub shared: u64,
    /// On swap.
    pub swapped: u64,
}

impl Classes {
    pub fn promised(&self) -> u64 {
        self.absent + self.image + self.ballooned + self.zero + self.private + self.shared + self.swapped
    }

    /// Pages on frames, the zero frame not counted.
    pub fn resident(&self) -> u64 {
        self.private + self.shared
    }

    fn add(&mut self, other: &Self) {
        self.absent += other.absent;
        self.image += other.image;
        self.ballooned += other.ballooned;
        self.zero += other.zero;
        self.private += other.private;
        self.shared += other.shared;
        self.swapped += other.swapped;
    }
}

/// Frames spent on a guest that are not its memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestOverhead {
    /// The VM process's own memory.
    pub vmm: u64,
    /// The page tables of the VM process. Those of the guest's second level are the kernel's: see
    /// [`HostOverhead`].
    pub page_tables: u64,
}

/// Frames spent on the fleet that belong to no guest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostOverhead {
    /// All VM processes' own memory.
    pub vmm: u64,
    /// All VM processes' page tables.
    pub page_tables: u64,
    /// The daemon: index, matchmaker, the program itself, which all VM processes share with it.
    pub daemon: u64,
    /// Pages of slabs that no guest uses.
    pub dead_slabs: u64,
    /// Pages of slabs that images keep, and that no guest has in its page table.
    #[serde(default)]
    pub held_by_images: u64,
    /// Processes that stand by to become clones.
    #[serde(default)]
    pub pool: u64,
    /// What KSM stores about the pages it has seen: 64 bytes a page.
    pub ksm_metadata: u64,
    /// The second level's page tables of all VMs of the host (and its IOMMU), as the kernel counts
    /// them. They include other VMs', so they are reported but not added up.
    pub second_level_of_host: u64,
}

impl HostOverhead {
    /// The fleet's overhead besides guest memory.
    pub fn total(&self) -> u64 {
        let slabs = self.dead_slabs + self.held_by_images;
        self.vmm + self.page_tables + self.daemon + slabs + self.pool + self.ksm_metadata
    }
}

/// Frames that are owed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Debt {
    /// Frames needed if every shared or zero page, and every page of an image, were written.
    pub sharing: u64,
    /// Frames needed if every absent or swapped page were touched. What is in the balloon is not
    /// promised.
    pub demand: u64,
}

impl Debt {
    pub fn total(&self) -> u64 {
        self.sharing + self.demand
    }
}

/// What could pay the debt.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cover {
    /// Frames the fleet may still take.
    pub free: u64,
    /// Free swap.
    pub swap: u64,
    /// Frames that balloons would bring at the least: pages that are present, that their guests
    /// report as unused, above their minimums. None of a guest that does not run, does not answer,
    /// has no driver, or has not reported lately.
    pub balloon: u64,
}

impl Cover {
    pub fn total(&self) -> u64 {
        self.free + self.swap + self.balloon
    }

    /// Cover for each frame of debt. None without debt.
    pub fn ratio(&self, debt: &Debt) -> Option<f64> {
        let debt = debt.total();
        (debt > 0).then(|| self.total() as f64 / debt as f64)
    }
}

/// Measured numbers of a guest, before it is accounted for.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct GuestNumbers {
    pub name: String,
    /// Its pages, with those in the balloon among the absent ones.
    pub classes: Classes,
    /// Pages in its balloon that have no frame.
    pub balloon_absent: u64,
    /// Its part of the frames: a frame shared by n counts 1/n.
    pub frames: f64,
    /// Pages that its balloon could be asked for: what it reports that it could spare, if the
    /// report is not old and a driver runs that follows; 0 of one that is paused or does not
    /// answer.
    pub to_give: u64,
    /// Pages that no balloon may take.
    pub minimum: u64,
    /// Its overhead.
    pub overhead: GuestOverhead,
    /// How old the walk of its page table is; None if it was walked for this.
    pub walk_age_seconds: Option<f64>,
    /// Counters have changed since that walk.
    pub by_counters: bool,
}

/// Measured numbers of the host.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HostNumbers {
    /// What the fleet may use.
    pub capacity: u64,
    /// What the host could give without swapping, to any process.
    pub available: u64,
    pub swap_free: u64,
    /// Different frames under all guests' present pages, the zero frame not counted.
    pub frames: u64,
    /// What belongs to no guest; the guests' sums are filled in by [`Ledger::of`].
    pub overhead: HostOverhead,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Account {
    pub name: String,
    /// Pages promised.
    pub promised: u64,
    /// Its pages by class.
    #[serde(flatten)]
    pub classes: Classes,
    /// Pages on frames: private and shared.
    pub resident: u64,
    /// Its part of the frames.
    pub frames: f64,
    /// Pages on frames less its part of the frames: what sharing saves of it. Zeros are apart.
    pub saved: f64,
    /// Its overhead.
    pub overhead: GuestOverhead,
    /// Its debt.
    pub debt: Debt,
    /// Frames its balloon can still take.
    pub balloon_cover: u64,
    /// How old the walk of its page table is that its pages were counted by; None if it was walked
    /// for this.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub walk_age_seconds: Option<f64>,
    /// Counters have changed since that walk: the number of its pages with frames is by these, as
    /// they are now; which of them are shared, with how many others, and which are zeros is by that
    /// walk.
    #[serde(default)]
    pub by_counters: bool,
}

/// The accounts of a fleet and its host.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Ledger {
    pub guests: Vec<Account>,
    /// Pages promised to all.
    pub promised: u64,
    /// All guests' pages by class.
    #[serde(flatten)]
    pub classes: Classes,
    /// Pages on frames.
    pub resident: u64,
    /// Different frames under them.
    pub frames: u64,
    /// What sharing saves: pages on frames less the frames. Zeros are apart.
    pub saved: u64,
    /// The fleet's overhead.
    pub overhead: HostOverhead,
    /// What the fleet may use.
    pub capacity: u64,
    /// Frames and overhead.
    pub used: u64,
    pub debt: Debt,
    /// What could pay it.
    pub cover: Cover,
    /// Cover for each frame of debt; None without debt.
    pub cover_ratio: Option<f64>,
    /// Zero and shared pages are distinguished by estimate: this user may not see frame numbers.
    pub estimated: bool,
}

impl Ledger {
    /// The age of the oldest walk of a page table since which more has happened than counters show,
    /// in seconds; None if all is exact.
    pub fn oldest_split_seconds(&self) -> Option<f64> {
        let ages = self
            .guests
            .iter()
            .filter(|guest| guest.by_counters)
            .map(|guest| guest.walk_age_seconds.unwrap_or(0.0));
        ages.reduce(f64::max)
    }

    /// Adds everything up.
    pub fn of(guests: &[GuestNumbers], host: &HostNumbers, estimated: bool) -> Self {
        let mut ledger = Self {
            frames: host.frames,
            overhead: host.overhead,
            capacity: host.capacity,
            estimated,
            ..Self::default()
        };
        for guest in guests {
            let account = Account::of(guest);
            ledger.classes.add(&account.classes);
            ledger.overhead.vmm += account.overhead.vmm;
            ledger.overhead.page_tables += account.overhead.page_tables;
            ledger.debt.demand += account.debt.demand;
            ledger.cover.balloon += account.balloon_cover;
            ledger.guests.push(account);
        }
        ledger.promised = ledger.classes.promised();
        ledger.resident = ledger.classes.resident();
        ledger.saved = ledger.resident.saturating_sub(ledger.frames);
        // Of n pages on one frame, n - 1 need a new one: the sum over the guests' own would count
        // no page twice, but is of fractions.
        ledger.debt.sharing = ledger.saved + ledger.classes.zero + ledger.classes.image;
        ledger.used = ledger.frames + ledger.overhead.total();
        ledger.cover.free = host.capacity.saturating_sub(ledger.used).min(host.available);
        ledger.cover.swap = host.swap_free;
        ledger.cover_ratio = ledger.cover.ratio(&ledger.debt);
        ledger
    }
}

impl Account {
    fn of(guest: &GuestNumbers) -> Self {
        // The balloon is asked at another moment than the page table: it cannot hold more than is
        // absent.
        let ballooned = guest.balloon_absent.min(guest.classes.absent);
        let mut classes = guest.classes;
        classes.absent -= ballooned;
        classes.ballooned += ballooned;
        let (promised, resident) = (classes.promised(), classes.resident());
        let saved = (resident as f64 - guest.frames).max(0.0);
        let sharing = saved.round() as u64 + classes.zero + classes.image;
        let debt = Debt { sharing, demand: classes.absent + classes.swapped };
        // Below its minimum nothing may be taken; and it will not give what it reports that it
        // needs. It gives first what it has never used, which brings no frames; of the rest only
        // its own frames count.
        let above_minimum = (promised - classes.ballooned).saturating_sub(guest.minimum);
        let given = guest.to_give.min(above_minimum);
        let balloon_cover =
            given.saturating_sub(classes.absent + classes.image + classes.zero).min(classes.private);
        Self {
            name: guest.name.clone(),
            promised,
            classes,
            resident,
            frames: guest.frames,
            saved,
            overhead: guest.overhead,
            debt,
            balloon_cover,
            walk_age_seconds: guest.walk_age_seconds,
            by_counters: guest.by_counters,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn guest(classes: Classes, balloon_absent: u64, frames: f64) -> GuestNumbers {
        GuestNumbers { classes, balloon_absent, frames, to_give: u64::MAX, ..GuestNumbers::default() }
    }

    /// Two guests of 100 pages: each has 40 of its own and shares 30 with the other, one has a page
    /// of zeros.
    fn pair() -> Vec<GuestNumbers> {
        let classes = Classes { absent: 30, private: 40, shared: 30, ..Classes::default() };
        let with_zero = Classes { absent: 29, zero: 1, ..classes };
        vec![guest(classes, 10, 55.0), guest(with_zero, 0, 55.0)]
    }

    #[test]
    fn savings_are_owed_and_so_is_what_was_promised_and_not_touched() {
        let host = HostNumbers {
            capacity: 200,
            available: 500,
            swap_free: 7,
            frames: 110,
            ..HostNumbers::default()
        };
        let ledger = Ledger::of(&pair(), &host, false);
        assert_eq!((ledger.promised, ledger.resident, ledger.saved), (200, 140, 30));
        assert_eq!(ledger.classes.ballooned, 10);
        assert_eq!(ledger.debt, Debt { sharing: 31, demand: 49 });
        assert_eq!(ledger.cover, Cover { free: 90, swap: 7, balloon: 80 });
        assert_eq!(ledger.cover_ratio, Some(177.0 / 80.0));
    }

    #[test]
    fn what_the_host_has_not_covers_nothing() {
        let host = HostNumbers { capacity: 200, available: 5, frames: 110, ..HostNumbers::default() };
        assert_eq!(Ledger::of(&pair(), &host, false).cover.free, 5);
        let host = HostNumbers { capacity: 100, available: 5, frames: 110, ..HostNumbers::default() };
        assert_eq!(Ledger::of(&pair(), &host, false).cover.free, 0);
    }

    #[test]
    fn a_balloon_covers_what_is_there_and_not_used_and_above_the_minimum() {
        let [first, _] = <[_; 2]>::try_from(pair()).unwrap();
        let cover =
            |to_give, minimum| Account::of(&GuestNumbers { minimum, to_give, ..first.clone() }).balloon_cover;
        // Of 100 pages 10 are in the balloon and 20 are not there; 40 are its own.
        assert_eq!([cover(u64::MAX, 0), cover(90, 0), cover(50, 0), cover(27, 0)], [40, 40, 30, 7]);
        assert_eq!([cover(20, 0), cover(0, 0)], [0, 0], "what was never there brings nothing");
        assert_eq!([cover(90, 60), cover(90, 95)], [10, 0]);
    }

    #[test]
    fn how_old_the_split_is_counts_only_where_counters_have_moved() {
        let oldest = |guests: &[(Option<f64>, bool)]| {
            let guest = |&(walk_age_seconds, by_counters): &(Option<f64>, bool)| GuestNumbers {
                walk_age_seconds,
                by_counters,
                ..GuestNumbers::default()
            };
            let guests: Vec<GuestNumbers> = guests.iter().map(guest).collect();
            Ledger::of(&guests, &HostNumbers::default(), false).oldest_split_seconds()
        };
        assert_eq!(oldest(&[(None, false), (Some(90.0), false)]), None);
        assert_eq!(oldest(&[(Some(3.0), true), (Some(7.0), true), (Some(90.0), false)]), Some(7.0));
        // Readers of the JSON see it by guest.
        let account = Account { walk_age_seconds: Some(2.0), by_counters: true, ..Account::default() };
        let json = serde_json::to_value(&account).unwrap();
        assert_eq!(
            (json["walk_age_seconds"].as_f64(), json["by_counters"].as_bool()),
            (Some(2.0), Some(true))
        );
        assert!(!serde_json::to_string(&Account::default()).unwrap().contains("walk_age_seconds"));
    }

    #[test]
    fn nothing_owed_has_no_ratio() {
        let ledger =
            Ledger::of(&[], &HostNumbers { capacity: 5, available: 5, ..HostNumbers::default() }, false);
        assert_eq!((ledger.cover_ratio, ledger.cover.free), (None, 5));
    }

    proptest! {
        #[test]
        fn every_page_is_in_one_class_whatever_the_balloon_says(
            classes in proptest::array::uniform6(0u64..1 << 40),
            balloon_absent in any::<u64>(),
            minimum in any::<u64>(),
            frames in 0.0..1e12,
            to_give in prop_oneof![Just(0), 0u64..1 << 41, any::<u64>()],
        ) {
            let [absent, image, zero, private, shared, swapped] = classes;
            let classes = Classes { absent, image, ballooned: 0, zero, private, shared, swapped };
            let numbers = GuestNumbers { minimum, to_give, ..guest(classes, balloon_absent, frames) };
            let host = HostNumbers { capacity: 1 << 42, frames: frames as u64, ..HostNumbers::default() };
            let ledger = Ledger::of(&[numbers.clone(), numbers], &host, true);
            prop_assert_eq!(ledger.promised, 2 * classes.promised());
            prop_assert_eq!(ledger.classes.promised(), ledger.promised);
            for account in &ledger.guests {
                prop_assert_eq!(account.promised, account.classes.promised());
                prop_assert!(account.balloon_cover <= account.classes.private);
                // With all of it taken, nothing is used that was promised, and the minimum is left.
                let left = account.promised - account.classes.ballooned;
                prop_assert!(account.balloon_cover == 0 || account.balloon_cover + account.classes.absent <= to_give);
                prop_assert!(account.balloon_cover == 0 || left - account.balloon_cover >= minimum);
                prop_assert!(account.saved >= 0.0);
            }
            prop_assert!(ledger.debt.total() <= ledger.promised);
        }
    }
}
