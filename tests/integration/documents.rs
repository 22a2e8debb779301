//! Checks the documents against the program: defaults, keys, options, links.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use machine::LINUX_CMDLINE;
use machine::api::EXIT_BAD_CONFIGURATION;
use serde_json::Value;
use tests::documents;
use tests::require_slabs;
use tests::results;
use tests::run::Run;
use tests::sandbox::Sandbox;
use tests::vm::SOON;

const FLEET_FILE: &str = "resources/docs/reference/fleet-file.md";
const RESULTS: &str = "resources/docs/results.md";
const COMMANDS: &str = "resources/docs/reference/commands.md";

fn document(path: &str) -> String {
    documents::read(Path::new(path)).text
}

#[test]
fn the_default_command_line_is_the_programs() {
    for path in [FLEET_FILE, "resources/docs/reference/guests.md"] {
        let quoted = format!("`{LINUX_CMDLINE}`");
        assert!(document(path).contains(&quoted), "{path} does not say {quoted}");
    }
}

#[test]
fn every_exit_status_is_in_the_reference() {
    let text = document("resources/docs/reference/command-line.md");
    for status in [0, 1, 2, jail::EXIT_BAD_SYSCALL, EXIT_BAD_CONFIGURATION, 130] {
        assert!(text.contains(&format!("\n| {status} | ")), "{status} has no row");
    }
}

/// The first thing a newcomer reads ends before he does, and begins with what he can run.
#[test]
fn the_readme_is_short_and_begins_with_the_demo_and_the_tests() {
    let readme = documents::read(Path::new("README.md"));
    assert!(readme.text.lines().count() <= 150, "{} lines", readme.text.lines().count());
    let commands: Vec<_> = readme.blocks().into_iter().filter(|b| b.kind == "sh").collect();
    assert_eq!(commands[0].text, "cargo run --release -- demo\n./tests/run\n");
    let architecture = document("resources/docs/internals/architecture.md");
    let words = architecture.split_whitespace().count();
    assert!(words <= 1500, "the architecture has {words} words");
}

/// The keys that the program names when it meets one that it does not know.
fn keys(file: &str) -> Vec<String> {
    let sandbox = Sandbox::new();
    let path = sandbox.file("fleet.toml");
    fs::write(&path, file).expect("a file");
    let refused =
        sandbox.samepage(["fleet".as_ref(), "up".as_ref(), path.as_os_str(), "--dry-run".as_ref()]).output();
    let (_, list) = refused.stderr.split_once("expected one of ").unwrap_or_else(|| panic!("{refused}"));
    list.lines().next().unwrap_or_default().split(", ").map(|key| key.trim_matches('`').to_owned()).collect()
}

#[test]
fn every_key_of_a_fleet_file_is_in_the_reference() {
    let reference = document(FLEET_FILE);
    for file in [
        "nosuch = 1",
        "name = \"f\"\n[defaults]\nnosuch = 1",
        "name = \"f\"\n[[guest]]\nname = \"a\"\nnosuch = 1",
        "name = \"f\"\n[overcommit]\nnosuch = 1",
        "name = \"f\"\n[overcommit]\nknobs = { nosuch = 1 }",
        "name = \"f\"\n[defaults.fill]\nnosuch = 1",
    ] {
        let keys = keys(file);
        assert!(keys.len() >= 4, "{keys:?}");
        for key in keys.iter().filter(|key| !["defaults", "guest"].contains(&key.as_str())) {
            let row = |line: &&str| line.starts_with('|') && line.contains(&format!("`{key}`"));
            assert!(reference.lines().any(|line| row(&line)), "{key} has no row in {FLEET_FILE}");
        }
    }
}

#[test]
fn a_value_of_another_kind_is_told_in_words_of_the_file() {
    let sandbox = Sandbox::new();
    let path = sandbox.file("fleet.toml");
    for (guest, expected) in [
        ("drives = [\"a.img\"]", "{ path = \"disk.img\" }"),
        ("drives = \"a.img\"", "a.img"),
        ("fill = 50", "{ common = 50, unique = 50 }"),
        ("balloon = true", "{ deflate_on_oom = true }"),
    ] {
        fs::write(&path, format!("name = \"f\"\n[[guest]]\nname = \"a\"\n{guest}\n")).expect("a file");
        let refused = sandbox
            .samepage(["fleet".as_ref(), "up".as_ref(), path.as_os_str(), "--dry-run".as_ref()])
            .output();
        assert_eq!(refused.code, Some(1), "{refused}");
        assert!(refused.stderr.contains(expected), "{expected}: {refused}");
        assert!(!refused.stderr.contains("struct "), "{refused}");
    }
}

/// What serde expected instead of a name that no type has.
fn expected(error: impl std::fmt::Display) -> Vec<String> {
    let text = error.to_string();
    let (_, list) = text.split_once("expected ").unwrap_or_else(|| panic!("{text}"));
    list.split('`').skip(1).step_by(2).map(str::to_owned).collect()
}

