//! Draws [`Top`] on a terminal of any size.

use ratatui::Frame;
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Color, Style, Stylize};
use ratatui::text::{Line, Span};
use ratatui::widgets::{Block, Borders, Clear, Paragraph, Sparkline, Wrap};

use super::class_bar::legend;
use super::columns::{size, table};
use super::state::{MAX_SAMPLES, Source, Top, rows};
use fleet::action_log::Entry;
use fleet::management::Management;
use overcommit::ledger::Ledger;
use overcommit::memory_state::MemoryState;
use overcommit::view::GuestState;

/// The smallest terminal that everything fits on.
pub(super) const MIN_COLUMNS: u16 = 80;
pub(super) const MIN_LINES: u16 = 24;
/// Lines of the action log, with the one above it, on such a terminal.
const ACTION_LOG_LINES: u16 = 6;
/// From this height on the sparkline of free memory is three lines high, and the action log twice
/// as high.
const TALL: u16 = 36;

/// The help on keys.
const KEYS: [(&str, &str); 8] = [
    ("q", "quit (so do Esc and Control-C)"),
    ("s", "sort by the next key"),
    ("r", "sort the other way round"),
    ("p", "hold the display, or resume it"),
    ("?", "show this, or hide it"),
    ("up, down", "another guest; also page up, page down, home, end"),
    ("", "K to P are KiB to PiB; touch, limit: first touches each second."),
    ("", "mute: its VM does not answer; word: age of the guest's statistics."),
];

/// Draws everything. `now_seconds` is our own clock.
pub(super) fn draw(frame: &mut Frame, top: &Top, now_seconds: f64) {
    let area = frame.area();
    if area.width < MIN_COLUMNS || area.height < MIN_LINES {
        return too_small(frame, area);
    }
    let tall = area.height >= TALL;
    let [head, rates, legend_line, guests, action_log, footer] = Layout::vertical([
        Constraint::Length(3),
        Constraint::Length(if tall { 3 } else { 1 }),
        Constraint::Length(1),
        Constraint::Min(3),
        Constraint::Length(if tall { 2 * ACTION_LOG_LINES } else { ACTION_LOG_LINES }),
        Constraint::Length(1),
    ])
    .areas(area);
    let Some(shown) = top.shown() else {
        let said = match &top.source {
            Source::Gone { why, .. } => format!("{why}; trying again"),
            _ => "waiting for the daemon".into(),
        };
        frame.render_widget(Paragraph::new(vec![title(top, None), Line::from(said)]), head);
        return frame.render_widget(keys_line(top), footer);
    };
    frame.render_widget(Paragraph::new(headlines(top, shown)), head);
    match &top.source {
        Source::Gone { since_seconds, why } => {
            let text = format!(
                "{why} (for {:.0} s; these are its last numbers; trying again)",
                now_seconds - since_seconds
            );
            frame.render_widget(Paragraph::new(text.bold().fg(Color::Red)).wrap(Wrap { trim: true }), rates);
        }
        _ => draw_rates(frame, top, shown, rates),
    }
    frame.render_widget(Line::from(legend()), legend_line);
    let sorted = rows(shown, top.sort, top.reversed);
    // Never scroll past a full last page.
    let visible = usize::from(guests.height.saturating_sub(1));
    let first = top.first.min(sorted.len().saturating_sub(visible));
    frame.render_widget(table(&sorted, first, guests.width, top.sort, top.reversed), guests);
    draw_action_log(frame, shown, action_log);
    frame.render_widget(keys_line(top), footer);
    if top.help {
        draw_help(frame, area);
    }
}

fn too_small(frame: &mut Frame, area: Rect) {
    let text = format!(
        "This terminal is {}x{}; samepage top needs {MIN_COLUMNS}x{MIN_LINES}. Make it larger, or press q and use \
         samepage top --once.",
        area.width, area.height
    );
    frame.render_widget(Paragraph::new(text).wrap(Wrap { trim: true }), area);
}

/// The memory state of a fleet, in its colour.
fn memory_state(memory_state: MemoryState) -> Span<'static> {
    let color = match memory_state {
        MemoryState::High => Color::Green,
        MemoryState::Soft => Color::Yellow,
        MemoryState::Hard => Color::LightRed,
        MemoryState::Low => Color::Red,
    };
    Span::styled(memory_state.name(), Style::new().fg(color).bold().reversed())
}

fn title<'a>(top: &'a Top, shown: Option<&Management>) -> Line<'a> {
    let mut spans = vec!["samepage top  ".bold(), "fleet ".into(), top.fleet.as_str().bold()];
    let Some(shown) = shown else { return Line::from(spans) };
    if top.is_held() {
        spans.extend(["  ".into(), "display held".reversed()]);
    }
    spans.extend(["  memory state: ".into(), memory_state(shown.memory_state)]);
    let count = |state| shown.guests.iter().filter(|guest| guest.state == state).count();
    spans.push(format!("  {} guests", shown.guests.len()).into());
    for state in [GuestState::Suspended, GuestState::Paused, GuestState::Dead, GuestState::Silent] {
        let guests = count(state);
        if guests > 0 {
            spans.push(format!(", {guests} {}", state.name()).yellow());
        }
    }
    let silent = shown.guests.iter().filter_map(|guest| guest.silent_seconds).reduce(f64::max);
    spans.extend(silent.map(|seconds| format!(" for {seconds:.0} s").yellow()));
    spans.push(if shown.acting { "" } else { "  watched only" }.into());
    Line::from(spans)
}

