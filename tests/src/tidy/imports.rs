//! Who may import whom inside `vmm`: `cli -> {api, host} -> {vm, merge, overcommit, measure, image} -> memory`.

use super::{Finding, Source};

/// Each module of `vmm`, and the modules it may name. Whatever is not listed here is refused.
const MAY_IMPORT: &[(&str, &[&str])] = &[
    ("cli", &["api", "host", "vm", "merge", "overcommit", "measure", "image", "memory", "os"]),
    ("api", &["vm", "memory", "os"]),
    ("host", &["vm", "merge", "overcommit", "measure", "image", "memory", "os"]),
    ("vm", &["image", "memory", "os"]),
    ("merge", &["measure", "memory", "os"]),
    ("measure", &["memory"]),
    // Decides on plain numbers: no VM, no memory.
    ("overcommit", &[]),
    ("image", &[]),
    ("memory", &[]),
    // Processes and sockets, held by descriptors.
    ("os", &[]),
];

/// An import against the direction is the first step to a module that cannot be understood alone.
pub(super) fn imports_point_downwards(sources: &[Source]) -> Vec<Finding> {
    let mut found = Vec::new();
    for source in sources.iter().filter(|s| s.is_rust_below("vmm/src/")) {
        let below = source.path.trim_start_matches("vmm/src/");
        let Some((module, _)) = below.split_once('/') else {
            continue;
        };
        let Some((_, allowed)) = MAY_IMPORT.iter().find(|(name, _)| *name == module) else {
            let rule = format!("module {module} has no place in the order of imports");
            let advice = "give it one in tests/src/tidy/imports.rs and in resources/docs/architecture.md";
            found.push(Finding { path: source.path.clone(), line: 0, rule, advice });
            continue;
        };
        for line in source.lines() {
            for named in modules_named(&line.code) {
                if named != module && !allowed.contains(&named) && MAY_IMPORT.iter().any(|(m, _)| *m == named)
                {
                    let rule = format!("{module} imports {named}");
                    let advice = "the order is cli, {api, host}, {vm, merge, overcommit, measure, image}, memory: \
                                  pass a value, or a trait that the importing module defines";
                    found.push(Finding { path: source.path.clone(), line: line.number, rule, advice });
                }
            }
        }
    }
    found
}

/// The top-level modules in `crate::a`, `vmm::a`, and `crate::{a, b::c}`.
fn modules_named(code: &str) -> Vec<&str> {
    let mut named = Vec::new();
    for root in ["crate::", "vmm::"] {
        for (at, _) in code.match_indices(root) {
            let rest = &code[at + root.len()..];
            if let Some(group) = rest.strip_prefix('{') {
                let mut depth = 0_usize;
                let mut start = true;
                for (at, c) in group.char_indices() {
                    match c {
                        '{' => depth += 1,
                        '}' => depth = depth.saturating_sub(1),
                        ',' if depth == 0 => start = true,
                        ' ' => {}
                        _ if start => {
                            named.push(word(&group[at..]));
                            start = false;
                        }
                        _ => {}
                    }
                }
            } else {
                named.push(word(rest));
            }
        }
    }
    named
}

fn word(text: &str) -> &str {
    text.split(|c: char| !c.is_alphanumeric() && c != '_').next().unwrap_or(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(path: &str, text: &str) -> Vec<String> {
        let sources = [Source::new(path, text)];
        imports_point_downwards(&sources).into_iter().map(|f| f.rule).collect()
    }

    #[test]
    fn upward_imports_are_found() {
        assert_eq!(found("vmm/src/vm/a.rs", "use crate::host::Fleet;\n"), ["vm imports host"]);
        assert_eq!(found("vmm/src/vm/a.rs", "use crate::{memory::Ram, merge};\n"), ["vm imports merge"]);
        assert_eq!(
            found("vmm/src/overcommit/a.rs", "fn f(x: crate::vm::Vm) {}\n"),
            ["overcommit imports vm"]
        );
        assert_eq!(found("vmm/src/vm/a.rs", "use crate::api::Options;\n"), ["vm imports api"]);
        assert_eq!(found("vmm/src/memory/a.rs", "use crate::vm::Vm;\n"), ["memory imports vm"]);
        assert_eq!(found("vmm/src/shiny/a.rs", ""), ["module shiny has no place in the order of imports"]);
    }

    #[test]
    fn downward_imports_are_fine() {
        assert!(found("vmm/src/cli/a.rs", "use vmm::{host::Fleet, vm};\n").is_empty());
        assert!(found("vmm/src/vm/a.rs", "use crate::memory::{Ram, Gpa}; // crate::host\n").is_empty());
        assert!(found("vmm/src/merge/a.rs", "use crate::merge::ksm;\n").is_empty());
    }
}
