//! What the daemon reports of how it manages a fleet's memory.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::action_log::ActionLog;
use overcommit::ledger::Ledger;
use overcommit::memory_state::{Because, MemoryState};
use overcommit::view::{GuestView, HostView};

/// What `management` on the daemon's socket returns.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Management {
    /// The memory state of the fleet: how much is free.
    #[serde(alias = "pressure")]
    pub memory_state: MemoryState,
    /// Why it is in that state.
    #[serde(default)]
    pub because: Because,
    /// What was seen of the host last; None before the first look.
    pub host: Option<HostView>,
    /// What was seen of each guest last.
    pub guests: Vec<GuestView>,
    /// The last ledger.
    pub ledger: Option<Ledger>,
    /// How long reading it took, and how often it is read, in seconds.
    pub ledger_seconds: (f64, f64),
    /// When it was read, by the clock of `host`.
    #[serde(default)]
    pub ledger_read_seconds: Option<f64>,
    /// Whether anything is done about it, or it is only watched.
    pub acting: bool,
    /// Guests that were suspended, and why.
    pub suspended: BTreeMap<String, String>,
    /// Guests that were stopped, and why.
    pub stopped: BTreeMap<String, String>,
    /// The most that was ever in use, in pages.
    pub peak_used_pages: u64,
    /// Looks so far.
    pub looks: u64,
    /// Processor time that looking and deciding took, in seconds.
    pub cpu_seconds: f64,
    /// What was done lately, the oldest first.
    #[serde(alias = "diary")]
    pub action_log: ActionLog,
}

impl Management {
    /// How old the ledger was at the last look, in seconds.
    pub fn ledger_age_seconds(&self) -> Option<f64> {
        Some(self.host.as_ref()?.now_seconds - self.ledger_read_seconds?)
    }

    /// What a reader of the fleet's numbers should know.
    pub fn notes(&self) -> impl Iterator<Item = String> {
        let said = |(guest, why): (&String, &String), what| format!("guest {guest} was {what}: {why}");
        let suspended = self.suspended.iter().map(move |entry| said(entry, "suspended"));
        let stalls = self.host.as_ref().filter(|host| host.psi.is_none());
        let unseen = stalls.map(|_| {
            "this kernel does not tell how long tasks wait for memory (PSI): free memory alone counts".into()
        });
        let silent = self.guests.iter().filter_map(|guest| {
            let seconds = guest.silent_seconds?;
            Some(format!(
                "guest {} has not answered for {seconds:.0} s: its memory is counted, what it says of itself is old, and it cannot be \
                 managed",
                guest.name
            ))
        });
        unseen
            .into_iter()
            .chain(silent)
            .chain(suspended)
            .chain(self.stopped.iter().map(move |entry| said(entry, "stopped")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A daemon of an earlier build answers with the names that these had.
    #[test]
    fn the_old_names_are_read_and_the_new_ones_written() {
        let now = Management { memory_state: MemoryState::Hard, ..Management::default() };
        let text = serde_json::to_string(&now).unwrap();
        assert!(text.contains(r#""memory_state":"hard""#) && text.contains(r#""action_log":"#), "{text}");
        let old = text.replace("memory_state", "pressure").replace("action_log", "diary");
        assert_eq!(serde_json::from_str::<Management>(&old).unwrap(), now);
    }
}
