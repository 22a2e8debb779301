//! Shapes and axes in SVG, as text.

use std::fmt::Write;

/// Width of every drawing in its own units; the page scales it.
pub(super) const WIDTH: f64 = 760.0;

/// From one line of a legend to the next.
const LEGEND_LINE: f64 = 18.0;

/// Escapes text for HTML and SVG.
pub(super) fn escaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            _ => out.push(c),
        }
    }
    out
}

/// At most `most` characters, with a mark where the middle was left out.
pub(super) fn shortened(text: &str, most: usize) -> String {
    let count = text.chars().count();
    if count <= most {
        return text.to_owned();
    }
    let head: String = text.chars().take(most / 3).collect();
    let tail: String = text.chars().skip(count - (most - most / 3 - 1)).collect();
    format!("{head}\u{2026}{tail}")
}

/// Where a text is held.
#[derive(Clone, Copy)]
pub(super) enum Anchor {
    Start,
    Middle,
    End,
}

/// A drawing in the making. Coordinates run right and down.
pub(super) struct Svg {
    body: String,
    height: f64,
    /// How much lower than asked for things are drawn.
    down: f64,
}

impl Svg {
    /// An empty one of this height.
    pub(super) fn new(height: f64) -> Self {
        Self { body: String::new(), height, down: 0.0 }
    }

    /// A filled rectangle of class `class` that says `title` when pointed at. Nothing if it has no
    /// area.
    pub(super) fn rect(&mut self, [x, y, width, height]: [f64; 4], class: &str, opacity: f64, title: &str) {
        if width <= 0.0 || height <= 0.0 {
            return;
        }
        let y = y + self.down;
        let _ = writeln!(
            self.body,
            "<rect class=\"m {class}\" x=\"{x:.1}\" y=\"{y:.1}\" width=\"{width:.1}\" height=\"{height:.1}\" rx=\"2\" \
             fill-opacity=\"{opacity:.2}\"><title>{}</title></rect>",
            escaped(title)
        );
    }

    /// A line of the grid.
    pub(super) fn rule(&mut self, [x1, y1, x2, y2]: [f64; 4]) {
        let (y1, y2) = (y1 + self.down, y2 + self.down);
        let _ = writeln!(
            self.body,
            "<line class=\"g\" x1=\"{x1:.1}\" y1=\"{y1:.1}\" x2=\"{x2:.1}\" y2=\"{y2:.1}\"/>"
        );
    }

    /// Text with its base line at y.
    pub(super) fn text(&mut self, x: f64, y: f64, anchor: Anchor, class: &str, text: &str) {
        let anchor = match anchor {
            Anchor::Start => "start",
            Anchor::Middle => "middle",
            Anchor::End => "end",
        };
        let y = y + self.down;
        let _ = writeln!(
            self.body,
            "<text class=\"{class}\" x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\">{}</text>",
            escaped(text)
        );
    }

    /// A line through points.
    pub(super) fn line(&mut self, points: &[(f64, f64)], class: &str) {
        let points: Vec<String> =
            points.iter().map(|(x, y)| format!("{x:.1},{:.1}", y + self.down)).collect();
        let _ = writeln!(self.body, "<polyline class=\"l {class}\" points=\"{}\"/>", points.join(" "));
    }

    /// A dot that says `title` when pointed at.
    pub(super) fn dot(&mut self, (x, y): (f64, f64), class: &str, title: &str) {
        let (y, title) = (y + self.down, escaped(title));
        let _ = writeln!(
            self.body,
            "<circle class=\"m {class}\" cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"4\"><title>{title}</title></circle>"
        );
    }

    /// Names of series, each with its colour, from x on, in as many lines as they take. What is
    /// drawn afterwards is drawn below all but the first of them.
    pub(super) fn legend(&mut self, left: f64, names: &[String]) {
        let (mut x, mut y) = (left, 16.0);
        for (n, name) in names.iter().enumerate() {
            let width = 15.0 + 7.0 * name.chars().count() as f64;
            if x > left && x + width > WIDTH {
                (x, y) = (left, y + LEGEND_LINE);
            }
            self.rect([x, y - 9.0, 10.0, 10.0], &fill(n), 1.0, name);
            self.text(x + 15.0, y, Anchor::Start, "", name);
            x += width + 18.0;
        }
        self.down += y - 16.0;
        self.height += y - 16.0;
    }

    /// The element, with a title for screen readers.
    pub(super) fn finish(self, title: &str) -> String {
        format!(
            "<svg role=\"img\" aria-label=\"{}\" viewBox=\"0 0 {WIDTH} {:.0}\">\n{}</svg>\n",
            escaped(title),
            self.height,
            self.body
        )
    }
}

/// The class that fills the nth series; from the seventh on all are like the sixth.
pub(super) fn fill(n: usize) -> String {
    format!("f{}", n.min(5))
}

/// Round numbers from 0 to at least `most`, about five of them.
pub(super) fn ticks(most: f64) -> Vec<f64> {
    if !(most > 0.0 && most.is_finite()) {
        return vec![0.0, 1.0];
    }
    let step = step(most / 4.0);
    let count = (most / step - 1e-9).ceil() as u32;
    (0..=count.max(1)).map(|n| f64::from(n) * step).collect()
}

/// Round numbers within `first..=last`, at most about eight of them.
pub(super) fn ticks_within(first: f64, last: f64) -> Vec<f64> {
    let span = last - first;
    if !(span > 0.0 && span.is_finite() && first.is_finite()) {
        return vec![first];
    }
    let step = step(span / 8.0);
    let start = (first / step - 1e-9).ceil();
    (0..10).map(|n| (start + f64::from(n)) * step).take_while(|tick| *tick <= last + step * 1e-9).collect()
}

/// The least round number that is not less than this: 1, 2, 2.5 or 5 times a power of ten.
fn step(rough: f64) -> f64 {
    let unit = 10f64.powf(rough.log10().floor());
    let step = [1.0, 2.0, 2.5, 5.0, 10.0].iter().map(|n| n * unit).find(|step| *step >= rough * 0.999);
    step.unwrap_or(10.0 * unit)
}
