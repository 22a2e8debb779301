//! What was done to manage a fleet's memory, and how often.

use std::collections::{BTreeMap, VecDeque};

use serde::{Deserialize, Serialize};

use overcommit::action::Action;

/// Entries that are kept; older ones are only counted.
const KEPT: usize = 256;

/// One thing that was done.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Entry {
    /// Seconds since the daemon began.
    pub seconds: f64,
    /// The guest that it was done to; None: the engine.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub guest: Option<String>,
    /// What.
    pub action: Action,
    /// In words.
    pub text: String,
    /// Why it could not be done.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub error: Option<String>,
}

impl Entry {
    /// `action` was tried on `guest`.
    pub fn new(action: &Action, guest: Option<String>, error: Option<String>, seconds: f64) -> Self {
        Self { seconds, guest, action: *action, text: action.to_string(), error }
    }
}

/// The last entries, and how many there were of each kind.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ActionLog {
    /// The last ones, the oldest first.
    pub entries: VecDeque<Entry>,
    /// How many there were, by kind.
    pub counts: BTreeMap<String, u64>,
    /// How many could not be done.
    pub failed: u64,
}

impl ActionLog {
    /// Writes one down.
    pub fn add(&mut self, entry: Entry) {
        *self.counts.entry(kind(&entry.action).into()).or_default() += 1;
        self.failed += u64::from(entry.error.is_some());
        self.entries.push_back(entry);
        while self.entries.len() > KEPT {
            self.entries.pop_front();
        }
    }
}

/// All kinds of actions.
pub const KINDS: [&str; 8] =
    ["merge", "drop_images", "balloon", "throttle", "page_out", "suspend", "resume", "stop"];

/// The kind of an action, as in reports.
pub fn kind(action: &Action) -> &'static str {
    match action {
        Action::SetPriority { .. } => "merge",
        Action::DropImages { .. } => "drop_images",
        Action::Balloon { .. } => "balloon",
        Action::Throttle { .. } => "throttle",
        Action::PageOut { .. } => "page_out",
        Action::Suspend { .. } => "suspend",
        Action::Resume { .. } => "resume",
        Action::Stop { .. } => "stop",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn old_entries_are_only_counted() {
        let mut action_log = ActionLog::default();
        for n in 0..KEPT as u64 + 10 {
            let error = (n % 2 == 0).then(|| "no".to_owned());
            action_log.add(Entry::new(&Action::SetPriority { urgent: true }, None, error, n as f64));
        }
        assert_eq!(
            (action_log.entries.len(), action_log.counts["merge"], action_log.failed),
            (KEPT, KEPT as u64 + 10, 133)
        );
        assert_eq!(action_log.entries[0].seconds, 10.0);
    }
}
