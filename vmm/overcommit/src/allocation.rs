//! How memory is divided: by shares, with a tax on idle memory (min-funding revocation of ESX,
//! Waldspurger 2002, section 5).
//!
//! A guest of shares `S` that uses `A` pages and is left `P` pays `A + k (P - A)` for them, with `k
//! = 1 / (1 - tax)`: an idle page costs `k` times as much as one that is used. A level `L` is
//! sought at which each guest pays `S / L`, each kept between its least and its most, and all
//! together take what there is.
//!
//! What is divided are frames, and what a guest is left are pages. A page that it has costs what
//! its pages cost on the average, `phi`, which sharing makes less than one; a page that it might
//! yet touch costs a whole frame, as it may not be shared.

use super::view::GuestView;

/// Bisections of the level. Each halves it, and a page is found among 2^60.
const BISECTIONS: usize = 60;

/// One guest in the division.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Claim {
    /// Its weight; more than 0.
    pub weight: f64,
    /// Pages that it uses.
    pub active_pages: f64,
    /// Pages that it has.
    pub held_pages: f64,
    /// Frames that each of them takes; 0 to 1.
    pub frames_per_page: f64,
    /// The least it is left, in pages.
    pub least_pages: f64,
    /// The most, in pages.
    pub most_pages: f64,
}

impl Claim {
    /// The claim of a guest that uses `active_pages`.
    pub fn of(guest: &GuestView, active_pages: u64) -> Self {
        let held = guest.held_pages() as f64;
        Self {
            weight: guest.weight(),
            active_pages: active_pages.min(guest.promised_pages) as f64,
            held_pages: held,
            frames_per_page: if held > 0.0 { guest.held_frames() / held } else { 1.0 },
            least_pages: guest.floor_pages() as f64,
            most_pages: guest.ceiling_pages() as f64,
        }
    }

    /// Pages that it is left when each guest pays `pay` for a share, and an idle page costs
    /// `idle_cost`.
    fn pages_for(&self, pay: f64, idle_cost: f64) -> f64 {
        let pays = self.weight * pay;
        let idle = (pays - self.active_pages).max(0.0);
        (pays.min(self.active_pages) + idle / idle_cost).clamp(self.least_pages, self.most_pages)
    }

    /// The price of a share at which it has its most.
    fn pay_for_most(&self, idle_cost: f64) -> f64 {
        let idle = (self.most_pages - self.active_pages).max(0.0);
        (self.most_pages.min(self.active_pages) + idle * idle_cost) / self.weight
    }

    /// Frames that `pages` pages of it take.
    pub fn frames(&self, pages: f64) -> f64 {
        let held = pages.min(self.held_pages);
        held * self.frames_per_page + (pages - held)
    }
}

/// How it was divided.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Division {
    /// Pages that each is left, in the order of the claims.
    pub pages: Vec<u64>,
    /// Frames by which the minimums alone exceed what there is; 0 if they fit. If not, each guest
    /// is left its minimum.
    pub missing_frames: u64,
}

