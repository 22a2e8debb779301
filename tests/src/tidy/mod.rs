//! The architecture invariants that text can show, as code.
//!
//! Each rule is a function from the sources to what it found, with the line, the rule, and what to
//! do about it. The rules read text, not types: a name that is hidden behind a macro or a re-export
//! escapes them.

mod circles;
mod rules;
mod source;

use std::fmt;
use std::path::Path;

pub use source::{Line, Source};

/// One breach of one rule.
#[derive(Debug, PartialEq, Eq)]
pub struct Finding {
    /// Path below the workspace's root.
    pub path: String,
    /// Counted from 1; 0 if it is about the whole file.
    pub line: usize,
    /// What holds everywhere else.
    pub rule: String,
    /// What to do instead.
    pub advice: &'static str,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}: {}; {}", self.path, self.line.max(1), self.rule, self.advice)
    }
}

/// A rule: every breach of it in the sources.
pub type Rule = fn(&[Source]) -> Vec<Finding>;

/// All rules, by the name that a report gives.
pub const RULES: &[(&str, Rule)] = &[
    ("devices forbid unsafe", rules::devices_forbid_unsafe),
    ("devices never name KVM", rules::devices_without_kvm),
    ("only vmm/machine names KVM", rules::kvm_in_vm_only),
    ("guest RAM is mapped in vmm/memory only", rules::mapping_in_memory_only),
    ("pages are pinned where nothing is shared only", rules::pinned_where_nothing_is_shared),
    ("guest depends on nothing", rules::guest_depends_on_nothing),
    ("printing does not panic", rules::printing_that_fails),
    ("children are of this build", rules::own_program),
    ("files that users name are not waited for", rules::opening_that_waits),
    ("files are short", rules::short_files),
    ("files of a crate do not need each other", circles::no_circles),
    ("nothing is left undone", rules::nothing_undone),
    ("no panic within a guest's reach", rules::no_panics),
    ("files are named for what they hold", rules::named_for_what_they_hold),
    ("every number names its command", rules::numbers_name_a_command),
];

/// Applies every rule to the workspace at `root`.
///
/// # Errors
/// A directory or a file that cannot be read.
pub fn check(root: &Path) -> std::io::Result<Vec<Finding>> {
    let sources = Source::all(root)?;
    Ok(RULES.iter().flat_map(|(_, rule)| rule(&sources)).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_finding_reads_as_a_compiler_message() {
        let finding = Finding { path: "a/b.rs".into(), line: 3, rule: "no x".into(), advice: "use y" };
        assert_eq!(finding.to_string(), "a/b.rs:3: no x; use y");
    }
}
