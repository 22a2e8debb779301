//! How `samepage balloon` shows a balloon.

use std::fmt::Write;

use super::table::{mib, table};
use machine::balloon::BalloonStatus;
use memory::PAGE_BYTES;

/// Characters of the bar from 0 to the target (or the actual size, if that is more).
const BAR: usize = 40;

/// One line on one balloon.
pub(super) fn line(guest: &str, status: &BalloonStatus) -> String {
    if !status.size.driver {
        return format!("{guest}: {} MiB asked for; no driver", pages(status.size.target_pages.into()));
    }
    let touched = match status.host.touched_pages {
        0 => String::new(),
        touched => format!("; {} MiB of it have frames again", pages(touched)),
    };
    let kept = match status.host.kept_pages {
        0 => String::new(),
        kept => {
            format!("; its pool of huge pages keeps {} MiB, of huge pages that are not whole", pages(kept))
        }
    };
    let told = status.age_seconds.map_or(String::new(), |age| format!("; its statistics are {age:.1} s old"));
    format!(
        "{guest}: {} of {} MiB; the host has {} MiB of it back{touched}{kept}{told}",
        pages(status.size.actual_pages.into()),
        pages(status.size.target_pages.into()),
        pages(status.host.absent_pages),
    )
}

/// One balloon in full; `before` is an earlier status and its age in seconds.
pub(super) fn statistics_table(
    guest: &str,
    status: &BalloonStatus,
    before: Option<(f64, &BalloonStatus)>,
) -> String {
    let mut text = line(guest, status);
    let full = status.size.target_pages.max(status.size.actual_pages).max(1) as usize;
    let filled = status.size.actual_pages as usize * BAR / full;
    let rate = before.map_or(String::new(), |(seconds, then)| {
        let moved = f64::from(status.size.actual_pages) - f64::from(then.size.actual_pages);
        format!(" {:+.1} MiB/s", moved * PAGE_BYTES as f64 / seconds.max(0.001) / (1 << 20) as f64)
    });
    let _ = write!(text, "\n[{:<BAR$}]{rate}", "=".repeat(filled));
    let age = status.age_seconds.map_or(String::new(), |age| format!("{age:.1} s ago"));
    let mut says = table(&["the guest says", &age], 1);
    for (name, value) in &status.guest {
        // Tags of memory are in bytes, the others are counts.
        let memory =
            ["swap_in", "swap_out", "free_memory", "total_memory", "available_memory", "disk_caches"];
        let value = match memory.contains(&name.as_str()) {
            true => format!("{} MiB", mib(*value)),
            false => value.to_string(),
        };
        says.add_row([name.replace('_', " "), value]);
    }
    if status.guest.is_empty() {
        says.add_row(["nothing yet", ""]);
    }
    let mut sees = table(&["the host sees", "MiB"], 1);
    let host = &status.host;
    for (name, bytes) in [
        ("in the balloon", host.held_pages * PAGE_BYTES),
        ("without a frame", host.absent_pages * PAGE_BYTES),
        ("with a frame again", host.touched_pages * PAGE_BYTES),
        ("kept: parts of huge pages", host.kept_pages * PAGE_BYTES),
        ("dropped again so far", host.swept_pages * PAGE_BYTES),
        ("reclaimed so far, by inflation", host.reclaimed_bytes),
        ("by free page reporting", host.reported_bytes),
        ("by free page hinting", host.hinted_bytes),
    ] {
        sees.add_row([name.to_owned(), mib(bytes)]);
    }
    let _ = write!(text, "\n{says}\n{sees}");
    if host.refused > 0 || host.failed_discards > 0 {
        let _ = write!(
            text,
            "\n{} requests of the guest made no sense, {} ranges could not be dropped",
            host.refused, host.failed_discards
        );
    }
    text
}

fn pages(pages: u64) -> String {
    mib(pages * PAGE_BYTES)
}
