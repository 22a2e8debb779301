//! What became of guests, in words.

use lab::stress::verdict::{Fate, GuestVerdict, Verdict};

pub(super) fn fate(guest: &GuestVerdict) -> &'static str {
    match guest.fate {
        Fate::Absent => "never came",
        Fate::Refused => "not admitted",
        Fate::Running => "runs",
        Fate::Suspended => "suspended",
        Fate::Left => "left",
        Fate::Killed => "killed",
        Fate::Stopped => "stopped",
        Fate::Died => "died",
    }
}

/// Why guests ended, a line for each reason: guests of one kind share it.
pub(super) fn reasons(verdict: &Verdict) -> Vec<String> {
    let mut reasons: Vec<(String, Vec<&str>)> = Vec::new();
    for guest in &verdict.guests {
        let Some(why) = &guest.why else { continue };
        let why = format!("{}: {why}", fate(guest));
        match reasons.iter_mut().find(|(known, _)| *known == why) {
            Some((_, names)) => names.push(&guest.name),
            None => reasons.push((why, vec![&guest.name])),
        }
    }
    reasons.into_iter().map(|(why, names)| format!("{} {why}", names.join(", "))).collect()
}
