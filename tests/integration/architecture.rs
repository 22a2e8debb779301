//! The workspace obeys its own invariants.

use std::collections::BTreeMap;

use tests::tidy;

#[test]
fn the_architecture_invariants_hold() {
    let found = tidy::check(tests::workspace()).expect("the workspace's sources");
    let list: Vec<String> = found.iter().map(ToString::to_string).collect();
    assert!(
        found.is_empty(),
        "{} breach(es) of the architecture invariants:\n{}",
        list.len(),
        list.join("\n")
    );
}

/// What `tests/run --quick` leaves out is there, and no area is left out as a whole.
#[test]
fn the_list_of_slow_tests_names_tests() {
    let list = std::fs::read_to_string(tests::workspace().join("tests/slow.txt")).expect("the list");
    let mut left_out: BTreeMap<&str, usize> = BTreeMap::new();
    for line in list.lines().filter(|line| !line.starts_with('#')) {
        let (area, test) = line.split(' ').next().and_then(|name| name.split_once("::")).expect("AREA::TEST");
        let found = source(area).contains(&format!("\nfn {test}()"));
        assert!(found, "tests/slow.txt has {line:?}, and tests/integration/{area}.rs has no such test");
        *left_out.entry(area).or_default() += 1;
    }
    for (area, left_out) in left_out {
        let tests = source(area).matches("\n#[test]\n").count();
        assert!(tests > left_out, "tests/slow.txt leaves out all tests of {area}: keep its fastest");
    }
}

fn source(area: &str) -> String {
    let path = tests::workspace().join(format!("tests/integration/{area}.rs"));
    std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}
