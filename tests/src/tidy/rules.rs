//! The rules. Which crate may use which is not among them: Cargo knows, by the manifests.

use super::{Finding, Source};

/// Lines in the longest Rust file allowed.
const MAX_LINES: usize = 600;
/// System calls that map, unmap, or give back memory.
const MAPPING_CALLS: &[&str] = &[
    "mmap",
    "mmap64",
    "munmap",
    "mremap",
    "madvise",
    "process_madvise",
    "mprotect",
    "fallocate",
    "SYS_userfaultfd",
];
/// Words for a file that holds a bit of everything.
const EMPTY_NAMES: &[&str] = &["util", "utils", "helper", "helpers", "manager", "misc", "common"];
/// Where a guest's doing, or that of a client of the API or of metrics, is handled, so that a panic
/// would be theirs to cause.
const GUEST_REACH: &[&str] =
    &["devices/src/", "vmm/machine/src/", "vmm/merge/src/", "vmm/fleet/src/metrics/", "vmm/wire/src/"];

/// Every line of code for which `breaks` says what is wrong.
fn findings<'a>(
    sources: impl Iterator<Item = &'a Source>,
    with_tests: bool,
    advice: &'static str,
    breaks: impl Fn(&str) -> Option<String>,
) -> Vec<Finding> {
    let mut found = Vec::new();
    for source in sources {
        for line in source.lines().iter().filter(|line| with_tests || !line.in_test) {
            if let Some(rule) = breaks(&line.code) {
                found.push(Finding { path: source.path.clone(), line: line.number, rule, advice });
            }
        }
    }
    found
}

/// Whether `word` stands in `code` by itself.
fn has_word(code: &str, word: &str) -> bool {
    let part_of_word = |c: char| c.is_alphanumeric() || c == '_';
    code.match_indices(word).any(|(at, _)| {
        !code[..at].ends_with(part_of_word) && !code[at + word.len()..].starts_with(part_of_word)
    })
}

fn names_kvm(code: &str) -> Option<String> {
    ["kvm_ioctls", "kvm_bindings"].iter().find(|w| has_word(code, w)).map(|w| format!("{w} is named here"))
}

/// Invariant 1, first half.
pub(super) fn devices_forbid_unsafe(sources: &[Source]) -> Vec<Finding> {
    let root = "devices/src/lib.rs";
    let said =
        |s: &Source| s.path == root && s.lines().iter().any(|l| l.code.contains("#![forbid(unsafe_code)]"));
    if sources.iter().any(said) {
        return Vec::new();
    }
    let rule = "the devices crate does not forbid unsafe code".into();
    vec![Finding { path: root.into(), line: 0, rule, advice: "add #![forbid(unsafe_code)]" }]
}

/// Invariant 1, second half.
pub(super) fn devices_without_kvm(sources: &[Source]) -> Vec<Finding> {
    let advice = "give the device a trait or an eventfd; vmm/machine connects it to KVM";
    let code = sources.iter().filter(|s| s.is_rust_below("devices/"));
    let mut found = findings(code, true, advice, names_kvm);
    for source in sources.iter().filter(|s| s.path == "devices/Cargo.toml") {
        for (index, _) in source.text.lines().enumerate().filter(|(_, l)| l.starts_with("kvm-")) {
            let rule = "devices depends on a KVM crate".into();
            found.push(Finding { path: source.path.clone(), line: index + 1, rule, advice });
        }
    }
    found
}

/// Invariant 2.
pub(super) fn kvm_in_vm_only(sources: &[Source]) -> Vec<Finding> {
    let code = sources.iter().filter(|s| s.is_rust_below("") && !s.is_rust_below("vmm/machine/src/"));
    findings(code, true, "move it into vmm/machine and give it a name of ours there", names_kvm)
}