fn headlines<'a>(top: &'a Top, shown: &Management) -> Vec<Line<'a>> {
    let pages = |pages: u64| size(pages as f64);
    let mut lines = vec![title(top, Some(shown))];
    let Some(host) = &shown.host else { return lines };
    let percent = 100.0 * host.used_pages as f64 / host.capacity_pages.max(1) as f64;
    let mut memory = format!(
        "capacity {}  used {} ({percent:.0} %)  free {}",
        pages(host.capacity_pages),
        pages(host.used_pages),
        pages(host.free_pages)
    );
    let Some(ledger) = &shown.ledger else {
        lines.push(Line::from(memory));
        return lines;
    };
    let promised = ledger.promised as f64 / host.used_pages.max(1) as f64;
    memory.push_str(&format!("  promised {} ({promised:.2} x used)", pages(ledger.promised)));
    lines.push(Line::from(memory));
    lines.push(debt(ledger));
    lines
}

fn debt(ledger: &Ledger) -> Line<'static> {
    let pages = |pages: u64| size(pages as f64);
    let (debt, cover) = (&ledger.debt, &ledger.cover);
    let owed = format!(
        "debt {} (sharing {}, demand {})  cover {}, ",
        pages(debt.total()),
        pages(debt.sharing),
        pages(debt.demand),
        pages(cover.total())
    );
    let (ratio, color) = match ledger.cover_ratio {
        None => ("nothing is owed".to_owned(), Color::Green),
        Some(ratio) if ratio < 0.5 => (format!("{ratio:.2} x debt"), Color::Red),
        Some(ratio) if ratio < 1.0 => (format!("{ratio:.2} x debt"), Color::Yellow),
        Some(ratio) => (format!("{ratio:.2} x debt"), Color::Green),
    };
    let estimated = if ledger.estimated { "  (estimated)" } else { "" };
    // An age of less than two readings is normal.
    let old = ledger.oldest_split_seconds().filter(|age| *age >= 2.0);
    let old = old.map_or(String::new(), |age| format!("  (split {age:.0} s old)"));
    Line::from(vec![owed.into(), ratio.fg(color), estimated.into(), old.into()])
}

fn draw_rates(frame: &mut Frame, top: &Top, shown: &Management, area: Rect) {
    let rate = |pages: f64| format!("{}{}/s", if pages > 0.0 { "+" } else { "" }, size(pages));
    let text = format!(
        "saved {}  balloons {}  free ",
        rate(top.merged_pages_per_second()),
        rate(top.ballooned_pages_per_second())
    );
    let width = u16::try_from(text.chars().count()).unwrap_or(u16::MAX);
    let [left, right] = Layout::horizontal([Constraint::Length(width), Constraint::Min(0)]).areas(area);
    frame.render_widget(Paragraph::new(text), left);
    let capacity = shown.host.as_ref().map_or(1, |host| host.capacity_pages).max(1);
    let line = Sparkline::default()
        .data(top.free_pages(usize::from(right.width).min(MAX_SAMPLES)))
        .max(capacity)
        .style(Style::new().fg(Color::Cyan));
    frame.render_widget(line, right);
}

fn draw_action_log(frame: &mut Frame, shown: &Management, area: Rect) {
    let action_log = &shown.action_log;
    let done: u64 = action_log.counts.values().sum();
    let title = format!(" actions: {done}, {} failed ", action_log.failed);
    let block = Block::new().borders(Borders::TOP).title(title);
    let lines = usize::from(block.inner(area).height);
    let skipped = action_log.entries.len().saturating_sub(lines);
    let mut text: Vec<Line> = action_log.entries.iter().skip(skipped).map(action_line).collect();
    if text.is_empty() {
        let why = if shown.acting { "nothing yet" } else { "nothing: the fleet file asks for no policy" };
        text.push(Line::from(why.dim()));
    }
    frame.render_widget(Paragraph::new(text).block(block), area);
}

/// An entry of the action log in one line.
fn action_line(entry: &Entry) -> Line<'_> {
    let target = entry.guest.as_deref().unwrap_or("engine");
    let mut line = Line::from(format!("{:>9.1} s  {target}: {}", entry.seconds, entry.text));
    if let Some(error) = &entry.error {
        line.push_span(format!("  failed: {error}").fg(Color::Red));
    }
    line
}

fn keys_line(top: &Top) -> Line<'static> {
    let key = |key: &'static str| key.bold().reversed();
    Line::from(vec![
        key("q"),
        " quit  ".into(),
        key("s"),
        format!(" sort: {}  ", top.sort.name()).into(),
        key("r"),
        " reverse  ".into(),
        key("p"),
        if top.is_held() { " go on  ".into() } else { " hold  ".into() },
        key("?"),
        " help".into(),
    ])
}

fn draw_help(frame: &mut Frame, area: Rect) {
    let mut lines: Vec<Line> = KEYS
        .iter()
        .map(
            |(key, does)| {
                if key.is_empty() { Line::from(*does) } else { Line::from(format!("{key:>10}  {does}")) }
            },
        )
        .collect();
    lines.insert(KEYS.len() - 2, Line::from(""));
    let block = Block::bordered().title(" keys ");
    let [place] = Layout::vertical([Constraint::Length(lines.len() as u16 + 3)])
        .flex(ratatui::layout::Flex::Center)
        .areas(area);
    let [place] =
        Layout::horizontal([Constraint::Length(70)]).flex(ratatui::layout::Flex::Center).areas(place);
    frame.render_widget(Clear, place);
    frame.render_widget(Paragraph::new(lines).wrap(Wrap { trim: false }).block(block), place);
}

#[cfg(test)]
#[path = "draw_tests.rs"]
mod tests;
