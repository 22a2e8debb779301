//! The plots of a page.

use super::plot::{Bars, Histogram, Lines, Matrix, number};
use super::svg::{Anchor, Svg, WIDTH, fill, shortened, ticks, ticks_within};

/// Height of a plot with a vertical axis, and where its area lies.
const HEIGHT: f64 = 260.0;
const LEFT: f64 = 70.0;
const RIGHT: f64 = WIDTH - 20.0;
const TOP: f64 = 34.0;
const BOTTOM: f64 = HEIGHT - 42.0;
/// Bars: a row, the bar in it, the room for labels.
const ROW: f64 = 26.0;
const THICK: f64 = 16.0;
const LABEL: f64 = 190.0;
const LABEL_CHARS: usize = 28;
/// Labels that a horizontal axis has room for, and the columns of a matrix that have room for
/// numbers.
const AXIS_LABELS: usize = 12;
const CELLS_WITH_NUMBERS: usize = 10;
/// Width of a digit, about.
const CHAR: f64 = 7.0;

pub(super) fn bars(chart: &Bars) -> String {
    let is_stack = chart.series.len() > 1;
    let top = if is_stack { TOP } else { 8.0 };
    let height = top + ROW * chart.bars.len() as f64 + 8.0;
    let mut svg = Svg::new(height);
    if is_stack {
        svg.legend(LABEL, &chart.series);
    }
    let sums: Vec<f64> = chart.bars.iter().map(|(_, values)| values.iter().sum()).collect();
    let most = sums.iter().copied().fold(0.0, f64::max).max(f64::MIN_POSITIVE);
    // Room for the number behind the longest bar.
    let scale = (RIGHT - LABEL - 90.0) / most;
    for (n, ((label, values), sum)) in chart.bars.iter().zip(&sums).enumerate() {
        let y = top + ROW * n as f64;
        svg.text(LABEL - 8.0, y + 13.0, Anchor::End, "", &shortened(label, LABEL_CHARS));
        let mut x = LABEL;
        for (part, value) in values.iter().enumerate() {
            let name = chart.series.get(part).map_or("", String::as_str);
            let title = format!("{label}, {name}: {} {}", number(*value), chart.unit);
            svg.rect([x, y, value * scale, THICK], &fill(part), 1.0, &title);
            x += value * scale;
        }
        svg.text(x + 6.0, y + 13.0, Anchor::Start, "v", &format!("{} {}", number(*sum), chart.unit));
    }
    svg.finish(&chart.title)
}

/// The grid of a vertical axis from 0 to at least `most`, with its name; where a value lies on it.
fn vertical(svg: &mut Svg, most: f64, name: &str) -> impl Fn(f64) -> f64 + use<> {
    let ticks = ticks(most);
    let top = ticks.last().copied().unwrap_or(1.0);
    let place = move |value: f64| BOTTOM - (BOTTOM - TOP) * value / top;
    for tick in ticks {
        svg.rule([LEFT, place(tick), RIGHT, place(tick)]);
        svg.text(LEFT - 6.0, place(tick) + 4.0, Anchor::End, "", &number(tick));
    }
    svg.text(4.0, 16.0, Anchor::Start, "", name);
    place
}

