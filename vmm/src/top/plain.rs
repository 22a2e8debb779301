//! `samepage top --once`: the same numbers as a table, for a pipe or a log.

use std::fmt::Write;

use super::columns::{age, size, state};
use super::state::{Sort, rows};
use crate::ledger_table::ledger_text;
use crate::table::table;
use fleet::management::Management;
use overcommit::memory_state::Because;

/// Entries of the action log that are shown.
const LOG_ENTRIES: usize = 5;

/// The guests, the ledger, and what was done last.
pub(super) fn text(fleet: &str, management: &Management, sort: Sort) -> String {
    let rows = rows(management, sort, false);
    let with_image = rows.iter().any(|row| row.classes.image > 0);
    let image: &[&str] = if with_image { &["image"] } else { &[] };
    let before = ["guest", "state", "promised", "private", "shared", "zero", "ballooned", "swapped"];
    let after =
        ["absent", "resident", "frames", "saved", "balloon", "wset", "touch/s", "limit/s", "debt", "word"];
    let mut table = table(&[&before[..], image, &after].concat(), 2);
    let none = || "-".to_owned();
    for row in rows {
        let c = &row.classes;
        let mut cells = vec![row.name.clone(), state(row.state).0.into()];
        let sizes = [row.promised_pages, c.private, c.shared, c.zero, c.ballooned, c.swapped];
        let sizes =
            sizes.into_iter().chain(with_image.then_some(c.image)).chain([c.absent, row.resident_pages]);
        cells.extend(sizes.map(|pages| size(pages as f64)));
        cells.extend([row.frames, row.saved].map(size));
        cells.push(row.balloon.map_or_else(none, |balloon| {
            format!("{}/{}", size(balloon.actual_pages as f64), size(balloon.target_pages as f64))
        }));
        cells.push(row.working_set_pages.map_or_else(none, |pages| {
            let error =
                row.working_set_error_pages.map_or(String::new(), |error| format!("±{}", size(error as f64)));
            format!("{}{error}", size(pages as f64))
        }));
        cells.push(size(row.touched_pages_per_second));
        cells.push(row.throttle_pages_per_second.map_or_else(none, |pages| size(pages as f64)));
        cells.push(size(row.debt_pages as f64));
        cells.push(row.age_seconds.map_or_else(none, age));
        table.add_row(cells);
    }
    let because = match management.because {
        Because::Free => "",
        Because::Falling => " (falling fast)",
        Because::Stalls => " (tasks wait for memory)",
        Because::Before => " (until enough has been free for a while)",
    };
    let acting = if management.acting { "" } else { ", watched only" };
    let mut text = format!(
        "{table}\nfleet {fleet}: {} guests, memory state {}{because}{acting}",
        management.guests.len(),
        management.memory_state.name()
    );
    if let Some(host) = &management.host {
        let _ =
            write!(text, ", {} free of {}", size(host.free_pages as f64), size(host.capacity_pages as f64));
    }
    match &management.ledger {
        Some(ledger) => {
            let ratio = ledger.promised as f64 / ledger.used.max(1) as f64;
            let promised = size(ledger.promised as f64);
            let _ = write!(
                text,
                "\npromised: {promised}, {ratio:.2} times what is used\n{}",
                ledger_text(ledger)
            );
        }
        None => text.push_str("\nits ledger has not been read yet"),
    }
    let action_log = &management.action_log;
    let skipped = action_log.entries.len().saturating_sub(LOG_ENTRIES);
    for entry in action_log.entries.iter().skip(skipped) {
        let target = entry.guest.as_deref().unwrap_or("engine");
        let _ = write!(text, "\n{:>9.1} s  {target}: {}", entry.seconds, entry.text);
        if let Some(error) = &entry.error {
            let _ = write!(text, "  failed: {error}");
        }
    }
    for note in management.notes() {
        let _ = write!(text, "\nnote: {note}");
    }
    text
}