/// Invariant 3.
pub(super) fn mapping_in_memory_only(sources: &[Source]) -> Vec<Finding> {
    let code = sources.iter().filter(|s| {
        ["vmm/", "devices/"].iter().any(|d| s.is_rust_below(d)) && !s.is_rust_below("vmm/memory/src/")
    });
    findings(code, false, "add what is needed to vmm/memory and call that", |code| {
        let called = |call: &&&str| code.contains("libc::") && has_word(code, call);
        MAPPING_CALLS.iter().find(called).map(|call| format!("{call} outside vmm/memory"))
    })
}

/// Reading a process by pinning its pages breaks up what KSM shares there, unless the page table is
/// consulted first.
pub(super) fn pinned_where_nothing_is_shared(sources: &[Source]) -> Vec<Finding> {
    let homes = [
        ("process_vm_readv", "vmm/memory/src/remote/"),
        ("read_pinned", "vmm/memory/src/remote/"),
        ("read_pinned", "vmm/measure/src/source/process.rs"),
    ];
    let mut found = Vec::new();
    for source in sources.iter().filter(|s| s.is_rust_below("vmm/") || s.is_rust_below("devices/")) {
        let calls = ["process_vm_readv", "read_pinned"].into_iter();
        let foreign = calls
            .filter(|call| !homes.iter().any(|(what, home)| what == call && source.path.starts_with(home)));
        for call in foreign {
            let advice = "read by RemoteMemory::read, or measure by a ProcessSource";
            found.extend(findings(std::iter::once(source), false, advice, |code| {
                has_word(code, call).then(|| format!("{call} pins pages, and so unshares those of KSM"))
            }));
        }
    }
    found
}

/// Invariant 4, and more: the guest has no dependency at all.
pub(super) fn guest_depends_on_nothing(sources: &[Source]) -> Vec<Finding> {
    let mut found = Vec::new();
    for source in sources.iter().filter(|s| s.path == "guest/Cargo.toml") {
        let mut in_dependencies = false;
        for (index, line) in source.text.lines().enumerate() {
            if line.starts_with('[') {
                let section = line.trim_matches(['[', ']']);
                let last = section.rsplit('.').next().unwrap_or(section);
                in_dependencies = matches!(last, "dependencies" | "build-dependencies");
            } else if in_dependencies && !line.trim().is_empty() && !line.starts_with('#') {
                let rule = format!("guest depends on {}", line.split(['.', ' ', '=']).next().unwrap_or(line));
                let advice = "it is built without an operating system: write the few lines it needs";
                found.push(Finding { path: source.path.clone(), line: index + 1, rule, advice });
            }
        }
    }
    found
}

/// `println!` and its kin panic where the other end of a pipe is gone or a disk is full.
pub(super) fn printing_that_fails(sources: &[Source]) -> Vec<Finding> {
    let code = sources
        .iter()
        .filter(|s| s.is_rust_below("vmm/") || s.is_rust_below("devices/"))
        .filter(|s| !s.path.ends_with("/build.rs")); // cargo listens to it
    let advice = "print by outln!, out! or errln! of vmm/os/src/print.rs";
    findings(code, false, advice, |code| {
        let macros = ["println", "print", "eprintln", "eprint"];
        let used = macros.iter().find(|name| code.contains(&format!("{name}!(")) && has_word(code, name));
        used.map(|name| format!("{name}! panics where it cannot print"))
    })
}

/// The file at the path of our program may be another build by now, or none.
pub(super) fn own_program(sources: &[Source]) -> Vec<Finding> {
    let code = sources.iter().filter(|s| s.is_rust_below("vmm/"));
    findings(code, false, "start it by vmm/os/src/executable.rs", |code| {
        has_word(code, "current_exe")
            .then(|| "current_exe is a path, and an upgrade replaces what is there".into())
    })
}

