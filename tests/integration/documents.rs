//! What the documents say of defaults and keys, against what the program does.

use std::fs;

use machine::LINUX_CMDLINE;
use machine::api::EXIT_BAD_CONFIGURATION;
use tests::sandbox::Sandbox;

fn document(path: &str) -> String {
    fs::read_to_string(tests::workspace().join(path)).unwrap_or_else(|e| panic!("{path}: {e}"))
}

#[test]
fn the_default_command_line_is_the_programs() {
    for path in ["README.md", "resources/docs/guests.md"] {
        let quoted = format!("`{LINUX_CMDLINE}`");
        assert!(document(path).contains(&quoted), "{path} does not say {quoted}");
    }
}

#[test]
fn every_exit_status_is_in_the_readme() {
    let readme = document("README.md");
    let paragraph = readme.split("\n\n").find(|p| p.starts_with("Exit status:")).expect("a paragraph");
    for status in [0, 1, 2, EXIT_BAD_CONFIGURATION, 130] {
        assert!(paragraph.contains(&format!("{status} ")), "{status} is not in: {paragraph}");
    }
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
fn every_key_of_a_fleet_file_is_in_the_readme() {
    let readme = document("README.md");
    for file in [
        "nosuch = 1",
        "name = \"f\"\n[defaults]\nnosuch = 1",
        "name = \"f\"\n[[guest]]\nname = \"a\"\nnosuch = 1",
        "name = \"f\"\n[overcommit]\nnosuch = 1",
        "name = \"f\"\n[defaults.fill]\nnosuch = 1",
    ] {
        let keys = keys(file);
        assert!(keys.len() >= 4, "{keys:?}");
        for key in keys.iter().filter(|key| !["defaults", "guest"].contains(&key.as_str())) {
            let row = |line: &&str| line.starts_with('|') && line.contains(&format!("`{key}`"));
            assert!(readme.lines().any(|line| row(&line)), "{key} has no row in the README's table");
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
