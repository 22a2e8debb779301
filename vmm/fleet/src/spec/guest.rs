//! A guest of a fleet.

use guest::protocol::{Fill, Mix};
use machine::VmConfig;
use serde::{Deserialize, Serialize};

use super::interface::NetSpec;
use super::reservation::Reservation;

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

/// What a guest's balloon can do, besides being inflated and deflated.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, expecting = "keys such as { deflate_on_oom = true }")]
pub struct BalloonSpec {
    /// The guest may take pages back when it runs out of memory.
    #[serde(default)]
    pub deflate_on_oom: bool,
    /// The guest reports pages as it frees them, and they go back to the host.
    #[serde(default)]
    pub free_page_reporting: bool,
}

/// One guest.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct GuestSpec {
    /// Its name, unique in the fleet.
    pub name: String,
    /// Its trust domain: pages are never shared with a guest of another one.
    pub domain: String,
    /// Its VM, as far as a fleet file describes it: sockets, and what the engine and the governor
    /// need, are added when it is started.
    pub vm: VmConfig,
    /// How long it may take until it is ready; None is the default of its kind of guest.
    pub ready_seconds: Option<u32>,
    /// What it is promised when memory is short.
    #[serde(rename = "standing")]
    pub reservation: Reservation,
    /// What it fills its memory with once it is ready.
    pub fill: Option<FillSpec>,
    /// Its network interfaces as the file gives them, by which those of its clones are made.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub net: Vec<NetSpec>,
    /// The guest or snapshot that it went on from; None of one that booted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub clone_of: Option<String>,
}

impl GuestSpec {
    /// One that is promised what is usual for its memory, and is filled with nothing.
    pub fn new(name: String, domain: String, vm: VmConfig) -> Self {
        let (vm, reservation) =
            (VmConfig { name: name.clone(), ..vm.clone() }, Reservation::usual(vm.memory_bytes));
        Self {
            name,
            domain,
            vm,
            ready_seconds: None,
            reservation,
            fill: None,
            net: Vec::new(),
            clone_of: None,
        }
    }
}
