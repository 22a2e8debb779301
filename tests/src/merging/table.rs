//! The result, for people and for programs.

use std::fmt::Write;

use serde_json::{Map, Value, json};

use super::course::Outcome;
use super::figures::{Better, FIGURES, Figure, Round, best, spread, times_better};
use lab::contender::Contender;

/// All rounds of one contender.
#[derive(Clone, Debug)]
pub struct Record {
    pub contender: Contender,
    pub outcomes: Vec<Outcome>,
}

impl Record {
    fn rounds(&self) -> Vec<Round> {
        self.outcomes.iter().map(|outcome| outcome.figures.clone()).collect()
    }
}

/// All records, with what the ratios are made of.
pub struct Table {
    records: Vec<(Contender, Vec<Round>)>,
}

impl Table {
    #[must_use]
    pub fn of(records: &[Record]) -> Self {
        Self { records: records.iter().map(|record| (record.contender, record.rounds())).collect() }
    }

    fn ksms(&self) -> impl Iterator<Item = &(Contender, Vec<Round>)> {
        self.records.iter().filter(|(contender, _)| contender.is_ksm())
    }

    fn slab(&self, figure: &Figure) -> Option<f64> {
        let (_, rounds) = self.records.iter().find(|(contender, _)| *contender == Contender::Slab)?;
        spread(rounds, figure.key).map(|spread| spread.median)
    }

    /// Which KSM is best at it, and how many times better the slab engine is.
    fn against_best(&self, figure: &Figure) -> Option<(&'static str, f64)> {
        let ours = self.slab(figure)?;
        let others: Vec<&[Round]> = self.ksms().map(|(_, rounds)| rounds.as_slice()).collect();
        let (n, theirs) = best(figure, &others)?;
        let (contender, _) = self.ksms().nth(n)?;
        Some((contender.name(), times_better(figure, ours, theirs)?))
    }

    /// For people: a row for each figure, a column for each contender, and the ratios.
    #[must_use]
    pub fn text(&self) -> String {
        let mut text = String::new();
        let mut line = |label: &str, cells: Vec<String>| {
            let cells: String = cells.iter().map(|cell| format!(" {cell:>12}")).collect();
            // Writing to a string does not fail.
            let _ = writeln!(text, "{label:<46}{}", cells.trim_end());
        };
        let mut head: Vec<String> = self.records.iter().map(|(who, _)| who.name().to_owned()).collect();
        head.extend(self.ksms().map(|(who, _)| format!("x {}", who.name())));
        head.push("x best".into());
        line("median (x: times better slab is)", head);
        for figure in FIGURES {
            let medians = self.records.iter().map(|(_, rounds)| {
                spread(rounds, figure.key).map_or_else(|| "-".into(), |spread| number(spread.median))
            });
            let mut cells: Vec<String> = medians.collect();
            if figure.better != Better::Neither {
                cells.extend(self.ksms().map(|(_, rounds)| {
                    let theirs = spread(rounds, figure.key).map(|spread| spread.median);
                    let times = self.slab(figure).zip(theirs);
                    times
                        .and_then(|(ours, theirs)| times_better(figure, ours, theirs))
                        .map_or_else(|| "-".into(), ratio)
                }));
                cells.push(self.against_best(figure).map_or_else(|| "-".into(), |(_, times)| ratio(times)));
            }
            line(figure.label, cells);
        }
        text
    }

    /// For programs: figures by contender, and the ratios.
    #[must_use]
    pub fn json(&self, records: &[Record]) -> Value {
        let contenders = self.records.iter().zip(records).map(|((who, rounds), record)| {
            let figures: Map<String, Value> = FIGURES
                .iter()
                .map(|figure| {
                    let values: Vec<_> = rounds.iter().map(|round| round.get(figure.key)).collect();
                    let spread = spread(rounds, figure.key).map(|spread| {
                        json!({"median": spread.median, "least": spread.least, "most": spread.most, "rounds": values})
                    });
                    (figure.key.to_owned(), spread.unwrap_or_else(|| json!({"median": null, "rounds": values})))
                })
                .collect();
            let last = record.outcomes.last();
            let knobs: Map<String, Value> = last
                .iter()
                .flat_map(|outcome| outcome.knobs.iter().map(|(name, value)| ((*name).to_owned(), json!(value))))
                .collect();
            let notes: Vec<_> = last.iter().flat_map(|outcome| &outcome.notes).collect();
            json!({"name": who.name(), "knobs": knobs, "notes": notes, "figures": figures})
        });
        let contenders: Vec<Value> = contenders.collect();
        let ratios: Map<String, Value> = FIGURES
            .iter()
            .filter(|figure| figure.better != Better::Neither)
            .map(|figure| {
                let mut of: Map<String, Value> = self
                    .ksms()
                    .map(|(who, rounds)| {
                        let theirs = spread(rounds, figure.key).map(|spread| spread.median);
                        let times = self.slab(figure).zip(theirs);
                        let times = times.and_then(|(ours, theirs)| times_better(figure, ours, theirs));
                        (who.name().to_owned(), json!(times))
                    })
                    .collect();
                let best = self.against_best(figure);
                of.insert(
                    "best".into(),
                    json!(best.map(|(who, times)| json!({"name": who, "times": times}))),
                );
                (figure.key.to_owned(), Value::Object(of))
            })
            .collect();
        json!({"engines": contenders, "slab_times_better": ratios})
    }
}

/// With three digits or so.
fn number(value: f64) -> String {
    match value.abs() {
        0.0 => "0".into(),
        large if large >= 100.0 => format!("{value:.0}"),
        middle if middle >= 1.0 => format!("{value:.2}"),
        small if small >= 0.001 => format!("{value:.4}"),
        _ => format!("{value:.0e}"),
    }
}

fn ratio(times: f64) -> String {
    format!("{}x", number(times))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(contender: Contender, figures: &[(&'static str, f64)]) -> Record {
        let outcome = Outcome { figures: figures.iter().copied().collect(), ..Outcome::default() };
        Record { contender, outcomes: vec![outcome] }
    }

    #[test]
    fn ratios_are_against_each_and_against_the_best_that_got_there() {
        let records = [
            record(Contender::KsmDefault, &[("idle_cpu_percent", 2.0)]),
            record(Contender::Ksm, &[("seconds", 3.0), ("idle_cpu_percent", 60.0)]),
            record(Contender::Slab, &[("seconds", 1.5), ("idle_cpu_percent", 6.0)]),
        ];
        let table = Table::of(&records);
        let json = table.json(&records);
        let idle = &json["slab_times_better"]["idle_cpu_percent"];
        assert_eq!(idle["ksm"], 10.0);
        assert!(idle["ksm-default"].as_f64().is_some_and(|times| (times - 1.0 / 3.0).abs() < 1e-9));
        assert_eq!(idle["best"], json!({"name": "ksm", "times": 10.0}));
        assert_eq!(json["slab_times_better"]["seconds"]["ksm-default"], Value::Null);
        let text = table.text();
        let row = text.lines().find(|line| line.starts_with("engine CPU, nothing changes")).unwrap();
        let words: Vec<_> = row.split_whitespace().rev().take(6).collect();
        assert_eq!(words, ["10.00x", "10.00x", "0.3333x", "6.00", "60.00", "2.00"]);
    }

    #[test]
    fn without_a_slab_there_are_no_ratios() {
        let records = [record(Contender::Ksm, &[("seconds", 3.0)])];
        assert_eq!(
            Table::of(&records).json(&records)["slab_times_better"]["seconds"],
            json!({"ksm": null, "best": null})
        );
    }
}
