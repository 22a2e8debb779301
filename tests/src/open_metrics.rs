//! Reads OpenMetrics text as strictly as its specification is written, and more: every metric must
//! have help and type.

use std::collections::{BTreeMap, BTreeSet};

use thiserror::Error;

/// Why a text is not OpenMetrics.
#[derive(Debug, Error, PartialEq, Eq)]
#[error("line {line}: {what}: {text:?}")]
pub struct Mistake {
    /// Counted from 1.
    pub line: usize,
    pub what: &'static str,
    pub text: String,
}

/// A metric, with its samples by their labels.
#[derive(Debug, Default, PartialEq)]
pub struct Family {
    /// `counter`, `gauge` or `info`.
    pub kind: String,
    /// What it is about.
    pub help: String,
    /// The unit, if it has one.
    pub unit: Option<String>,
    pub samples: BTreeMap<BTreeMap<String, String>, f64>,
}

/// All metrics of a text, by name.
#[derive(Debug, Default, PartialEq)]
pub struct Metrics(pub BTreeMap<String, Family>);

impl Metrics {
    /// Reads a whole text.
    ///
    /// # Errors
    /// The first line that is wrong.
    pub fn parse(text: &str) -> Result<Self, Mistake> {
        let mut metrics = Self::default();
        let mut current: Option<(String, Family)> = None;
        let lines: Vec<&str> = text.split('\n').collect();
        for (index, line) in lines.iter().enumerate() {
            let wrong = |what| Mistake { line: index + 1, what, text: (*line).to_owned() };
            if *line == "# EOF" {
                metrics.close(current.take()).map_err(wrong)?;
                return match lines[index + 1..] {
                    [""] => Ok(metrics),
                    _ => Err(wrong("expected one line feed and nothing else after it")),
                };
            }
            match line.strip_prefix("# ") {
                Some(about) => metrics.describe(&mut current, about).map_err(wrong)?,
                None => {
                    let (name, family) = current.as_mut().ok_or_else(|| wrong("a sample of no metric"))?;
                    sample(name, family, line).map_err(wrong)?;
                }
            }
        }
        Err(Mistake { line: lines.len(), what: "expected # EOF", text: String::new() })
    }

    fn describe(&mut self, current: &mut Option<(String, Family)>, about: &str) -> Result<(), &'static str> {
        let mut words = about.splitn(3, ' ');
        let (Some(what), Some(name), Some(value)) = (words.next(), words.next(), words.next()) else {
            return Err("expected HELP, TYPE or UNIT, a name and a value");
        };
        if !is_name(name, true) {
            return Err("this is no name of a metric");
        }
        if current.as_ref().is_none_or(|(known, _)| known != name) {
            self.close(current.take())?;
            *current = Some((name.to_owned(), Family::default()));
        }
        let Some((_, family)) = current else { return Err("no metric") };
        if !family.samples.is_empty() {
            return Err("it comes after samples of its metric");
        }
        let place = match what {
            "HELP" => &mut family.help,
            "TYPE" if ["counter", "gauge", "info"].contains(&value) => &mut family.kind,
            "UNIT" if name.ends_with(&format!("_{value}")) => family.unit.get_or_insert_default(),
            "UNIT" => return Err("the name does not end in the unit"),
            _ => return Err("expected HELP, TYPE (counter, gauge or info) or UNIT"),
        };
        match place.is_empty() && !value.is_empty() {
            true => *place = value.to_owned(),
            false => return Err("it is said twice, or not at all"),
        }
        Ok(())
    }

    fn close(&mut self, done: Option<(String, Family)>) -> Result<(), &'static str> {
        let Some((name, family)) = done else { return Ok(()) };
        if family.kind.is_empty() || family.help.is_empty() {
            return Err("the metric before this has no type or no help");
        }
        if family.kind == "info" && family.unit.is_some() {
            return Err("the metric before this is an info with a unit");
        }
        match self.0.insert(name, family) {
            None => Ok(()),
            Some(_) => Err("the metric before this is there twice"),
        }
    }

    /// The names of samples there can be: what queries use.
    #[must_use]
    pub fn sample_names(&self) -> BTreeSet<String> {
        self.0.iter().map(|(name, family)| format!("{name}{}", suffix(&family.kind))).collect()
    }

    /// The samples of a metric that have all these labels.
    ///
    /// # Panics
    /// If there is no such metric.
    #[must_use]
    #[track_caller]
    pub fn samples(&self, name: &str, labels: &[(&str, &str)]) -> Vec<f64> {
        let family = self.0.get(name).unwrap_or_else(|| panic!("no metric {name}"));
        let matching = |of: &BTreeMap<String, String>| {
            labels.iter().all(|(label, value)| of.get(*label).is_some_and(|v| v == value))
        };
        family.samples.iter().filter(|(of, _)| matching(of)).map(|(_, value)| *value).collect()
    }

    /// The only sample with these labels.
    ///
    /// # Panics
    /// If there is none, or more than one.
    #[must_use]
    #[track_caller]
    pub fn value(&self, name: &str, labels: &[(&str, &str)]) -> f64 {
        match self.samples(name, labels)[..] {
            [value] => value,
            ref others => panic!("{} samples of {name} {labels:?}", others.len()),
        }
    }
}

fn suffix(kind: &str) -> &'static str {
    match kind {
        "counter" => "_total",
        "info" => "_info",
        _ => "",
    }
}

