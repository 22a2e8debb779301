//! The columns of the guests' table: which fit, and their content.

use ratatui::layout::{Alignment, Constraint};
use ratatui::style::{Color, Style};
use ratatui::text::{Line, Span};
use ratatui::widgets::{Cell, Row as TableRow, Table};

use super::class_bar::bar;
use super::state::{Row, Sort};
use memory::PAGE_BYTES;
use overcommit::view::GuestState;

/// Least and most cells of a name.
const NAME_WIDTHS: (u16, u16) = (8, 32);
/// Least and most cells of a bar.
const BAR_WIDTHS: (u16, u16) = (8, 32);
const SIZE_WIDTH: u16 = 6;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Column {
    Name,
    State,
    Bar,
    Promised,
    Resident,
    Frames,
    Saved,
    Balloon,
    WorkingSet,
    Touched,
    Throttle,
    Debt,
    Word,
}

/// All columns from left to right.
const ALL: [Column; 13] = [
    Column::Name,
    Column::State,
    Column::Bar,
    Column::Promised,
    Column::Resident,
    Column::Frames,
    Column::Saved,
    Column::Balloon,
    Column::WorkingSet,
    Column::Touched,
    Column::Throttle,
    Column::Debt,
    Column::Word,
];
/// Columns dropped on a narrow terminal, in this order.
const SPARED: [Column; 3] = [Column::Word, Column::Resident, Column::WorkingSet];

impl Column {
    fn title(self) -> &'static str {
        match self {
            Self::Name => "guest",
            Self::State => "state",
            Self::Bar => "memory",
            Self::Promised => "prom",
            Self::Resident => "resid",
            Self::Frames => "frames",
            Self::Saved => "saved",
            Self::Balloon => "balloon",
            Self::WorkingSet => "wset",
            Self::Touched => "touch",
            Self::Throttle => "limit",
            Self::Debt => "debt",
            Self::Word => "word",
        }
    }

    /// The sort key of this column.
    fn sort(self) -> Option<Sort> {
        match self {
            Self::Name => Some(Sort::Name),
            Self::Frames => Some(Sort::Frames),
            Self::Saved => Some(Sort::Saved),
            Self::Balloon => Some(Sort::Balloon),
            Self::Touched => Some(Sort::Touched),
            Self::Debt => Some(Sort::Debt),
            _ => None,
        }
    }

    /// Its minimum width.
    fn width(self) -> u16 {
        match self {
            Self::Name => NAME_WIDTHS.0,
            Self::State => 5,
            Self::Word => 4,
            Self::Bar => BAR_WIDTHS.0,
            Self::Balloon => 13,
            _ => SIZE_WIDTH,
        }
    }

    fn alignment(self) -> Alignment {
        match self {
            Self::Name | Self::State | Self::Bar => Alignment::Left,
            _ => Alignment::Right,
        }
    }

    fn text(self, row: &Row, width: u16) -> Line<'static> {
        let none = || "-".to_owned();
        let line = match self {
            Self::Name => Line::from(cut(&row.name, usize::from(width))),
            Self::State => {
                let (name, color) = state(row.state);
                Line::from(Span::styled(name, Style::new().fg(color)))
            }
            Self::Bar => Line::from(bar(&row.classes, usize::from(width))),
            Self::Promised => Line::from(size(row.promised_pages as f64)),
            Self::Resident => Line::from(size(row.resident_pages as f64)),
            Self::Frames => Line::from(size(row.frames)),
            Self::Saved => Line::from(size(row.saved)),
            Self::Balloon => Line::from(row.balloon.map_or_else(none, |balloon| {
                format!("{}/{}", size(balloon.actual_pages as f64), size(balloon.target_pages as f64))
            })),
            Self::WorkingSet => {
                Line::from(row.working_set_pages.map_or_else(none, |pages| size(pages as f64)))
            }
            Self::Touched => Line::from(size(row.touched_pages_per_second)),
            Self::Throttle => {
                let limit = row.throttle_pages_per_second;
                let color = if limit.is_some() { Color::Yellow } else { Color::Reset };
                let text = limit.map_or_else(none, |pages| size(pages as f64));
                Line::from(Span::styled(text, Style::new().fg(color)))
            }
            Self::Debt => Line::from(size(row.debt_pages as f64)),
            Self::Word => Line::from(row.age_seconds.map_or_else(none, age)),
        };
        line.alignment(self.alignment())
    }
}

/// The columns that fit into `width`, with their widths and a blank between two; the
/// name column grows up to `longest_name`.
fn widths(width: u16, longest_name: u16) -> Vec<(Column, u16)> {
    let mut columns: Vec<(Column, u16)> = ALL.iter().map(|column| (*column, column.width())).collect();
    let taken = |columns: &[(Column, u16)]| {
        columns.iter().map(|(_, width)| *width).sum::<u16>() + columns.len() as u16 - 1
    };
    for spared in SPARED {
        if taken(&columns) > width {
            columns.retain(|(column, _)| *column != spared);
        }
    }
    let mut left = width.saturating_sub(taken(&columns));
    for (column, wanted) in [(Column::Name, longest_name.min(NAME_WIDTHS.1)), (Column::Bar, BAR_WIDTHS.1)] {
        for (_, width) in columns.iter_mut().filter(|(c, _)| *c == column) {
            let more = wanted.saturating_sub(*width).min(left);
            *width += more;
            left -= more;
        }
    }
    columns
}