pub(super) fn lines(chart: &Lines) -> String {
    let mut svg = Svg::new(HEIGHT);
    if chart.series.len() > 1 {
        let names: Vec<String> = chart.series.iter().map(|(name, _)| name.clone()).collect();
        svg.legend(LEFT + 150.0, &names);
    }
    let points = || chart.series.iter().flat_map(|(_, points)| points);
    let y_of = vertical(&mut svg, points().map(|(_, y)| *y).fold(0.0, f64::max), &chart.y);
    let first = points().map(|(x, _)| *x).fold(f64::INFINITY, f64::min);
    let last = points().map(|(x, _)| *x).fold(f64::NEG_INFINITY, f64::max);
    let span = if last > first { last - first } else { 1.0 };
    let x_of = |x: f64| LEFT + 10.0 + (RIGHT - LEFT - 20.0) * (x - first) / span;
    let mut xs: Vec<f64> = points().map(|(x, _)| *x).collect();
    xs.sort_by(f64::total_cmp);
    xs.dedup();
    // A few values, such as numbers of guests, are labelled themselves; of many, round ones between
    // them.
    if xs.len() > AXIS_LABELS {
        xs = ticks_within(first, last);
    }
    let mut end = f64::NEG_INFINITY;
    for x in xs {
        let (at, text) = (x_of(x), number(x));
        let half = CHAR * text.len() as f64 / 2.0;
        // Points need not be evenly apart: a label that would cover the one before is left out.
        if at - half > end {
            svg.text(at, BOTTOM + 16.0, Anchor::Middle, "", &text);
            end = at + half + CHAR;
        }
    }
    svg.text((LEFT + RIGHT) / 2.0, BOTTOM + 34.0, Anchor::Middle, "", &chart.x);
    for (n, (name, points)) in chart.series.iter().enumerate() {
        let placed: Vec<(f64, f64)> = points.iter().map(|(x, y)| (x_of(*x), y_of(*y))).collect();
        svg.line(&placed, &format!("k{}", n.min(5)));
        for ((x, y), at) in points.iter().zip(placed) {
            svg.dot(at, &fill(n), &format!("{name}: {} at {}", number(*y), number(*x)));
        }
    }
    svg.finish(&chart.title)
}

pub(super) fn histogram(chart: &Histogram) -> String {
    let mut svg = Svg::new(HEIGHT);
    let y_of = vertical(&mut svg, chart.bins.iter().map(|(_, value)| *value).fold(0.0, f64::max), &chart.y);
    let step = (RIGHT - LEFT) / chart.bins.len().max(1) as f64;
    let width = (step - 4.0).clamp(1.0, 48.0);
    let labelled = chart.bins.len().div_ceil(AXIS_LABELS).max(1);
    for (n, (label, value)) in chart.bins.iter().enumerate() {
        let middle = LEFT + step * (n as f64 + 0.5);
        let title = format!("{label}: {}", number(*value));
        svg.rect([middle - width / 2.0, y_of(*value), width, BOTTOM - y_of(*value)], "f0", 1.0, &title);
        if n % labelled == 0 {
            svg.text(middle, BOTTOM + 16.0, Anchor::Middle, "", label);
        }
    }
    svg.text((LEFT + RIGHT) / 2.0, BOTTOM + 34.0, Anchor::Middle, "", &chart.x);
    svg.finish(&chart.title)
}

pub(super) fn matrix(chart: &Matrix) -> String {
    let count = chart.labels.len().max(1);
    let cell = ((RIGHT - LABEL) / count as f64).min(64.0);
    let row = cell.min(30.0);
    let mut svg = Svg::new(26.0 + row * count as f64);
    let most = chart.values.iter().flatten().copied().fold(f64::MIN_POSITIVE, f64::max);
    for (r, (label, values)) in chart.labels.iter().zip(&chart.values).enumerate() {
        let y = 22.0 + row * r as f64;
        let name = format!("{} {label}", r + 1);
        if row >= 10.0 {
            svg.text(LABEL - 8.0, y + row / 2.0 + 4.0, Anchor::End, "", &shortened(&name, LABEL_CHARS));
        }
        if cell >= 16.0 {
            svg.text(LABEL + cell * (r as f64 + 0.5), 14.0, Anchor::Middle, "", &(r + 1).to_string());
        }
        for (c, value) in values.iter().enumerate() {
            let x = LABEL + cell * c as f64;
            let other = chart.labels.get(c).map_or("", String::as_str);
            let title = format!("{label} and {other}: {} {}", number(*value), chart.unit);
            let shade = value / most;
            svg.rect([x, y, cell, row], "f0", 0.06 + 0.94 * shade, &title);
            if count <= CELLS_WITH_NUMBERS {
                let class = if shade > 0.75 { "on" } else { "v" };
                svg.text(x + cell / 2.0, y + row / 2.0 + 4.0, Anchor::Middle, class, &number(*value));
            }
        }
    }
    svg.finish(&chart.title)
}