/// `[a-zA-Z_][a-zA-Z0-9_]*`; the name of a metric may have colons too.
fn is_name(name: &str, of_metric: bool) -> bool {
    let allowed = |c: char| c.is_ascii_alphanumeric() || c == '_' || (of_metric && c == ':');
    !name.is_empty() && name.chars().all(allowed) && !name.starts_with(|c: char| c.is_ascii_digit())
}

fn sample(family_name: &str, family: &mut Family, line: &str) -> Result<(), &'static str> {
    let name = format!("{family_name}{}", suffix(&family.kind));
    let rest =
        line.strip_prefix(&name).ok_or("a sample of another metric, or without the suffix of its type")?;
    let (labels, value) = match rest.strip_prefix('{') {
        Some(rest) => labels(rest)?,
        None => (BTreeMap::new(), rest),
    };
    let value = value.strip_prefix(' ').ok_or("expected one blank before the value")?;
    if value.contains(' ') {
        return Err("expected no time");
    }
    let number: f64 = value.parse().map_err(|_| "the value is no number")?;
    let spelt = number.is_finite() && !value.contains(['n', 'N', 'i', 'I']);
    match family.kind.as_str() {
        _ if !spelt => return Err("the value is not finite"),
        "counter" if number < 0.0 => return Err("a counter below 0"),
        "info" if number != 1.0 => return Err("an info that is not 1"),
        _ => {}
    }
    match family.samples.insert(labels, number) {
        None => Ok(()),
        Some(_) => Err("the labels are there twice"),
    }
}

/// Labels, and what comes after them.
fn labels(mut rest: &str) -> Result<(BTreeMap<String, String>, &str), &'static str> {
    let mut labels = BTreeMap::new();
    loop {
        let (name, after) = rest.split_once("=\"").ok_or("expected a label, = and a quote")?;
        if !is_name(name, false) || name.starts_with("__") {
            return Err("this is no name of a label");
        }
        let (value, after) = quoted(after)?;
        if labels.insert(name.to_owned(), value).is_some() {
            return Err("a label is there twice");
        }
        rest = match after.strip_prefix('}') {
            Some(after) => return Ok((labels, after)),
            None => after.strip_prefix(',').ok_or("expected a comma or a brace after a label")?,
        };
    }
}

/// A value up to its closing quote, and what comes after that.
fn quoted(text: &str) -> Result<(String, &str), &'static str> {
    let mut value = String::new();
    let mut chars = text.char_indices();
    while let Some((at, c)) = chars.next() {
        match c {
            '"' => return Ok((value, &text[at + 1..])),
            '\\' => match chars.next() {
                Some((_, 'n')) => value.push('\n'),
                Some((_, c @ ('"' | '\\'))) => value.push(c),
                _ => return Err("an escape that there is not"),
            },
            c => value.push(c),
        }
    }
    Err("a label without its closing quote")
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = "# HELP a_bytes What a has.\n# TYPE a_bytes gauge\n# UNIT a_bytes bytes\na_bytes{g=\"x\",c=\"p\\\"q\"} 1.5\n\
                        a_bytes{g=\"y\",c=\"r\"} 2\n# HELP b B.\n# TYPE b counter\nb_total 3\n# EOF\n";

    #[test]
    fn what_is_right_is_read() {
        let metrics = Metrics::parse(GOOD).unwrap();
        assert_eq!(metrics.value("a_bytes", &[("c", "p\"q")]), 1.5);
        assert_eq!(metrics.samples("a_bytes", &[]), [1.5, 2.0]);
        assert_eq!(metrics.value("b", &[]), 3.0);
        assert_eq!(metrics.sample_names().into_iter().collect::<Vec<_>>(), ["a_bytes", "b_total"]);
    }

    #[test]
    fn every_mistake_is_found() {
        for (right, wrong) in [
            ("# EOF\n", ""),
            ("# EOF\n", "# EOF"),
            ("# EOF\n", "# EOF\n\n"),
            ("# HELP b B.\n", ""),
            ("# HELP b B.\n", "# HELP b \n"),
            ("# TYPE b counter\n", ""),
            ("# TYPE b counter\n", "# TYPE b number\n"),
            ("# TYPE b counter\n", "# TYPE b counter\n# TYPE b counter\n"),
            ("# UNIT a_bytes bytes", "# UNIT a_bytes seconds"),
            ("# HELP b B.", "# HELP 2b B."),
            ("b_total 3", "b 3"),
            ("b_total 3", "b_total -3"),
            ("b_total 3", "b_total 3 17"),
            ("b_total 3", "b_total  3"),
            ("b_total 3", "b_total NaN"),
            ("b_total 3", "b_total x"),
            ("b_total 3", "b_total 3\nb_total 3"),
            ("b_total 3", "b_total 3\n"),
            ("g=\"y\"", "__g=\"y\""),
            ("g=\"y\"", "g=\"y\",g=\"y\""),
            ("g=\"y\"", "g=y"),
            ("g=\"y\"", "g=\"y\\x\""),
            ("c=\"r\"}", "c=\"r\",}"),
            ("{g=\"y\",c=\"r\"}", "{g=\"x\",c=\"p\\\"q\"}"),
            ("# HELP b B.", "a_bytes{g=\"z\"} 1\n# UNIT a_bytes bytes\n# HELP b B."),
            ("# HELP b B.\n# TYPE b counter\nb_total 3", "# HELP a_bytes A.\n# TYPE a_bytes gauge"),
        ] {
            assert!(GOOD.contains(right), "{right}");
            let text = GOOD.replacen(right, wrong, 1);
            assert!(Metrics::parse(&text).is_err(), "{text}");
        }
    }
}
