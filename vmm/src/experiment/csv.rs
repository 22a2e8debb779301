//! Every number of an experiment as CSV, one a line.

use std::fmt::Write;

use lab::experiment::run::Outcome;

/// `repetition,variant,engine,guests,name,at,value` lines, with a heading; `at` is empty for a
/// single figure, and what runs to the right for a series.
pub(super) fn text(outcome: &Outcome) -> String {
    let mut text = String::from("repetition,variant,engine,guests,name,at,value\n");
    for trial in &outcome.trials {
        let point = &trial.point;
        let head =
            format!("{},{},{},{}", trial.repetition, quoted(&point.variant), point.engine, point.guests);
        for (name, value) in &trial.measured.figures {
            let _ = writeln!(text, "{head},{name},,{value}");
        }
        for (name, points) in &trial.measured.series {
            for (at, value) in points {
                let _ = writeln!(text, "{head},{name},{at},{value}");
            }
        }
    }
    text
}

/// A variant's name is free text from its plan.
fn quoted(text: &str) -> String {
    match text.contains([',', '"', '\n', '\r']) {
        true => format!("\"{}\"", text.replace('"', "\"\"")),
        false => text.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_cannot_break_a_line() {
        assert_eq!(quoted("plain name"), "plain name");
        assert_eq!(quoted("a, \"b\""), "\"a, \"\"b\"\"\"");
    }
}
