//! What a guest fills its memory with.

use guest::protocol::{Fill, Mix};
use serde::{Deserialize, Serialize};

/// Percentages of each class of page that a guest fills its memory with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, expecting = "percentages such as { common = 50, unique = 50 }")]
pub struct FillSpec {
    /// Zeros.
    #[serde(default)]
    pub zero: u8,
    /// The same in all guests of the fleet.
    #[serde(default)]
    pub common: u8,
    /// Four times in the same guest.
    #[serde(default)]
    pub duplicate: u8,
    /// Nowhere else.
    #[serde(default)]
    pub unique: u8,
    /// How many pages; all the guest can spare unless said.
    #[serde(default)]
    pub pages: Option<u64>,
}

impl FillSpec {
    /// As the command for guest number `n`.
    pub fn command(&self, n: usize) -> Option<Fill> {
        let mix = Mix::new(self.zero, self.common, self.duplicate, self.unique).ok()?;
        // The seeds only have to differ: between guests, and from the one they have in common.
        Some(Fill { seed: 1000 + n as u64, common: 7, mix, pages: self.pages })
    }

    /// What the percentages make together.
    pub fn sum(&self) -> u32 {
        [self.zero, self.common, self.duplicate, self.unique].map(u32::from).iter().sum()
    }
}
