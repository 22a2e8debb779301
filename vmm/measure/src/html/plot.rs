//! What the plots of a page show.

/// Horizontal bars.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Bars {
    pub title: String,
    /// What the values are in, such as `MiB`.
    pub unit: String,
    /// What each part of a bar is; one name only: no stack, no legend. At most six have a colour of
    /// their own.
    pub series: Vec<String>,
    /// Each bar's label, and a value (0 or more) for each series.
    pub bars: Vec<(String, Vec<f64>)>,
}

#[derive(Clone, Debug, Default, PartialEq)]
pub struct Lines {
    pub title: String,
    /// What runs to the right, with its unit.
    pub x: String,
    /// What runs up, with its unit. The axis begins at 0.
    pub y: String,
    /// Name and points of each, by x. At most six have a colour of their own.
    pub series: Vec<(String, Vec<(f64, f64)>)>,
}

#[derive(Clone, Debug, Default, PartialEq)]
pub struct Histogram {
    pub title: String,
    /// What the bins are of.
    pub x: String,
    /// What is counted.
    pub y: String,
    /// Label and value (0 or more) of each.
    pub bins: Vec<(String, f64)>,
}

/// A square of numbers.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Matrix {
    pub title: String,
    pub unit: String,
    /// Of rows and columns alike.
    pub labels: Vec<String>,
    /// Values (0 or more): a row and a column for each label.
    pub values: Vec<Vec<f64>>,
}

/// A number for people: three significant digits, thousands apart.
pub fn number(value: f64) -> String {
    if value != 0.0 && value.abs() < 100.0 && value.fract().abs() > 1e-9 {
        let decimals = if value.abs() < 1.0 { 3 } else { 1 };
        return format!("{value:.decimals$}");
    }
    let digits = format!("{:.0}", value.abs());
    let mut text = String::from(if value <= -0.5 { "-" } else { "" });
    for (at, digit) in digits.char_indices() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            text.push('\u{a0}');
        }
        text.push(digit);
    }
    text
}