/// Where commands and VMs open what their users name: open(2) of a FIFO waits, beyond every signal
/// that has a handler.
pub(super) fn opening_that_waits(sources: &[Source]) -> Vec<Finding> {
    const HOMES: &[&str] =
        &["vmm/src/", "vmm/machine/src/", "vmm/fleet/src/spec", "vmm/lab/src/experiment/plan"];
    // What they open has a name of the kernel's, or was made by us.
    const KERNELS: &[&str] = &["vmm/src/doctor/", "vmm/machine/src/probe.rs", "vmm/machine/src/drive.rs"];
    let code = sources.iter().filter(|s| {
        HOMES.iter().any(|home| s.path.starts_with(home)) && !KERNELS.iter().any(|k| s.path.starts_with(k))
    });
    findings(code, false, "open it by vmm/os/src/named_file.rs", |code| {
        let calls = ["File::open", "File::create", "File::options", "fs::read", "fs::write"];
        let called = calls.iter().find(|call| has_word(code, call) && !code.contains("/proc/"));
        called.map(|call| format!("{call} waits for the other end of a FIFO"))
    })
}

/// A file that has to be scrolled through holds more than one thing.
pub(super) fn short_files(sources: &[Source]) -> Vec<Finding> {
    let long = sources.iter().filter(|s| s.is_rust_below("") && s.text.lines().count() > MAX_LINES);
    long.map(|s| Finding {
        path: s.path.clone(),
        line: MAX_LINES + 1,
        rule: format!("{} lines, and {MAX_LINES} are the most", s.text.lines().count()),
        advice: "move one of the things it holds to a file of its own",
    })
    .collect()
}

/// No placeholders, no debugging left over, no test that never runs.
pub(super) fn nothing_undone(sources: &[Source]) -> Vec<Finding> {
    let marks =
        [("todo!", "todo"), ("unimplemented!", "unimplemented"), ("dbg!", "dbg"), ("#[ignore", "ignore")];
    let code = sources.iter().filter(|s| s.is_rust_below(""));
    findings(
        code,
        true,
        "finish it, or take it out; a test that cannot run here skips and says why",
        |code| {
            let found = marks.iter().find(|(mark, word)| code.contains(mark) && has_word(code, word));
            found.map(|(mark, _)| format!("{mark} is left here"))
        },
    )
}

/// Invariant 9: whatever a guest does, the VMM does not panic.
pub(super) fn no_panics(sources: &[Source]) -> Vec<Finding> {
    let code = sources.iter().filter(|s| GUEST_REACH.iter().any(|d| s.is_rust_below(d)));
    findings(code, false, "return an error, or count, warn and complete the descriptor", |code| {
        let calls = [".unwrap()", ".expect(", "panic!(", "unreachable!("];
        calls.iter().find(|call| code.contains(**call)).map(|call| format!("{call} within a guest's reach"))
    })
}

/// A name says what is inside.
pub(super) fn named_for_what_they_hold(sources: &[Source]) -> Vec<Finding> {
    let mut found = Vec::new();
    for source in sources.iter().filter(|s| s.path.ends_with(".rs")) {
        let parts = source.path.trim_end_matches(".rs").split('/');
        let words = parts.flat_map(|part| part.split('_'));
        if let Some(word) = words.into_iter().find(|word| EMPTY_NAMES.contains(word)) {
            let rule = format!("'{word}' says nothing about what the file holds");
            let advice = "name it for the thing inside, or put each thing where it belongs";
            found.push(Finding { path: source.path.clone(), line: 0, rule, advice });
        }
    }
    found
}

/// Where measured numbers stand.
const RESULTS: &[&str] = &["README.md", "resources/docs/results.md"];

