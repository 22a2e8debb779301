//! What a decision asks for, and why.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::mib::Mib;

/// One thing to do. `guest` is the index into the guests that [`step`](super::policy::step) was
/// given.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "do")]
pub enum Action {
    /// Have engines merge at urgent priority, or at normal priority again.
    SetPriority { urgent: bool },
    /// Let go of images that have no name, and of processes that stand by for clones. What guests use of images stays as long as they do.
    DropImages {
        /// Pages of these processes, and of slabs that nothing else keeps.
        pages: u64,
    },
    /// Ask a guest for another balloon size.
    Balloon { guest: usize, target_pages: u64 },
    /// Limit how fast a guest touches pages for the first time.
    Throttle {
        guest: usize,
        /// Never 0; None lifts the limit.
        pages_per_second: Option<u64>,
    },
    /// Write a guest's coldest pages to swap.
    PageOut {
        guest: usize,
        /// At most this many.
        pages: u64,
    },
    /// Stop a guest's vCPUs; it keeps its memory.
    Suspend { guest: usize, reason: Reason },
    /// Let a suspended guest run again.
    Resume { guest: usize },
    /// End a guest; its memory is saved first where that is possible.
    Stop { guest: usize, reason: Reason },
}

impl Action {
    /// The guest that it is about, if it is about one.
    pub fn guest(&self) -> Option<usize> {
        match *self {
            Self::SetPriority { .. } | Self::DropImages { .. } => None,
            Self::Balloon { guest, .. }
            | Self::Throttle { guest, .. }
            | Self::PageOut { guest, .. }
            | Self::Suspend { guest, .. }
            | Self::Resume { guest }
            | Self::Stop { guest, .. } => Some(guest),
        }
    }
}

/// Why a guest was suspended or stopped.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "because")]
pub enum Reason {
    /// Free memory is below the lowest threshold and does not recover.
    FreeMemory {
        free_pages: u64,
        threshold_pages: u64,
        /// How fast it becomes less; 0 if there is none left to lose.
        falling_pages_per_second: u64,
    },
    /// All tasks wait for memory: more is in use than fits, and pages go to swap and back.
    Stalled {
        /// Percent of the last ten seconds in which nothing ran because of lack of memory.
        full_avg10_percent: f64,
        threshold_percent: f64,
    },
    /// Another guest has been suspended for long enough and takes its turn.
    Turn { waited_seconds: u64 },
    /// Ballooning, throttling, paging and suspending were not enough.
    NothingHelped { seconds: u64, free_pages: u64 },
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::FreeMemory { free_pages, threshold_pages, falling_pages_per_second } => {
                write!(f, "{} free, below the {} threshold, and ", Mib(free_pages), Mib(threshold_pages))?;
                match falling_pages_per_second {
                    0 => f.write_str("free memory does not rise"),
                    falling => write!(f, "{} more are taken each second", Mib(falling)),
                }
            }
            Self::Stalled { full_avg10_percent, threshold_percent } => write!(
                f,
                "all tasks waited for memory in {full_avg10_percent:.0} % of the last ten seconds, \
                 above the {threshold_percent:.0} % threshold"
            ),
            Self::Turn { waited_seconds } => {
                write!(f, "it is the turn of a guest that was suspended for {waited_seconds} s")
            }
            Self::NothingHelped { seconds, free_pages } => write!(
                f,
                "{} free, and neither ballooning nor throttling, paging or suspending has helped for {seconds} s",
                Mib(free_pages)
            ),
        }
    }
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::SetPriority { urgent: true } => f.write_str("merge at urgent priority"),
            Self::SetPriority { urgent: false } => f.write_str("merge at normal priority"),
            Self::DropImages { pages } => {
                write!(f, "let go of images without a name and of the pool, of {}", Mib(*pages))
            }
            Self::Balloon { target_pages, .. } => write!(f, "balloon to {}", Mib(*target_pages)),
            Self::Throttle { pages_per_second: Some(rate), .. } => {
                write!(f, "at most {} first touched a second", Mib(*rate))
            }
            Self::Throttle { pages_per_second: None, .. } => f.write_str("first touches without a limit"),
            Self::PageOut { pages, .. } => write!(f, "page out {}", Mib(*pages)),
            Self::Suspend { reason, .. } => write!(f, "suspend: {reason}"),
            Self::Resume { .. } => f.write_str("resume"),
            Self::Stop { reason, .. } => write!(f, "stop: {reason}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reason_is_a_sentence_with_its_numbers() {
        let reason =
            Reason::FreeMemory { free_pages: 512, threshold_pages: 768, falling_pages_per_second: 128 };
        let text = Action::Suspend { guest: 0, reason }.to_string();
        assert_eq!(
            text,
            "suspend: 2.0 MiB free, below the 3.0 MiB threshold, and 0.5 MiB more are taken each second"
        );
    }
}