/// Divides `frames` among the claims; `idle_tax` is from 0 to below 1.
pub fn divide(claims: &[Claim], frames: f64, idle_tax: f64) -> Division {
    let idle_cost = 1.0 / (1.0 - idle_tax.clamp(0.0, 0.99));
    let all_take = |pay: f64| claims.iter().map(|c| c.frames(c.pages_for(pay, idle_cost))).sum::<f64>();
    let least: f64 = claims.iter().map(|c| c.frames(c.least_pages)).sum();
    // Rounded down, so that all together never take more than there is.
    let at = |pay: f64| claims.iter().map(|c| c.pages_for(pay, idle_cost).floor() as u64).collect();
    if least > frames.max(0.0) {
        return Division { pages: at(0.0), missing_frames: (least - frames.max(0.0)).ceil() as u64 };
    }
    let mut high = claims.iter().map(|c| c.pay_for_most(idle_cost)).fold(0.0, f64::max);
    if all_take(high) <= frames {
        return Division { pages: at(high), missing_frames: 0 };
    }
    let mut low = 0.0;
    for _ in 0..BISECTIONS {
        let middle = f64::midpoint(low, high);
        // Pages are whole: once no guest's share of the gap is a tenth of one, it is found.
        if high - low < 1e-9 * high {
            break;
        }
        if all_take(middle) <= frames { low = middle } else { high = middle }
    }
    Division { pages: at(low), missing_frames: 0 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn claim(weight: f64, active: f64, most: f64) -> Claim {
        Claim {
            weight,
            active_pages: active,
            held_pages: most,
            frames_per_page: 1.0,
            least_pages: 0.0,
            most_pages: most,
        }
    }

    /// Rounding down may take a page.
    #[track_caller]
    fn assert_about(claims: &[Claim], frames: f64, idle_tax: f64, expected: &[u64]) {
        let pages = divide(claims, frames, idle_tax).pages;
        assert!(pages.iter().zip(expected).all(|(a, b)| a.abs_diff(*b) <= 1), "{pages:?}, not {expected:?}");
    }

    #[test]
    fn without_a_tax_it_goes_by_shares() {
        assert_about(&[claim(1.0, 0.0, 1000.0), claim(3.0, 1000.0, 1000.0)], 800.0, 0.0, &[200, 600]);
    }

    /// The experiment of ESX: two guests of equal shares, and memory for 1.4 of them.
    #[test]
    fn with_a_tax_the_idle_one_pays() {
        let claims = [claim(1.0, 0.0, 1000.0), claim(1.0, 1000.0, 1000.0)];
        assert_about(&claims, 1400.0, 0.0, &[700, 700]);
        // The busy one has all of its 1000 before the level at which the idle one would have 500.
        assert_about(&claims, 1400.0, 0.75, &[400, 1000]);
        assert_about(&claims, 1000.0, 0.75, &[200, 800]);
    }

    #[test]
    fn shared_pages_cost_less() {
        let shared = Claim { frames_per_page: 0.5, ..claim(1.0, 1000.0, 1000.0) };
        assert_about(&[shared], 300.0, 0.75, &[600]);
        // A page that it has not touched costs a frame.
        assert_about(&[Claim { held_pages: 200.0, ..shared }], 300.0, 0.75, &[400]);
    }

    #[test]
    fn minimums_that_do_not_fit_are_said() {
        let claims = [Claim { least_pages: 300.0, ..claim(1.0, 0.0, 1000.0) }; 2];
        let division = divide(&claims, 500.0, 0.5);
        assert_eq!((division.pages, division.missing_frames), (vec![300, 300], 100));
        assert_eq!(divide(&claims, f64::NAN, 0.5).missing_frames, 600);
        assert_eq!(divide(&[], 500.0, 0.5), Division::default());
    }

    prop_compose! {
        fn any_claim()(
            weight in 1_u32..5000, most in 0_u64..1_000_000, active in 0.0..1.0_f64, held in 0.0..1.0_f64,
            least in 0.0..1.0_f64, frames_per_page in 0.0..1.0_f64,
        ) -> Claim {
            let part = |of: f64| (most as f64 * of).floor();
            Claim {
                weight: f64::from(weight), active_pages: part(active), held_pages: part(held), frames_per_page,
                least_pages: part(least), most_pages: most as f64,
            }
        }
    }

    proptest! {
        #[test]
        fn no_claim_is_below_its_least_and_all_fit(
            claims in prop::collection::vec(any_claim(), 0..12), frames in 0.0..5e6_f64, tax in 0.0..0.99_f64,
        ) {
            let division = divide(&claims, frames, tax);
            let mut taken = 0.0;
            for (claim, &pages) in claims.iter().zip(&division.pages) {
                prop_assert!(pages as f64 >= claim.least_pages && pages as f64 <= claim.most_pages);
                taken += claim.frames(pages as f64);
            }
            let least: f64 = claims.iter().map(|c| c.frames(c.least_pages)).sum();
            if least <= frames {
                prop_assert_eq!(division.missing_frames, 0);
                prop_assert!(taken <= frames + 1e-6, "{} of {}", taken, frames);
                // Nothing is left over, but for the rounding of each.
                let most: f64 = claims.iter().map(|c| c.frames(c.most_pages)).sum();
                prop_assert!(taken >= frames.min(most) - 1.5 * claims.len() as f64 - 1e-3, "{} of {}", taken, frames);
            } else {
                prop_assert!((division.missing_frames as f64 - (least - frames)).abs() <= 1.0);
            }
        }

        #[test]
        fn more_shares_never_mean_less(
            claims in prop::collection::vec(any_claim(), 1..8), frames in 0.0..5e6_f64, tax in 0.0..0.99_f64, times in 1.0..10.0_f64,
        ) {
            let before = divide(&claims, frames, tax);
            let mut richer = claims.clone();
            richer[0].weight *= times;
            let after = divide(&richer, frames, tax);
            prop_assert!(after.pages[0] + 1 >= before.pages[0]);
            for (a, b) in after.pages.iter().zip(&before.pages).skip(1) {
                prop_assert!(*a <= b + 1);
            }
        }

        /// Of two guests that differ only in what they use, the busier one has at least what the
        /// other has, or its maximum.
        #[test]
        fn the_idle_never_starve_the_busy(
            claim in any_claim(), more in 0.0..1.0_f64, others in prop::collection::vec(any_claim(), 0..6),
            frames in 0.0..5e6_f64, tax in 0.0..0.99_f64,
        ) {
            let busy = Claim { active_pages: claim.active_pages + more * (claim.most_pages - claim.active_pages), ..claim };
            let claims: Vec<_> = [claim, busy].into_iter().chain(others).collect();
            let division = divide(&claims, frames, tax);
            prop_assert!(division.pages[1] + 1 >= division.pages[0]);
        }
    }
}
