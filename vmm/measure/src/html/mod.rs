//! One self-contained HTML page of tables and plots: no script, no network, readable in light and
//! dark.
//!
//! Fill a [`Page`] with sections, each with items, and print it (`to_string`, or `write!`): that is
//! the file. Colours come from the style sheet alone, so that the page follows the reader's light
//! or dark scheme. Every plot has a title that screen readers read, and each mark the number it
//! stands for.

mod chart;
mod plot;
mod svg;

use std::fmt;

pub use plot::{Bars, Histogram, Lines, Matrix, number};
use svg::escaped;

#[derive(Clone, Debug, Default, PartialEq)]
pub struct Page {
    /// Its title and first heading.
    pub title: String,
    /// A sentence below it.
    pub lead: String,
    pub sections: Vec<Section>,
}

/// A part of a page.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Section {
    pub heading: String,
    /// What the reader should know; may be empty.
    pub text: String,
    pub items: Vec<Item>,
}

/// Something that is shown.
#[derive(Clone, Debug, PartialEq)]
pub enum Item {
    /// Names and what belongs to them, large: for the few numbers that matter.
    KeyValues(Vec<(String, String)>),
    /// Sentences, one below the other.
    Notes(Vec<String>),
    Table(Table),
    /// Horizontal bars, stacked if there are several series.
    Bars(Bars),
    /// Lines over a numeric axis.
    Lines(Lines),
    /// Columns over bins.
    Histogram(Histogram),
    /// A square of numbers, shaded by their size.
    Matrix(Matrix),
}

/// A table. Cells that begin with a digit stand to the right.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Table {
    /// Headings of the columns.
    pub header: Vec<String>,
    /// Rows, as long as the header.
    pub rows: Vec<Vec<String>>,
}