/// A table of measured numbers is followed, or led, by the command that prints them.
pub(super) fn numbers_name_a_command(sources: &[Source]) -> Vec<Finding> {
    let mut found = Vec::new();
    for source in sources.iter().filter(|s| RESULTS.contains(&s.path.as_str())) {
        let lines: Vec<&str> = source.text.lines().collect();
        for (index, row) in lines.iter().enumerate().filter(|(_, l)| l.trim_start().starts_with('|')) {
            let header = lines[..index].iter().rev().take_while(|l| l.trim_start().starts_with('|')).last();
            let is_result = header.is_some_and(|h| h.to_lowercase().contains("measured"));
            let separator = row.chars().all(|c| "|-: ".contains(c));
            if is_result && !separator && !row.contains('`') {
                let rule = "a measured number without its command".into();
                let advice = "say in this row, in `code`, which command prints it";
                found.push(Finding { path: source.path.clone(), line: index + 1, rule, advice });
            }
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tidy::Rule;

    /// How many lines the rule finds in one file of this path and text.
    fn found(rule: Rule, path: &str, text: &str) -> usize {
        rule(&[Source::new(path, text)]).len()
    }

    #[test]
    fn devices_must_forbid_unsafe() {
        assert_eq!(found(devices_forbid_unsafe, "devices/src/lib.rs", "//! #![forbid(unsafe_code)]\n"), 1);
        assert_eq!(found(devices_forbid_unsafe, "devices/src/lib.rs", "#![forbid(unsafe_code)]\n"), 0);
    }

    #[test]
    fn devices_must_not_name_kvm() {
        assert_eq!(found(devices_without_kvm, "devices/src/a.rs", "use kvm_ioctls::VmFd;\n"), 1);
        assert_eq!(
            found(devices_without_kvm, "devices/Cargo.toml", "[dependencies]\nkvm-ioctls = \"1\"\n"),
            1
        );
        assert_eq!(found(devices_without_kvm, "devices/src/a.rs", "// not kvm_ioctls\n"), 0);
    }

    #[test]
    fn kvm_is_named_in_vm_only() {
        assert_eq!(found(kvm_in_vm_only, "vmm/fleet/src/a.rs", "fn f(x: kvm_bindings::kvm_regs) {}\n"), 1);
        assert_eq!(found(kvm_in_vm_only, "vmm/machine/src/a.rs", "use kvm_ioctls::Kvm;\n"), 0);
    }

    #[test]
    fn mapping_is_done_in_memory_only() {
        assert_eq!(
            found(mapping_in_memory_only, "vmm/machine/src/a.rs", "unsafe { libc::madvise(a, b, c) }\n"),
            1
        );
        assert_eq!(found(mapping_in_memory_only, "vmm/fleet/src/a.rs", "use libc::{c_int, munmap};\n"), 1);
        assert_eq!(found(mapping_in_memory_only, "vmm/memory/src/a.rs", "unsafe { libc::mmap() }\n"), 0);
        assert_eq!(found(mapping_in_memory_only, "vmm/machine/src/a.rs", "ram.fallocate();\n"), 0);
    }

    #[test]
    fn pages_are_pinned_at_home_only() {
        let call = "unsafe { libc::process_vm_readv(pid, a, 1, b, 1, 0) }\n";
        assert_eq!(found(pinned_where_nothing_is_shared, "vmm/fleet/src/check.rs", call), 1);
        assert_eq!(found(pinned_where_nothing_is_shared, "vmm/memory/src/remote/pinned.rs", call), 0);
        let use_of_it = "memory.read_pinned(&hvas, &mut into)\n";
        assert_eq!(found(pinned_where_nothing_is_shared, "vmm/fleet/src/check.rs", use_of_it), 1);
        assert_eq!(found(pinned_where_nothing_is_shared, "vmm/measure/src/source/process.rs", use_of_it), 0);
    }

    #[test]
    fn guest_has_no_dependencies() {
        let text = "[package]\nname = \"guest\"\n[dependencies]\nlibc = \"1\"\n[dev-dependencies]\nproptest = \"1\"\n";
        assert_eq!(found(guest_depends_on_nothing, "guest/Cargo.toml", text), 1);
        assert_eq!(
            found(
                guest_depends_on_nothing,
                "guest/Cargo.toml",
                "[target.x.dependencies]\na.workspace = true"
            ),
            1
        );
        assert_eq!(found(guest_depends_on_nothing, "vmm/Cargo.toml", text), 0);
    }

    #[test]
    fn printing_that_panics_is_found() {
        for line in ["println!(\"a\");", "print!(\"a\")", "x => eprintln!(\"{x}\"),", "eprint!(\".\");"] {
            assert_eq!(found(printing_that_fails, "vmm/src/a.rs", line), 1, "{line}");
            assert_eq!(found(printing_that_fails, "tests/src/a.rs", line), 0, "{line}");
        }
        assert_eq!(found(printing_that_fails, "vmm/src/a.rs", "outln!(\"println!(\")?;"), 0);
    }

    #[test]
    fn a_path_to_ourselves_is_found() {
        assert_eq!(found(own_program, "vmm/fleet/src/a.rs", "Command::new(env::current_exe()?)"), 1);
        assert_eq!(found(own_program, "vmm/fleet/src/a.rs", "executable::command()"), 0);
    }

    #[test]
    fn opening_that_may_wait_is_found() {
        for line in ["File::open(path)?", "std::fs::write(path, text)", "fs::File::create(path)"] {
            assert_eq!(found(opening_that_waits, "vmm/src/a.rs", line), 1, "{line}");
        }
        assert_eq!(
            found(opening_that_waits, "vmm/machine/src/api/a.rs", "fs::read_to_string(\"/proc/self/statm\")"),
            0
        );
        assert_eq!(found(opening_that_waits, "vmm/memory/src/a.rs", "File::open(path)?"), 0);
        assert_eq!(found(opening_that_waits, "vmm/machine/src/api/a.rs", "MetricsFile::open(path)?"), 0);
    }

    #[test]
    fn long_files_are_found() {
        assert_eq!(found(short_files, "vmm/src/a.rs", &"\n".repeat(MAX_LINES + 1)), 1);
        assert_eq!(found(short_files, "vmm/src/a.rs", &"\n".repeat(MAX_LINES)), 0);
    }

    #[test]
    fn unfinished_code_is_found() {
        for line in ["todo!()", "unimplemented!(\"x\")", "dbg!(x)", "#[ignore]", "#[ignore = \"slow\"]"] {
            assert_eq!(found(nothing_undone, "guest/src/a.rs", line), 1, "{line}");
        }
        assert_eq!(found(nothing_undone, "guest/src/a.rs", "ignore(\"todo!\"); // dbg!"), 0);
    }

    #[test]
    fn panics_are_found_outside_tests() {
        for line in ["a.unwrap();", "a.expect(\"b\");", "panic!(\"c\")", "_ => unreachable!()"] {
            assert_eq!(found(no_panics, "vmm/machine/src/a.rs", line), 1, "{line}");
            assert_eq!(found(no_panics, "vmm/src/a.rs", line), 0, "{line}");
        }
        assert_eq!(
            found(no_panics, "devices/src/a.rs", "#[cfg(test)]\nmod tests { fn a() { b.unwrap() } }\n"),
            0
        );
        assert_eq!(found(no_panics, "devices/src/a.rs", "a.unwrap_or(0)"), 0);
    }

    #[test]
    fn empty_names_are_found() {
        assert_eq!(found(named_for_what_they_hold, "vmm/src/utils.rs", ""), 1);
        assert_eq!(found(named_for_what_they_hold, "vmm/src/device_manager.rs", ""), 1);
        assert_eq!(found(named_for_what_they_hold, "vmm/src/misc/mod.rs", ""), 1);
        assert_eq!(found(named_for_what_they_hold, "vmm/machine/src/utilisation.rs", ""), 0);
    }

    #[test]
    fn numbers_without_a_command_are_found() {
        let table = "| what | measured |\n|---|---|\n| a | 3 |\n| b | 4, `samepage demo` |\n";
        assert_eq!(found(numbers_name_a_command, "resources/docs/results.md", table), 1);
        assert_eq!(found(numbers_name_a_command, "README.md", "| key | meaning |\n|--|--|\n| a | b |\n"), 0);
    }
}