/// The table of these guests, `width` cells wide.
pub(super) fn table(rows: &[Row], first: usize, width: u16, sort: Sort, reversed: bool) -> Table<'static> {
    let longest = rows.iter().map(|row| row.name.chars().count()).max().unwrap_or(0);
    let columns = widths(width, u16::try_from(longest).unwrap_or(u16::MAX));
    let header = columns.iter().map(|(column, width)| {
        let arrow = match (column.sort() == Some(sort), reversed) {
            (false, _) => None,
            (true, false) => Some('↓'),
            (true, true) => Some('↑'),
        };
        let line = Line::from(heading(column.title(), arrow, *width)).alignment(column.alignment());
        Cell::from(line).style(Style::new().bold().underlined())
    });
    let lines = rows.iter().skip(first).map(|row| {
        let cells = columns.iter().map(|(column, width)| Cell::from(column.text(row, *width)));
        let style = if row.state == GuestState::Dead { Style::new().dim() } else { Style::new() };
        TableRow::new(cells.collect::<Vec<_>>()).style(style)
    });
    Table::new(lines.collect::<Vec<_>>(), columns.iter().map(|(_, width)| Constraint::Length(*width)))
        .header(TableRow::new(header.collect::<Vec<_>>()))
        .column_spacing(1)
}

/// A title and the sort mark. Where both do not fit, the title is cut at its end: its beginning
/// tells it from others.
fn heading(title: &str, arrow: Option<char>, width: u16) -> String {
    let room = usize::from(width).saturating_sub(usize::from(arrow.is_some()));
    title.chars().take(room).chain(arrow).collect()
}

/// A guest's state, in at most five letters, and its colour.
pub(super) fn state(state: GuestState) -> (&'static str, Color) {
    match state {
        GuestState::Running => ("run", Color::Green),
        GuestState::Suspended => ("susp", Color::Yellow),
        GuestState::Paused => ("pause", Color::Cyan),
        GuestState::Silent => ("mute", Color::Magenta),
        GuestState::Dead => ("dead", Color::Red),
    }
}

/// An age in at most four letters: `3s`, `59m`, `99h`, `9d`.
pub(super) fn age(seconds: f64) -> String {
    match seconds.max(0.0) as u64 {
        seconds @ 0..100 => format!("{seconds}s"),
        seconds @ 100..6000 => format!("{}m", seconds / 60),
        seconds @ 6000..360_000 => format!("{}h", seconds / 3600),
        seconds => format!("{}d", (seconds / 86_400).min(999)),
    }
}

/// Pages as a size in at most six letters: `0`, `123.4M`, `2.0G`.
pub(super) fn size(pages: f64) -> String {
    let bytes = pages * PAGE_BYTES as f64;
    if !(bytes.is_finite() && bytes != 0.0) {
        return "0".into();
    }
    // A number that would round up to 1000 is written in the next unit.
    let units = ["K", "M", "G", "T", "P"];
    let mut number = bytes / 1024.0;
    let mut unit = 0;
    while number.abs() >= 999.95 && unit + 1 < units.len() {
        number /= 1024.0;
        unit += 1;
    }
    format!("{number:.1}{}", units[unit])
}

/// The beginning of a text that is too long, and an ellipsis.
fn cut(text: &str, width: usize) -> String {
    match text.chars().count() <= width {
        true => text.to_owned(),
        false => text.chars().take(width.saturating_sub(1)).chain(['…']).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_fit_and_are_of_binary_units() {
        for (pages, text) in [
            (0.0, "0"),
            (1.0, "4.0K"),
            (256.0, "1.0M"),
            (31_590.4, "123.4M"),
            (524_288.0, "2.0G"),
            (256.0 * 999.96, "1.0G"),
            (-256.0, "-1.0M"),
            (f64::NAN, "0"),
        ] {
            assert_eq!(size(pages), text);
            assert!(size(pages).len() <= usize::from(SIZE_WIDTH));
        }
    }

    #[test]
    fn a_heading_with_its_arrow_fits_its_column() {
        for column in ALL {
            for arrow in [None, Some('↓')] {
                let heading = heading(column.title(), arrow, column.width());
                assert!(heading.chars().count() <= usize::from(column.width()), "{heading}");
                assert!(heading.starts_with(&column.title()[..column.title().len() - 1]), "{heading}");
                assert_eq!(heading.ends_with('↓'), arrow.is_some());
            }
        }
        assert_eq!(heading("frames", Some('↓'), SIZE_WIDTH), "frame↓");
    }

    #[test]
    fn a_narrow_table_does_without_and_a_wide_one_uses_its_width() {
        let total = |width, longest| {
            let columns = widths(width, longest);
            let sum = columns.iter().map(|(_, width)| *width).sum::<u16>() + columns.len() as u16 - 1;
            (columns.len(), sum)
        };
        assert_eq!(total(80, 40), (10, 80));
        assert_eq!(total(100, 5).0, 13);
        assert_eq!(total(250, 5), (13, 122));
        assert_eq!(
            [0.4, 99.0, 100.0, 7000.0, 1e6, f64::INFINITY].map(age),
            ["0s", "99s", "1m", "1h", "11d", "999d"]
        );
        assert_eq!(cut("abcdef", 4), "abc…");
        assert_eq!(cut("abcd", 4), "abcd");
    }
}
