//! The tables of `samepage fleet status`.

use std::collections::BTreeSet;
use std::fmt::Write;

use super::ledger_table::{audit_text, ledger_text};
use super::table::{counted, mib, table};
use fleet::pool::PoolStatus;
use fleet::status::{FleetStatus, GuestStatus, State};
use measure::content::Content;
use measure::frames::Pages;
use memory::PAGE_BYTES;
use merge::slab::engine::Statistics;

/// The fleet, a row a guest, and a headline.
pub(super) fn status_table(status: &FleetStatus) -> String {
    let with_image = status.pages.image > 0;
    let before = ["guest", "state", "domain", "pid", "kind", "memory", "balloon", "absent"];
    let after = ["zero", "private", "shared", "swapped", "frames"];
    let image: &[&str] = if with_image { &["image"] } else { &[] };
    let nodes = nodes(&status.guests);
    let of_nodes: Vec<String> = nodes.iter().map(|node| format!("node {node}")).collect();
    let of_nodes: Vec<&str> = of_nodes.iter().map(String::as_str).collect();
    let mut table = table(&[&before[..], image, &after, &of_nodes].concat(), 5);
    for guest in &status.guests {
        let mut row = vec![
            guest.name.clone(),
            state(guest),
            guest.domain.clone(),
            guest.pid.map_or("-".into(), |p| p.to_string()),
            guest.kind.clone().unwrap_or("-".into()),
            mib(guest.memory_bytes),
            guest.balloon.as_ref().map_or("-".into(), |b| mib(b.host.held_pages * PAGE_BYTES)),
        ];
        row.extend(classes(&guest.pages, with_image));
        row.push(mib((guest.frames * PAGE_BYTES as f64) as u64));
        row.extend(nodes.iter().map(|node| mib(on_node(guest, *node) * PAGE_BYTES)));
        table.add_row(row);
    }
    table.add_row(all_guests(status, with_image, &nodes));
    let estimated = if status.estimated { " (estimated)" } else { "" };
    let mut text = format!(
        "{table}\nfleet {}: {} on {}, engine {}; MiB: {} promised, {} of frames, {} saved by sharing{estimated}, {} on the zero frame",
        status.fleet,
        counted(status.guests.len() as u64, "guest"),
        status.backend,
        status.engine,
        mib(status.promised_bytes),
        mib(status.frames * PAGE_BYTES),
        mib(status.saved_pages * PAGE_BYTES),
        mib(status.pages.zero * PAGE_BYTES),
    );
    if let Some(content) = &status.content {
        text.push_str(&could_be_freed(content, status.saved_pages + status.pages.zero));
    }
    let _ = write!(text, "\n{}", ledger_text(&status.ledger));
    if let Some(audit) = &status.audit {
        let _ = write!(text, "\n{}", audit_text(audit));
    }
    if let Some(merge) = &status.merge {
        text.push('\n');
        text.push_str(&merge_text(merge));
    }
    if let Some(pool) = &status.pool {
        let PoolStatus { wanted, standing_by, bytes, taken, ended, trouble } = pool;
        let _ = write!(
            text,
            "\npool: {standing_by} of {wanted} processes stand by, {} MiB; {taken} have become clones, {ended} have ended",
            mib(*bytes)
        );
        if let Some(why) = trouble {
            let _ = write!(text, "; the last one did not start: {why}");
        }
    }
    for note in &status.notes {
        let _ = write!(text, "\nnote: {note}");
    }
    text
}

fn state(guest: &GuestStatus) -> String {
    match (guest.state, &guest.ended) {
        (State::Running, _) => "running".into(),
        (State::Paused, _) => "paused".into(),
        (State::Silent, _) => format!("silent for {:.0} s", guest.silent_seconds.unwrap_or(0.0)),
        (State::Dead, Some(how)) => format!("dead: {how}"),
        (State::Dead, None) => "dead".into(),
        (State::Panicked, how) => match how.as_ref().or(guest.panic.as_ref()) {
            Some(how) => format!("panicked: {how}"),
            None => "panicked".into(),
        },
    }
}

/// The row of all guests together.
fn all_guests(status: &FleetStatus, with_image: bool, nodes: &BTreeSet<u32>) -> Vec<String> {
    let mut all = vec!["all".into()];
    all.extend(["", "", "", ""].map(String::from));
    all.push(mib(status.promised_bytes));
    let ballooned = |g: &GuestStatus| g.balloon.as_ref().map_or(0, |b| b.host.held_pages);
    all.push(mib(status.guests.iter().map(ballooned).sum::<u64>() * PAGE_BYTES));
    all.extend(classes(&status.pages, with_image));
    all.push(mib(status.frames * PAGE_BYTES));
    let on = |node: &u32| status.guests.iter().map(|guest| on_node(guest, *node)).sum::<u64>();
    all.extend(nodes.iter().map(|node| mib(on(node) * PAGE_BYTES)));
    all
}

