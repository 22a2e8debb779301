//! The two text formats of Prometheus: its own, and OpenMetrics.
//!
//! - Prometheus' text format 0.0.4, which everything that reads metrics understands: `promtool`,
//!   node_exporter's textfile collector, `curl`. It knows neither units nor the type `info`.
//! - [OpenMetrics 1.0](https://prometheus.io/docs/specs/om/open_metrics_spec/), for a client that
//!   asks for it. Samples of a counter end in `_total`, and its family's name does not.

use std::fmt::Write;

use serde::{Deserialize, Serialize};

/// What metrics are written in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// Prometheus' own text format, 0.0.4: what promtool and node_exporter read
    #[default]
    Text,
    /// OpenMetrics text, 1.0.0
    OpenMetrics,
}

impl Format {
    /// The value of a Content-Type.
    pub fn content_type(self) -> &'static str {
        match self {
            Self::Text => "text/plain; version=0.0.4; charset=utf-8",
            Self::OpenMetrics => "application/openmetrics-text; version=1.0.0; charset=utf-8",
        }
    }
}

/// What the numbers of a family say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// What goes up and down.
    Gauge,
    /// What only goes up; its samples' names end in `_total`.
    Counter,
    /// Labels that say what runs, and the number 1; its sample's name ends in `_info`.
    Info,
}

impl Kind {
    fn suffix(self) -> &'static str {
        match self {
            Self::Gauge => "",
            Self::Counter => "_total",
            Self::Info => "_info",
        }
    }

    fn name(self, format: Format) -> &'static str {
        match (self, format) {
            (Self::Counter, _) => "counter",
            (Self::Info, Format::OpenMetrics) => "info",
            (Self::Gauge | Self::Info, _) => "gauge",
        }
    }
}

/// A metric: what its numbers are of, and the numbers.
#[derive(Clone, Debug)]
pub(super) struct Family {
    /// With its unit, without its kind's suffix.
    pub name: String,
    pub kind: Kind,
    /// What the name ends in, if it is of a unit.
    pub unit: Option<&'static str>,
    pub help: &'static str,
    /// Labels and the number. No two have the same labels.
    pub samples: Vec<(Vec<(String, String)>, f64)>,
}

/// All of `families` as one text.
pub(super) fn write(families: &[Family], format: Format) -> String {
    let mut text = String::new();
    for family in families {
        // Writing to memory does not fail.
        let _ = write_family(&mut text, family, format);
    }
    if format == Format::OpenMetrics {
        text.push_str("# EOF\n");
    }
    text
}

fn write_family(text: &mut String, family: &Family, format: Format) -> std::fmt::Result {
    let Family { name, kind, unit, help, samples } = family;
    let suffix = kind.suffix();
    // Prometheus' own format describes samples by their whole name, OpenMetrics the family.
    let described = match format {
        Format::Text => suffix,
        Format::OpenMetrics => "",
    };
    writeln!(text, "# HELP {name}{described} {}", escaped(help, format == Format::OpenMetrics))?;
    writeln!(text, "# TYPE {name}{described} {}", kind.name(format))?;
    if let (Some(unit), Format::OpenMetrics) = (unit, format) {
        writeln!(text, "# UNIT {name} {unit}")?;
    }
    for (labels, value) in samples {
        write!(text, "{name}{suffix}")?;
        for (index, (label, value)) in labels.iter().enumerate() {
            let before = if index == 0 { '{' } else { ',' };
            write!(text, "{before}{label}=\"{}\"", escaped(value, true))?;
        }
        let close = if labels.is_empty() { "" } else { "}" };
        writeln!(text, "{close} {}", number(*value))?;
    }
    Ok(())
}

/// Text with its backslashes and line feeds escaped, and its quotes where both formats have them
/// so.
fn escaped(text: &str, quotes: bool) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '\\' => escaped.push_str("\\\\"),
            '\n' => escaped.push_str("\\n"),
            '"' if quotes => escaped.push_str("\\\""),
            c => escaped.push(c),
        }
    }
    escaped
}

fn number(value: f64) -> String {
    match value {
        f64::INFINITY => "+Inf".into(),
        f64::NEG_INFINITY => "-Inf".into(),
        value => format!("{value:?}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn families() -> Vec<Family> {
        let labels = vec![("guest".to_owned(), "a\"b\\c\nd".to_owned()), ("kind".to_owned(), "x".to_owned())];
        vec![
            Family {
                name: "m_bytes".into(),
                kind: Kind::Gauge,
                unit: Some("bytes"),
                help: "Of \"a\".",
                samples: vec![(labels, 4096.0), (Vec::new(), 0.5)],
            },
            Family {
                name: "n".into(),
                kind: Kind::Counter,
                unit: None,
                help: "N.",
                samples: vec![(vec![], 1e20)],
            },
            Family {
                name: "b".into(),
                kind: Kind::Info,
                unit: None,
                help: "B.",
                samples: vec![(vec![], 1.0)],
            },
        ]
    }

    #[test]
    fn prometheus_own_format_describes_samples_and_knows_gauges_and_counters() {
        let expected = "# HELP m_bytes Of \"a\".\n# TYPE m_bytes gauge\n\
                        m_bytes{guest=\"a\\\"b\\\\c\\nd\",kind=\"x\"} 4096.0\nm_bytes 0.5\n\
                        # HELP n_total N.\n# TYPE n_total counter\nn_total 1e20\n\
                        # HELP b_info B.\n# TYPE b_info gauge\nb_info 1.0\n";
        assert_eq!(write(&families(), Format::Text), expected);
    }

    #[test]
    fn open_metrics_describes_families_with_units_and_ends() {
        let expected = "# HELP m_bytes Of \\\"a\\\".\n# TYPE m_bytes gauge\n# UNIT m_bytes bytes\n\
                        m_bytes{guest=\"a\\\"b\\\\c\\nd\",kind=\"x\"} 4096.0\nm_bytes 0.5\n\
                        # HELP n N.\n# TYPE n counter\nn_total 1e20\n\
                        # HELP b B.\n# TYPE b info\nb_info 1.0\n# EOF\n";
        assert_eq!(write(&families(), Format::OpenMetrics), expected);
    }

    #[test]
    fn what_is_not_finite_is_spelt_as_both_formats_have_it() {
        assert_eq!(
            [f64::INFINITY, f64::NEG_INFINITY, f64::NAN, -2.0].map(number),
            ["+Inf", "-Inf", "NaN", "-2.0"]
        );
    }
}
