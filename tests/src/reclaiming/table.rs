//! The result, for people and for programs.

use std::fmt::Write;

use lab::spread::Spread;
use serde_json::{Map, Value, json};

use super::point::{MIB_PAGES, Point, Way};
use crate::merging::figures::{Round, spread};

/// What is compared with the control of the same round.
const RATIOS: [(&str, &str); 4] = [
    ("writes_per_second", "writes a second, times the control's"),
    ("first_pages_per_second", "first round over its pages, times the control's"),
    ("write_p50_ns", "write p50, times the control's"),
    ("write_p99_ns", "write p99, times the control's"),
];

/// What is shown as it is.
const FIGURES: [(&str, &str); 8] = [
    ("reclaim_seconds", "seconds to take it"),
    ("writes_per_second", "writes a second"),
    ("first_pages_per_second", "first round over its pages, pages a second"),
    ("write_p50_ns", "write p50, ns"),
    ("write_p99_ns", "write p99, ns"),
    ("present_mib", "in memory at the end, MiB"),
    ("swapped_mib", "on swap at the end, MiB"),
    ("ballooned_mib", "in the balloon, MiB"),
];

/// All rounds of one point.
#[derive(Clone, Debug)]
pub struct Record {
    /// What was taken.
    pub point: Point,
    /// What the guest worked on.
    pub working_set_pages: u64,
    /// Each way's rounds, in the order of [`Way::ALL`].
    pub rounds: [Vec<Round>; Way::ALL.len()],
}

impl Record {
    fn rounds(&self, way: Way) -> &[Round] {
        Way::ALL.iter().position(|w| *w == way).map_or(&[], |place| &self.rounds[place])
    }

    /// A figure of one way over the control's of the same round. None if one of them lacks it.
    fn ratio(&self, way: Way, key: &'static str) -> Option<Spread> {
        let pairs = self.rounds(way).iter().zip(self.rounds(Way::Sized));
        let over = |(way, control): (&Round, &Round)| {
            let (way, control) = (way.get(key)?, control.get(key).filter(|control| **control > 0.0)?);
            Some(Round::from([(key, way / control)]))
        };
        spread(&pairs.map(over).collect::<Option<Vec<_>>>()?, key)
    }

    fn control_mib(&self) -> u64 {
        self.point.control_mib(self.working_set_pages)
    }

    /// For people: a row for each figure, a column for each way.
    #[must_use]
    pub fn text(&self) -> String {
        let Point { memory_mib, reclaim_percent, working_set_percent } = self.point;
        // Writing to a string does not fail.
        let mut text = String::new();
        let _ = writeln!(
            text,
            "take {reclaim_percent} % of {memory_mib} MiB; a working set of {working_set_percent} % of the {} MiB left, {} MiB; a control of {} MiB",
            self.point.left_mib(),
            self.working_set_pages / MIB_PAGES,
            self.control_mib(),
        );
        let mut line = |label: &str, cells: [String; Way::ALL.len()]| {
            let cells: String = cells.iter().map(|cell| format!(" {cell:>24}")).collect();
            let _ = writeln!(text, "  {label:<48}{}", cells.trim_end());
        };
        line("median [least, most]", Way::ALL.map(|way| way.name().to_owned()));
        for (key, label) in RATIOS {
            line(
                label,
                Way::ALL.map(|way| if way == Way::Sized { "1".into() } else { cell(self.ratio(way, key)) }),
            );
        }
        for (key, label) in FIGURES {
            line(label, Way::ALL.map(|way| cell(spread(self.rounds(way), key))));
        }
        text
    }

    /// For programs.
    #[must_use]
    pub fn json(&self) -> Value {
        let ways: Map<String, Value> = Way::ALL
            .iter()
            .map(|way| {
                let figures: Map<String, Value> = FIGURES
                    .iter()
                    .filter_map(|(key, _)| Some(((*key).into(), json(spread(self.rounds(*way), key)?))))
                    .collect();
                let ratios: Map<String, Value> = RATIOS
                    .iter()
                    .filter_map(|(key, _)| Some(((*key).into(), json(self.ratio(*way, key)?))))
                    .collect();
                (way.name().into(), json!({"figures": figures, "times_control": ratios}))
            })
            .collect();
        json!({
            "memory_mib": self.point.memory_mib, "reclaim_percent": self.point.reclaim_percent,
            "working_set_percent": self.point.working_set_percent, "left_mib": self.point.left_mib(),
            "working_set_pages": self.working_set_pages, "control_mib": self.control_mib(), "ways": ways,
        })
    }
}

fn json(spread: Spread) -> Value {
    json!({"median": spread.median, "least": spread.least, "most": spread.most})
}

fn cell(spread: Option<Spread>) -> String {
    spread.map_or_else(
        || "-".into(),
        |Spread { median, least, most }| {
            let digits = if median >= 100.0 { 0 } else { 2 };
            format!("{median:.digits$} [{least:.digits$}, {most:.digits$}]")
        },
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(control: [f64; 3], swap: &[f64]) -> Record {
        let rounds =
            |values: &[f64]| values.iter().map(|v| Round::from([("writes_per_second", *v)])).collect();
        Record {
            point: Point { memory_mib: 256, reclaim_percent: 50, working_set_percent: 90 },
            working_set_pages: 29_491,
            rounds: [rounds(&control), Vec::new(), rounds(swap), Vec::new()],
        }
    }

    #[test]
    fn a_ratio_is_of_the_same_round() {
        let record = record([100.0, 200.0, 400.0], &[50.0, 150.0, 80.0]);
        let ratio = record.ratio(Way::Swap, "writes_per_second");
        assert_eq!(ratio, Some(Spread { median: 0.5, least: 0.2, most: 0.75 }));
        assert_eq!(record.ratio(Way::Balloon, "writes_per_second"), None);
        assert_eq!(record.json()["ways"]["swap"]["times_control"]["writes_per_second"]["least"], 0.2);
        assert!(record.text().contains("0.50 [0.20, 0.75]"), "{}", record.text());
    }

    #[test]
    fn without_the_control_there_is_no_ratio() {
        assert_eq!(record([0.0; 3], &[1.0; 3]).ratio(Way::Swap, "writes_per_second"), None);
    }
}
