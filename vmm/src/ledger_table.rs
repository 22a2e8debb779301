//! The ledger, admission and audit as text.

use super::table::{mib, table};
use fleet::admission::Admission;
use measure::audit::Audit;
use memory::PAGE_BYTES;
use overcommit::admission::Decision;
use overcommit::capacity::Capacity;
use overcommit::ledger::Ledger;

fn pages(pages: u64) -> String {
    mib(pages * PAGE_BYTES)
}

/// Use, debt and cover.
pub(super) fn ledger_text(ledger: &Ledger) -> String {
    let (o, d, c) = (&ledger.overhead, &ledger.debt, &ledger.cover);
    let ratio =
        ledger.cover_ratio.map_or("nothing is owed".into(), |ratio| format!("{ratio:.2} times the debt"));
    let old = ledger.oldest_split_seconds().map_or(String::new(), |age| {
        format!("\ncounted: by the kernel's counters; which pages are shared and which are zeros, by walks up to {age:.0} s ago")
    });
    let besides = |name: &str, count: u64| match count {
        0 => String::new(),
        count => format!(", {name} {}", pages(count)),
    };
    let (images, pool) = (besides("images", o.held_by_images), besides("pool", o.pool));
    format!(
        "used: {} of {} MiB ({:.0} %): {} guest memory, {} besides (VMMs {}, page tables {}, daemon {}, dead slabs {}{images}{pool}, KSM {})\n\
         debt: {} MiB: {} if all that is shared were written, {} if all that is absent were touched\n\
         cover: {} MiB, {ratio}: {} free, {} swap, {} in reach of balloons{old}",
        pages(ledger.used),
        pages(ledger.capacity),
        ledger.used as f64 * 100.0 / ledger.capacity.max(1) as f64,
        pages(ledger.frames),
        pages(o.total()),
        pages(o.vmm),
        pages(o.page_tables),
        pages(o.daemon),
        pages(o.dead_slabs),
        pages(o.ksm_metadata),
        pages(d.total()),
        pages(d.sharing),
        pages(d.demand),
        pages(c.total()),
        pages(c.free),
        pages(c.swap),
        pages(c.balloon),
    )
}

/// Whether each guest would be admitted.
pub(super) fn admission_text(admission: &Admission) -> String {
    let mut table = table(&["guest", "memory, MiB", "admitted"], 1);
    // Below the table: in it, they would make it wider than any terminal.
    let mut reasons = String::new();
    for judged in &admission.guests {
        let name = &judged.promise.name;
        let admitted = match &judged.decision {
            Decision::Admitted { .. } => "yes",
            Decision::Refused(refusal) => {
                reasons.push_str(&format!("\n{name} is not admitted: {refusal}"));
                "no"
            }
        };
        table.add_row([name.clone(), pages(judged.promise.pages), admitted.into()]);
    }
    let rule = admission.mode.map_or("every guest is admitted".to_owned(), |mode| format!("mode {mode}"));
    // Admission and the policy are independent: the one decides before, the other acts after.
    let policy = if admission.policy { "" } else { "; once up the fleet is only watched: it has no policy" };
    let Capacity { pages: capacity, limited_by } = admission.capacity;
    let capacity = format!(
        "capacity {} MiB, set by {limited_by}; {rule}{policy}\nto be had: {} MiB: {}",
        pages(capacity),
        pages(admission.room.left_pages()),
        admission.room
    );
    if admission.guests.is_empty() { capacity } else { format!("{table}{reasons}\n{capacity}") }
}

/// The result of an audit.
pub(super) fn audit_text(audit: &Audit) -> String {
    let frames = match audit.frames_listed {
        Some(listed) => format!("{listed} frames listed, {} in the ledger", audit.frames),
        None => "frame numbers are hidden from this user, so only the page counts were checked".into(),
    };
    let moving = if audit.still { "" } else { "; pages moved while it looked" };
    let mut text = format!("audit: residue {} pages ({frames}{moving})", audit.residue_pages);
    for guest in audit.guests.iter().filter(|guest| guest.residue_pages > 0) {
        text.push_str(&format!(
            "\n  guest {}: {} pages resident and {} swapped by its page table, {} and {} by the kernel's books",
            guest.name, guest.resident, guest.swapped, guest.resident_by_kernel, guest.swapped_by_kernel
        ));
    }
    text
}