/// What could be freed, of which `freed` pages are.
fn could_be_freed(content: &Content, freed: u64) -> String {
    let fraction = match content.ideal_saved_pages {
        0 => "nothing".to_owned(),
        ideal => format!("{:.1} % of it", 100.0 * freed as f64 / ideal as f64),
    };
    format!(
        "\ncould be freed: {} MiB (zeros {}, within a guest {}, between guests {}); {fraction} is",
        mib(content.ideal_saved_pages * PAGE_BYTES),
        mib(content.zero * PAGE_BYTES),
        mib(content.self_duplicates * PAGE_BYTES),
        mib(content.cross_duplicates * PAGE_BYTES),
    )
}

/// The NUMA nodes that some guest has pages on. A shared frame is counted for each guest that maps it.
fn nodes(guests: &[GuestStatus]) -> BTreeSet<u32> {
    guests.iter().flat_map(|guest| guest.nodes.iter().map(|on| on.node)).collect()
}

fn on_node(guest: &GuestStatus, node: u32) -> u64 {
    guest.nodes.iter().filter(|on| on.node == node).map(|on| on.pages).sum()
}

/// Merging by slabs, domain by domain, and its cost.
fn merge_text(merge: &Statistics) -> String {
    let mut text = String::new();
    for (name, domain) in &merge.domains {
        let c = &domain.counters;
        let refused =
            c.refused_pages + c.differed_pages + c.pinned_pages + c.over_budget_pages + c.huge_pages;
        let _ = writeln!(
            text,
            "domain {name}: MiB: {} shared in {} mappings, {} zeros given back, {} broken by writes, {refused} pages refused; \
             {} of {} MiB{}",
            mib(c.shared_now * PAGE_BYTES),
            c.mappings_now,
            mib(c.zero_pages * PAGE_BYTES),
            mib(c.broken_pages * PAGE_BYTES),
            counted(domain.slabs, "slab"),
            mib(domain.slab_bytes),
            match domain.slab_use_age_seconds {
                Some(age) =>
                    format!(", {} unused when that was looked at {age:.0} s ago", mib(domain.slab_dead_bytes)),
                None => String::new(),
            },
        );
    }
    let c = &merge.host;
    let seconds = |ns: u64| ns as f64 / 1e9;
    let _ = write!(
        text,
        "merging took {:.2} s of processor time: {:.2} finding what was written, {:.2} hashing, {:.2} publishing, {:.2} merging, \
         {:.2} matching; ",
        c.cpu_seconds() + merge.matchmaker_cpu_seconds,
        seconds(c.scan_ns + c.live_ns),
        seconds(c.hash_ns),
        seconds(c.publish_ns),
        seconds(c.merge_ns),
        seconds(c.match_ns) + merge.matchmaker_cpu_seconds,
    );
    text.push_str(&match merge.seconds_since_convergence {
        Some(seconds) => format!("all quiet pages were processed {seconds:.1} s ago"),
        None => "not all quiet pages are processed yet".into(),
    });
    text
}

/// KVM's statistics that say what nested paging and merging cost, then exits by kind; values that
/// are 0 in all guests are left out.
pub(super) fn kvm_table(status: &FleetStatus) -> String {
    let guests: Vec<_> = status.guests.iter().filter_map(|g| g.kvm.as_ref().map(|k| (&g.name, k))).collect();
    let mut header = vec!["KVM statistic"];
    header.extend(guests.iter().map(|(name, _)| name.as_str()));
    let mut table = table(&header, 1);
    let mut names: Vec<&String> = guests.iter().flat_map(|(_, k)| k.keys()).collect();
    names.sort();
    names.dedup();
    for name in names {
        let values: Vec<u64> = guests.iter().map(|(_, k)| k.get(name).copied().unwrap_or(0)).collect();
        if values.iter().any(|v| *v > 0) {
            let mut row = vec![name.clone()];
            row.extend(values.iter().map(u64::to_string));
            table.add_row(row);
        }
    }
    table.to_string()
}

/// By class; that of images where there are any.
fn classes(pages: &Pages, with_image: bool) -> Vec<String> {
    let image = with_image.then_some(pages.image);
    let others = [pages.zero, pages.private, pages.shared, pages.swapped];
    let all = [pages.absent].into_iter().chain(image).chain(others);
    all.map(|p| mib(p * PAGE_BYTES)).collect()
}
