//! The page of results, made of its layout and of what benches have printed.
//!
//! `resources/docs/results/*.json` are what benches and commands printed with `--json`, or figures
//! that were copied by hand from what they printed, which say so (`"transcribed": true`).
//! `page.md.in` beside them is the page with places for figures:
//!
//! - `{{FILE POINTER}}` is the text or number at a JSON pointer of `FILE.json`, or of its
//!   `provenance`; `.N` after it asks for N digits behind the point, `/D` divides by D first;
//! - `{{rows FILE}}` is a table of the file's `rows`, each with `measured`, `where`, `value` and
//!   `command`;
//! - `{{sources}}` is a table of all files: when, on which machine and by which command.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

/// The figures, by the names of their files.
pub type Files = BTreeMap<String, Value>;

#[must_use]
pub fn directory() -> PathBuf {
    crate::workspace().join("resources/docs/results")
}

/// Reads the layout and all figures.
///
/// # Errors
/// A file cannot be read, is no JSON, or does not say where it is from.
pub fn read() -> Result<(String, Files)> {
    let layout = fs::read_to_string(directory().join("page.md.in")).context("page.md.in")?;
    let mut files = Files::new();
    for entry in fs::read_dir(directory())? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "json") {
            let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
            let text = fs::read_to_string(&path).with_context(|| name.clone())?;
            let value: Value = serde_json::from_str(&text).with_context(|| format!("{name}.json"))?;
            source(&value).with_context(|| format!("{name}.json"))?;
            files.insert(name, value);
        }
    }
    Ok((layout, files))
}

/// The page.
///
/// # Errors
/// A place names what is not there, or a file has no place.
pub fn page(layout: &str, files: &Files) -> Result<String> {
    let (mut page, mut rest, mut used) = (String::new(), layout, BTreeSet::new());
    while let Some((before, after)) = rest.split_once("{{") {
        let (place, after) = after.split_once("}}").context("a {{ that is not closed")?;
        page += before;
        let words: Vec<&str> = place.split_whitespace().collect();
        page += &match words[..] {
            ["sources"] => sources(files)?,
            ["rows", name] => {
                used.insert(name);
                rows(file(files, name)?).with_context(|| format!("{{{{{place}}}}}"))?
            }
            [name, pointer, ref form @ ..] => {
                used.insert(name);
                let file = file(files, name)?;
                // Where it is copied by hand, and where a bench has printed it.
                let value = file.pointer(pointer).or_else(|| file.get("provenance")?.pointer(pointer));
                let value = value.with_context(|| format!("{name}.json has nothing at {pointer}"))?;
                shown(value, form).with_context(|| format!("{{{{{place}}}}}"))?
            }
            _ => bail!("{{{{{place}}}}}: expected sources, rows FILE, or FILE POINTER [.DIGITS] [/DIVISOR]"),
        };
        rest = after;
    }
    let idle: Vec<&String> = files.keys().filter(|name| !used.contains(name.as_str())).collect();
    ensure!(idle.is_empty(), "these figures are in no place of the page: {idle:?}");
    Ok(page + rest)
}

fn file<'a>(files: &'a Files, name: &str) -> Result<&'a Value> {
    files.get(name).with_context(|| format!("no {name}.json: there are {:?}", files.keys()))
}

/// A value as the page shows it.
fn shown(value: &Value, form: &[&str]) -> Result<String> {
    if let (Some(text), []) = (value.as_str(), form) {
        return Ok(text.to_owned());
    }
    let mut number = value.as_f64().with_context(|| format!("{value} is no number"))?;
    let mut digits = None;
    for word in form {
        if let Some(count) = word.strip_prefix('.') {
            digits = Some(count.parse::<usize>().with_context(|| format!("{word}: digits"))?);
        } else if let Some(divisor) = word.strip_prefix('/') {
            number /= divisor.parse::<f64>().with_context(|| format!("{word}: a divisor"))?;
        } else {
            bail!("{word}: expected .DIGITS or /DIVISOR");
        }
    }
    Ok(digits.map_or_else(|| number.to_string(), |digits| format!("{number:.digits$}")))
}

