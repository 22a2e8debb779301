//! The workspace obeys its own invariants.

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