/// Light first; lines are dashed, too, so that one does not hide another that has the same values;
/// dark where the reader's system is. `--s0` to `--s5` stay distinct for colour-blind readers.
const STYLE: &str = "\
:root{color-scheme:light dark;--page:#f9f9f7;--card:#fcfcfb;--ink:#0b0b0b;--soft:#52514e;--mute:#76756f;--rule:#e1e0d9;\
--s0:#2a78d6;--s1:#1baf7a;--s2:#eda100;--s3:#008300;--s4:#4a3aa7;--s5:#e34948}
@media(prefers-color-scheme:dark){:root{--page:#0d0d0d;--card:#1a1a19;--ink:#fff;--soft:#c3c2b7;--mute:#98978f;--rule:#2c2c2a;\
--s0:#3987e5;--s1:#199e70;--s2:#c98500;--s3:#2fa02f;--s4:#9085e9;--s5:#e66767}}
body{margin:0 auto;max-width:70rem;padding:1.5rem;background:var(--page);color:var(--ink);font:16px/1.5 system-ui,sans-serif}
h1{font-size:1.6rem;margin:.2rem 0}h2{font-size:1.15rem;margin:0 0 .4rem}p{color:var(--soft);margin:.2rem 0 .8rem;max-width:48rem}
section{background:var(--card);border:1px solid var(--rule);border-radius:8px;padding:1rem 1.2rem;margin:1rem 0}
figure{margin:.6rem 0 0}figcaption{color:var(--soft);font-size:.9rem}
dl{display:flex;flex-wrap:wrap;gap:1rem 2.2rem;margin:.4rem 0}dt{color:var(--soft);font-size:.85rem}dd{margin:0;font-size:1.5rem}
.scroll{overflow-x:auto}table{border-collapse:collapse;font-size:.9rem;font-variant-numeric:tabular-nums}
th,td{padding:.25rem .8rem .25rem 0;text-align:left;border-bottom:1px solid var(--rule);vertical-align:top;max-width:28rem;overflow-wrap:anywhere}
th{color:var(--soft);font-weight:500}.n{text-align:right}
svg{display:block;width:100%;height:auto;font:12px system-ui,sans-serif}
svg text{fill:var(--soft)}svg .v{fill:var(--ink)}svg .on{fill:#fff}.g{stroke:var(--rule);stroke-width:1}.l{fill:none;stroke-width:2;stroke-linejoin:round}
.m{stroke:var(--card);stroke-width:1.5}.f0{fill:var(--s0)}.f1{fill:var(--s1)}.f2{fill:var(--s2)}.f3{fill:var(--s3)}.f4{fill:var(--s4)}.f5{fill:var(--s5)}
ul{margin:.4rem 0;padding-left:1.2rem;max-width:48rem}li{margin:.2rem 0;overflow-wrap:anywhere}
.k0{stroke:var(--s0)}.k1{stroke:var(--s1);stroke-dasharray:8 4}.k2{stroke:var(--s2);stroke-dasharray:3 4}.k3{stroke:var(--s3)}.k4{stroke:var(--s4)}.k5{stroke:var(--s5)}
";

impl fmt::Display for Page {
    /// The whole HTML file.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let title = escaped(&self.title);
        writeln!(f, "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">")?;
        writeln!(f, "<meta name=\"viewport\" content=\"width=device-width,initial-scale=1\">")?;
        writeln!(f, "<title>{title}</title>\n<style>\n{STYLE}</style>\n</head>\n<body>\n<h1>{title}</h1>")?;
        if !self.lead.is_empty() {
            writeln!(f, "<p>{}</p>", escaped(&self.lead))?;
        }
        self.sections.iter().try_for_each(|section| write!(f, "{section}"))?;
        writeln!(f, "</body>\n</html>")
    }
}

impl fmt::Display for Section {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "<section>\n<h2>{}</h2>", escaped(&self.heading))?;
        if !self.text.is_empty() {
            writeln!(f, "<p>{}</p>", escaped(&self.text))?;
        }
        self.items.iter().try_for_each(|item| write!(f, "{item}"))?;
        writeln!(f, "</section>")
    }
}

impl fmt::Display for Item {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let figure = |f: &mut fmt::Formatter<'_>, title: &str, svg: String| {
            writeln!(f, "<figure><figcaption>{}</figcaption>\n{svg}</figure>", escaped(title))
        };
        match self {
            Self::KeyValues(pairs) => {
                writeln!(f, "<dl>")?;
                for (key, value) in pairs {
                    writeln!(f, "<div><dt>{}</dt><dd>{}</dd></div>", escaped(key), escaped(value))?;
                }
                writeln!(f, "</dl>")
            }
            Self::Notes(notes) => {
                writeln!(f, "<ul>")?;
                notes.iter().try_for_each(|note| writeln!(f, "<li>{}</li>", escaped(note)))?;
                writeln!(f, "</ul>")
            }
            Self::Table(table) => write!(f, "{table}"),
            Self::Bars(bars) => figure(f, &bars.title, chart::bars(bars)),
            Self::Lines(lines) => figure(f, &lines.title, chart::lines(lines)),
            Self::Histogram(histogram) => figure(f, &histogram.title, chart::histogram(histogram)),
            Self::Matrix(matrix) => figure(f, &matrix.title, chart::matrix(matrix)),
        }
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // A column of numbers is one where everything is a number or missing, not one that has a
        // number in it.
        let is_number = |cell: &String| cell.starts_with(|c: char| c.is_ascii_digit() || c == '-');
        let column =
            |n: usize| self.rows.iter().filter_map(move |row| row.get(n)).filter(|cell| !cell.is_empty());
        let are_numbers: Vec<bool> =
            (0..self.header.len()).map(|n| column(n).next().is_some() && column(n).all(is_number)).collect();
        let row = |f: &mut fmt::Formatter<'_>, tag: &str, cells: &[String]| {
            write!(f, "<tr>")?;
            for (n, cell) in cells.iter().enumerate() {
                let class = if are_numbers.get(n) == Some(&true) { " class=\"n\"" } else { "" };
                write!(f, "<{tag}{class}>{}</{tag}>", escaped(cell))?;
            }
            writeln!(f, "</tr>")
        };
        writeln!(f, "<div class=\"scroll\"><table>")?;
        row(f, "th", &self.header)?;
        self.rows.iter().try_for_each(|cells| row(f, "td", cells))?;
        writeln!(f, "</table></div>")
    }
}

#[cfg(test)]
#[path = "html_tests.rs"]
mod tests;