/// A table of a file's rows.
fn rows(file: &Value) -> Result<String> {
    let rows = file["rows"].as_array().context("no rows")?;
    let mut table = "| measured | where | value | command |\n|---|---|---|---|".to_owned();
    for row in rows {
        let cell = |key: &str| row[key].as_str().with_context(|| format!("a row without {key}: {row}"));
        table += &format!(
            "\n| {} | {} | {} | `{}` |",
            cell("measured")?,
            cell("where")?,
            cell("value")?,
            cell("command")?
        );
    }
    Ok(table)
}

/// When, where and how a file's figures were measured: one cell each.
fn source(file: &Value) -> Result<[String; 3]> {
    if file["transcribed"] == true {
        let text = |key: &str| file[key].as_str().map(str::to_owned);
        let (date, machine) = (text("date"), text("machine"));
        let command = text("command").map_or_else(|| "see the rows".into(), |command| format!("`{command}`"));
        return Ok([
            date.context("no date")?,
            machine.context("no machine")?,
            format!("{command}; copied by hand from what it printed"),
        ]);
    }
    let provenance = ["provenance", "measured_by"].iter().find_map(|key| file.get(key));
    let provenance = provenance
        .context("no provenance: expected what a bench prints with --json, or \"transcribed\": true")?;
    let text = |key: &str| provenance[key].as_str().map(str::to_owned).with_context(|| format!("no {key}"));
    let environment = &provenance["environment"];
    let of = |key: &str| environment[key].as_str().unwrap_or("unknown").to_owned();
    let machine =
        format!("{}, Linux {}, KVM {}, load {}", of("cpu"), of("kernel"), of("backend"), environment["load"]);
    Ok([text("date")?, machine, format!("`{}`", text("command")?)])
}

fn sources(files: &Files) -> Result<String> {
    let mut table = "| file | date | machine | command |\n|---|---|---|---|".to_owned();
    for (name, value) in files {
        let [date, machine, command] = source(value).with_context(|| format!("{name}.json"))?;
        table += &format!("\n| [`{name}.json`](results/{name}.json) | {date} | {machine} | {command} |");
    }
    Ok(table)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn files() -> Files {
        let environment = json!({"cpu": "Z80", "kernel": "6.1", "backend": "none", "load": 0.5});
        let provenance = json!({"date": "2026-01-02 00:00:00 UTC", "command": "tests/bench a", "environment": environment});
        let rows = json!([{"measured": "m", "where": "w", "value": "9 s", "command": "c"}]);
        Files::from([
            (
                "a".into(),
                json!({"provenance": provenance, "x": {"bytes": 2_290_000, "name": "slab"}, "n": [1.5]}),
            ),
            ("b".into(), json!({"transcribed": true, "date": "once", "machine": "PVM", "rows": rows})),
        ])
    }

    #[test]
    fn places_are_filled() {
        let layout = "{{a /command}} {{a /x/name}}: {{a /x/bytes .2 /1e6}} MB, {{a /n/0}}\n\n{{rows b}}\n\n{{sources}}\n";
        let page = page(layout, &files()).unwrap();
        assert!(page.starts_with("tests/bench a slab: 2.29 MB, 1.5\n\n| measured |"), "{page}");
        assert!(page.contains("\n| m | w | 9 s | `c` |\n"), "{page}");
        assert!(page.contains("(results/a.json) | 2026-01-02 00:00:00 UTC | Z80, Linux 6.1, KVM none, load 0.5 | `tests/bench a` |"), "{page}");
        assert!(page.contains("| once | PVM | see the rows; copied by hand"), "{page}");
    }

    #[test]
    fn what_is_not_there_is_named() {
        let error = |layout: &str| format!("{:#}", page(layout, &files()).unwrap_err());
        assert!(error("{{c /x}}").contains("no c.json"), "{}", error("{{c /x}}"));
        assert!(error("{{a /y}}").contains("nothing at /y"));
        assert!(error("{{a /x/name .2}}").contains("no number"));
        assert!(error("{{a /n/0 2}}").contains("expected .DIGITS"));
        assert!(error("{{a /n/0").contains("not closed"));
        assert!(error("{{a /n/0}}").contains("in no place of the page: [\"b\"]"));
        assert!(source(&json!({"x": 1})).is_err() && source(&json!({"transcribed": true})).is_err());
    }
}
