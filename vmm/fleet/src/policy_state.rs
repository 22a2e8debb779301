//! What must not be forgotten when the daemon ends: which guests the policy suspended or stopped
//! and why, and what it remembers.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::runtime::FleetDir;
use overcommit::policy::Memory;
use overcommit::view::{GuestState, GuestView};

/// What is kept in the fleet's directory.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct PolicyState {
    /// What the policy remembers from one step to the next.
    pub memory: Memory,
    /// Guests it suspended, and why.
    pub suspended: BTreeMap<String, String>,
    /// Guests it stopped, and why.
    pub stopped: BTreeMap<String, String>,
    #[serde(skip)]
    path: PathBuf,
}

impl PolicyState {
    /// What an earlier daemon left in `dir`; nothing, if it left nothing that can be read.
    pub fn load(dir: &FleetDir) -> Self {
        let path = dir.policy();
        let left = fs::read(&path).ok().and_then(|bytes| serde_json::from_slice(&bytes).ok());
        Self { path, ..left.unwrap_or_default() }
    }

    /// A guest is about to be suspended.
    pub fn suspend(&mut self, guest: &str, why: &str) {
        self.suspended.insert(guest.into(), why.into());
        self.save();
    }

    /// A guest runs again.
    pub fn resume(&mut self, guest: &str) {
        self.suspended.remove(guest);
        self.save();
    }

    /// A guest is about to be stopped.
    pub fn stop(&mut self, guest: &str, why: &str) {
        self.suspended.remove(guest);
        self.stopped.insert(guest.into(), why.into());
        self.save();
    }

    /// Forgets suspensions of guests that were resumed by others, or that have ended. Of one that
    /// is late it is not known yet.
    pub fn keep(&mut self, guests: &[GuestView], is_late: impl Fn(&str) -> bool) {
        let before = self.suspended.len();
        // One that does not answer may still be paused.
        let stands = |g: &GuestView| {
            matches!(g.state, GuestState::Suspended | GuestState::Silent)
                || g.state != GuestState::Dead && is_late(&g.name)
        };
        self.suspended.retain(|name, _| guests.iter().any(|g| g.name == *name && stands(g)));
        if self.suspended.len() != before {
            self.save();
        }
    }

    /// What is known of a paused guest.
    pub fn of_paused(&self, guest: &str) -> GuestState {
        if self.suspended.contains_key(guest) { GuestState::Suspended } else { GuestState::Paused }
    }

    /// Writes everything down, as a whole or not at all.
    pub fn save(&self) {
        let Ok(bytes) = serde_json::to_vec(self) else { return };
        let new = self.path.with_extension("new");
        if let Err(error) = fs::write(&new, bytes).and_then(|()| fs::rename(&new, &self.path)) {
            tracing::warn!(%error, path = %self.path.display(), "what was suspended could not be written down");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_suspended_is_known_to_the_next() {
        let name = format!("policy-state-test-{}", std::process::id());
        let dir = FleetDir::of(&name);
        dir.create().unwrap();
        let mut first = PolicyState::load(&dir);
        first.suspend("a", "too little");
        first.suspend("b", "too little");
        first.stop("b", "far too little");
        let mut next = PolicyState::load(&dir);
        assert_eq!((next.of_paused("a"), next.of_paused("c")), (GuestState::Suspended, GuestState::Paused));
        assert_eq!(next.stopped["b"], "far too little");
        // It was resumed by others.
        let view = |state| [GuestView { name: "a".into(), state, ..GuestView::default() }];
        next.keep(&view(GuestState::Silent), |_| false);
        next.keep(&view(GuestState::Running), |_| true);
        assert!(next.suspended.contains_key("a"));
        next.keep(&view(GuestState::Running), |_| false);
        assert!(PolicyState::load(&dir).suspended.is_empty());
        fs::write(dir.policy(), "{").unwrap();
        assert!(PolicyState::load(&dir).stopped.is_empty());
        dir.remove();
    }
}
