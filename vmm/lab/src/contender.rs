//! The engines that experiments and benches compare, with their settings.

use std::fmt;

use serde::{Deserialize, Serialize};

use fleet::HostError;
use fleet::runtime::FleetDir;
use fleet::spec::EngineName;
use memory::userfault;
use merge::Engine;
use merge::ksm::{self, Availability, Ksm, KsmSettings};
use merge::off::Off;
use merge::slab::engine::{SlabEngine, Tuning};

/// Processor time that the frugal slab engine may take, in percent of one processor.
const FRUGAL_PERCENT: u16 = 10;

/// An engine with its settings.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Contender {
    /// Nothing merges: the baseline
    #[serde(rename = "off")]
    Off,
    /// Samepage's own engine
    #[serde(rename = "slab")]
    Slab,
    /// The same, with at most 10 % of one processor
    #[serde(rename = "slab-10")]
    SlabFrugal,
    /// KSM at 20000 pages, 10 ms, as fleets set it
    #[serde(rename = "ksm")]
    Ksm,
    /// KSM as the kernel starts with: 100 pages, 20 ms, smart scan
    #[serde(rename = "ksm-default")]
    KsmDefault,
    /// KSM led by the kernel's scan-time advisor, smart scan
    #[serde(rename = "ksm-advisor")]
    KsmAdvisor,
}

impl Contender {
    pub const ALL: [Self; 6] =
        [Self::Off, Self::Slab, Self::SlabFrugal, Self::Ksm, Self::KsmDefault, Self::KsmAdvisor];

    /// As in plans, on the command line and in results.
    pub fn name(self) -> &'static str {
        match self {
            Self::Off => "off",
            Self::Slab => "slab",
            Self::SlabFrugal => "slab-10",
            Self::Ksm => "ksm",
            Self::KsmDefault => "ksm-default",
            Self::KsmAdvisor => "ksm-advisor",
        }
    }

    /// The one of this name.
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|contender| contender.name() == name)
    }

    /// Whether it is KSM.
    pub fn is_ksm(self) -> bool {
        self.kind() == EngineName::Ksm
    }

    /// Its engine.
    pub fn kind(self) -> EngineName {
        match self {
            Self::Off => EngineName::Off,
            Self::Slab | Self::SlabFrugal => EngineName::Slab,
            Self::Ksm | Self::KsmDefault | Self::KsmAdvisor => EngineName::Ksm,
        }
    }

    /// The engine, for the fleet in `dir`.
    ///
    /// # Errors
    /// The directory's path is too long for a socket.
    pub fn engine(self, dir: &FleetDir) -> Result<Box<dyn Engine>, HostError> {
        let slab = |tuning: Tuning| -> Result<Box<dyn Engine>, HostError> {
            Ok(Box::new(SlabEngine::for_members(dir.merge_socket()?, &tuning)))
        };
        match self {
            Self::Off => Ok(Box::new(Off)),
            Self::Slab => slab(Tuning::default()),
            Self::SlabFrugal => slab(Tuning { cpu_percent: Some(FRUGAL_PERCENT), ..Tuning::default() }),
            Self::Ksm => Ok(Box::new(Ksm::new(KsmSettings::fast()))),
            Self::KsmDefault => Ok(Box::new(Ksm::new(KsmSettings::kernel_default()))),
            Self::KsmAdvisor => Ok(Box::new(Ksm::new(KsmSettings::advisor()))),
        }
    }

    /// Why it is not available to this user on this host; None if it is. KSM with the host's own
    /// settings would be another contender, so it takes the right to set KSM.
    pub fn missing(self) -> Option<String> {
        match self.kind() {
            EngineName::Off => None,
            EngineName::Slab => {
                userfault::can_freeze().err().map(|e| format!("userfaultfd is not available ({e})"))
            }
            EngineName::Ksm => match ksm::available() {
                Availability::Full => None,
                Availability::Missing => Some("this kernel has no KSM".into()),
                Availability::AsItIs | Availability::Stopped => Some("only root may set KSM".into()),
            },
        }
    }
}

impl fmt::Display for Contender {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_lead_back() {
        for contender in Contender::ALL {
            assert_eq!(Contender::named(contender.name()), Some(contender));
            // As plans write them.
            let json = serde_json::to_value(contender).unwrap();
            assert_eq!(json, contender.name());
        }
        assert_eq!(Contender::named("ksm-slow"), None);
    }
}