/// Has `section` a row for each operation and its keys, each reply, and each kind of error with its
/// meaning?
fn assert_protocol(
    section: &str,
    read: &dyn Fn(&str) -> Option<String>,
    replies: Vec<String>,
    kinds: Vec<(String, &str)>,
) {
    let operations = expected(read(r#"{"op":"nosuch"}"#).expect("an error"));
    assert!(
        operations.len() > 5 && replies.len() > 5 && kinds.len() > 5,
        "{operations:?} {replies:?} {kinds:?}"
    );
    for operation in &operations {
        let begin = format!("| `{{\"op\":\"{operation}\"");
        assert!(section.lines().any(|line| line.starts_with(&begin)), "no row begins with {begin}");
        let Some(error) = read(&format!(r#"{{"op":"{operation}","nosuch":1}}"#)) else { continue };
        // Those that take no key say what they take instead.
        for key in error.contains("unknown field").then(|| expected(error)).into_iter().flatten() {
            assert!(section.contains(&format!("\"{key}\":")), "{operation}: {key} is not said");
        }
    }
    for reply in replies.iter().filter(|reply| *reply != "done") {
        let begin = format!("`{{\"{reply}\":");
        assert!(section.contains(&begin), "no answer is {begin}");
    }
    for (kind, meaning) in kinds {
        let row = format!("| `{kind}` |{meaning} |");
        assert!(section.lines().any(|line| line == row), "no row {row}");
    }
}

#[test]
fn every_request_reply_and_error_of_the_sockets_is_in_the_reference() {
    use fleet::status;
    use machine::control;
    let text = document("resources/docs/reference/control-protocols.md");
    let (vm, daemon) = text.split_once("\n## The daemon's socket").expect("two sections");
    let (daemon, merge) = daemon.split_once("\n## The merge socket").expect("three sections");
    let name = |kind: serde_json::Result<Value>| kind.expect("JSON").as_str().expect("a name").to_owned();
    let nosuch = r#"{"nosuch":1}"#;
    assert_protocol(
        vm,
        &|line| control::Request::parse(line.as_bytes()).err().map(|e| e.to_string()),
        expected(serde_json::from_str::<control::Reply>(nosuch).expect_err("no reply")),
        control::ErrorKind::ALL
            .iter()
            .map(|(kind, says)| (name(serde_json::to_value(kind)), *says))
            .collect(),
    );
    assert_protocol(
        daemon,
        &|line| serde_json::from_str::<status::Request>(line).err().map(|e| e.to_string()),
        expected(serde_json::from_str::<status::Reply>(nosuch).expect_err("no reply")),
        status::ErrorKind::ALL.iter().map(|(kind, says)| (name(serde_json::to_value(kind)), *says)).collect(),
    );
    for (number, (kind, meaning)) in (1..).zip(merge::slab::ErrorKind::ALL) {
        let row = format!("| {number} | `{}` |{meaning} |", name(serde_json::to_value(kind)));
        assert!(merge.lines().any(|line| line == row), "no row {row}");
    }
}

#[test]
fn every_link_leads_somewhere() {
    let documents = documents::all();
    let anchors: BTreeMap<PathBuf, Vec<String>> =
        documents.iter().map(|d| (d.path.clone(), d.anchors())).collect();
    let mut broken = Vec::new();
    for document in &documents {
        for (line, link) in document.links().into_iter().filter(|(_, link)| !link.contains("://")) {
            let (path, anchor) = link.split_once('#').unwrap_or((&link, ""));
            let target = match path {
                "" => document.path.clone(),
                path => plain(&document.path.parent().unwrap_or(Path::new("")).join(path)),
            };
            let known = anchors.get(&target).is_some_and(|known| known.iter().any(|a| a == anchor));
            if !tests::workspace().join(&target).exists() || !(anchor.is_empty() || known) {
                broken.push(format!("{}:{line}: {link}", document.path.display()));
            }
        }
    }
    assert!(broken.is_empty(), "these links lead nowhere:\n{}", broken.join("\n"));
}

/// A path without `..` in it.
fn plain(path: &Path) -> PathBuf {
    let mut parts = Vec::new();
    for part in path.components() {
        match part.as_os_str().to_str() {
            Some("..") => drop(parts.pop()),
            _ => parts.push(part),
        }
    }
    parts.iter().collect()
}

/// `samepage` with these words and `--help`, which is refused where something before that is wrong.
/// What follows `--` is another program's.
fn help(words: &[String]) -> tests::run::Outcome {
    let own = words.iter().map(String::as_str).take_while(|word| *word != "--");
    Run::program(tests::samepage(), own.chain(["--help"])).output()
}

/// Whatever command line a document shows, the program understands.
#[test]
fn every_command_line_that_is_shown_parses() {
    let mut refused = Vec::new();
    let mut seen = 0;
    for document in documents::all() {
        for shown in document.command_lines() {
            seen += 1;
            let outcome = help(&shown.words);
            if outcome.code != Some(0) {
                refused.push(format!(
                    "{}: samepage {}\n{}",
                    shown.place,
                    shown.words.join(" "),
                    outcome.stderr
                ));
            }
        }
    }
    assert!(seen > 60, "only {seen} command lines were found");
    assert!(refused.is_empty(), "{}", refused.join("\n"));
}

/// What is mentioned between backquotes, with names for values: its commands and options are the
/// program's.
#[test]
fn every_option_that_is_mentioned_exists() {
    let mut unknown = Vec::new();
    for document in documents::all() {
        // What the agent prints begins with the same word.
        for shown in document.mentions().into_iter().filter(|shown| shown.words[0] != "agent:") {
            // A command, and the command of a command: what is lower case and comes first.
            let is_name = |w: &&String| w.chars().all(|c| c.is_ascii_lowercase());
            let path: Vec<String> = shown.words.iter().take(2).take_while(is_name).cloned().collect();
            let options: Vec<&String> = shown.words.iter().filter(|w| w.starts_with("--")).collect();
            // The second word may be a guest or an experiment.
            let text =
                (1..=path.len()).rev().map(|n| help(&path[..n])).find(|outcome| outcome.code == Some(0));
            let text = text.map_or_else(String::new, |outcome| outcome.stdout);
            let listed = |o: &&&String| {
                let name = o.trim_matches([',', '.', ']', '[']);
                text.split([' ', '\n', ',', '[', ']', '=']).any(|word| word == name)
            };
            if text.is_empty() || !options.iter().all(|o| listed(&o)) {
                unknown.push(format!("{}: samepage {}", shown.place, shown.words.join(" ")));
            }
        }
    }
    assert!(unknown.is_empty(), "the program does not know of:\n{}", unknown.join("\n"));
}

/// The help of every command, in order.
fn every_help() -> String {
    let mut text = document(COMMANDS);
    text.truncate(text.find("\n## ").map_or(text.len(), |at| at + 1));
    let mut paths = vec![Vec::new()];
    while let Some(path) = paths.pop() {
        let help = help(&path).success().stdout;
        let trimmed: Vec<&str> = help.trim_end().lines().map(str::trim_end).collect();
        let name: Vec<&str> = std::iter::once("samepage").chain(path.iter().map(String::as_str)).collect();
        text += &format!("## {}\n\n```text\n{}\n```\n\n", name.join(" "), trimmed.join("\n"));
        let below = trimmed.iter().skip_while(|l| **l != "Commands:").skip(1).take_while(|l| !l.is_empty());
        let below: Vec<&str> = below.filter_map(|l| l.split_whitespace().next()).collect();
        for command in below.iter().rev().filter(|c| **c != "help") {
            paths.push(path.iter().cloned().chain([(*command).to_owned()]).collect());
        }
    }
    text.trim_end().to_owned() + "\n"
}

/// A document that a program writes is as it would write it now; with SAMEPAGE_WRITE_DOCUMENTS it
/// is written.
fn is_up_to_date(path: &str, now: &str, source: &str) {
    if std::env::var_os("SAMEPAGE_WRITE_DOCUMENTS").is_some() {
        fs::write(tests::workspace().join(path), now).expect("written");
    }
    let written = document(path);
    let differs = now.lines().zip(written.lines()).find(|(now, written)| now != written);
    assert!(
        now == written,
        "{path} is not what {source}, first at {differs:?}: run this test with SAMEPAGE_WRITE_DOCUMENTS=1"
    );
}

#[test]
fn the_options_are_as_the_program_says() {
    is_up_to_date(COMMANDS, &every_help(), "--help prints");
}

#[test]
fn the_results_are_as_benches_printed_them() {
    let (layout, files) = results::read().expect("figures");
    let page = results::page(&layout, &files).expect("a page");
    is_up_to_date(RESULTS, &page, "its figures in resources/docs/results make");
}

#[test]
fn every_metric_is_in_the_reference() {
    require_slabs!();
    let reference = document("resources/docs/reference/metrics.md");
    let sandbox = Sandbox::new();
    let fleet = tests::workspace().join("resources/fleets/builtin.toml");
    let _ = sandbox.samepage(["fleet".as_ref(), "up".as_ref(), fleet.as_os_str()]).output().success();
    let served = sandbox.samepage(["fleet", "metrics"]).output().success().stdout;
    let _ = sandbox.samepage(["fleet", "down"]).output().success();
    sandbox.assert_clean_within(SOON);
    let helps: Vec<_> = served.lines().filter_map(|l| l.strip_prefix("# HELP ")?.split_once(' ')).collect();
    assert!(helps.len() > 40, "{served}");
    for (name, help) in helps {
        let row = |line: &str| line.starts_with(&format!("| `{name}` |")) && line.contains(help);
        assert!(reference.lines().any(row), "no row in metrics.md has `{name}` and: {help}");
    }
}
