//! Bad input gets a clear error, an exit status that is not 0, and leaves nothing behind.

use std::fs;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::time::Duration;

use tests::require_kvm;
use tests::run::Outcome;
use tests::sandbox::Sandbox;

use super::kernels::{Elf, SILENCE};

const SOON: Duration = Duration::from_secs(5);

/// Runs it, and sees that it fails and names all of `expected`.
#[track_caller]
fn refused(sandbox: &Sandbox, args: &[&str], expected: &[&str]) -> Outcome {
    let outcome = sandbox.samepage(args).timeout(Duration::from_secs(30)).output();
    assert!(matches!(outcome.code, Some(1 | 2)), "expected a failure: {outcome}");
    for words in expected {
        assert!(outcome.stderr.contains(words), "the error does not say {words:?}: {outcome}");
    }
    assert!(!outcome.stderr.contains("panicked"), "{outcome}");
    sandbox.assert_clean_within(SOON);
    outcome
}

#[track_caller]
fn kernel_refused(sandbox: &Sandbox, kernel: &Path, expected: &[&str]) {
    let kernel = kernel.to_str().expect("a path in UTF-8");
    refused(sandbox, &["run", "--console", "none", "--kernel", kernel], &[&[kernel], expected].concat());
}

#[track_caller]
fn fleet_refused(text: &str, expected: &[&str]) {
    let sandbox = Sandbox::new();
    let file = sandbox.file("fleet.toml");
    fs::write(&file, text).expect("a file in the sandbox");
    let file = file.to_str().expect("a path in UTF-8");
    refused(&sandbox, &["fleet", "up", file], &[&[file], expected].concat());
}

#[test]
fn a_missing_kernel() {
    require_kvm!();
    let sandbox = Sandbox::new();
    kernel_refused(&sandbox, &sandbox.file("none"), &["No such file"]);
}

#[test]
fn a_truncated_kernel() {
    require_kvm!();
    let sandbox = Sandbox::new();
    let kernel =
        Elf { file_bytes: 1 << 20, memory_bytes: 1 << 20, ..Elf::with(SILENCE) }.write(&sandbox, "short");
    kernel_refused(&sandbox, &kernel, &["cut short"]);
}

#[test]
fn a_32_bit_kernel() {
    require_kvm!();
    let sandbox = Sandbox::new();
    let kernel = Elf { class: 1, machine: 3, ..Elf::with(SILENCE) }.write(&sandbox, "old");
    kernel_refused(&sandbox, &kernel, &["32-bit", "expected"]);
}

#[test]
fn a_kernel_for_another_architecture() {
    require_kvm!();
    let sandbox = Sandbox::new();
    let kernel = Elf { machine: 183, ..Elf::with(SILENCE) }.write(&sandbox, "arm");
    kernel_refused(&sandbox, &kernel, &["AArch64", "expected x86-64"]);
}

#[test]
fn an_unpacked_kernel_for_a_guest_that_is_to_unpack_it() {
    require_kvm!();
    let sandbox = Sandbox::new();
    let kernel = Elf::with(SILENCE).write(&sandbox, "vmlinux");
    let kernel = kernel.to_str().expect("a path in UTF-8");
    let args = ["run", "--console", "none", "--kernel", kernel, "--kernel-decompress", "guest"];
    refused(&sandbox, &args, &[kernel, "has no decompressor", "give the vmlinuz"]);
    refused(&sandbox, &["run", "--kernel-decompress", "guest"], &["--kernel <FILE>"]);
    // Its old name.
    refused(&sandbox, &["run", "--unpack", "guest"], &["--kernel <FILE>"]);
}

/// What a daemon hands over is a sealed memfd; nothing else is taken for one.
#[test]
fn a_description_on_a_descriptor_that_is_none() {
    let sandbox = Sandbox::new();
    refused(&sandbox, &["run", "--config-fd", "77"], &["the configuration on descriptor 77 cannot be read"]);
    refused(&sandbox, &["run", "--config-fd", "0"], &["the configuration on descriptor 0 cannot be read"]);
    refused(&sandbox, &["run", "--config-fd", "77", "--kernel", "k"], &["cannot be used with"]);
}

#[test]
fn no_kernel_at_all() {
    require_kvm!();
    let sandbox = Sandbox::new();
    let kernel = sandbox.file("letter");
    fs::write(&kernel, "Dear reader, this is not a kernel.\n".repeat(100)).expect("a file in the sandbox");
    kernel_refused(&sandbox, &kernel, &["not a kernel", "expected"]);
    fs::write(&kernel, "").expect("a file in the sandbox");
    kernel_refused(&sandbox, &kernel, &["expected"]);
}

#[test]
fn a_kernel_that_does_not_fit() {
    require_kvm!();
    let sandbox = Sandbox::new();
    let kernel = Elf { memory_bytes: 64 << 20, ..Elf::with(SILENCE) }.write(&sandbox, "large");
    let kernel = kernel.to_str().expect("a path in UTF-8");
    refused(
        &sandbox,
        &["run", "--kernel", kernel, "--memory", "32M"],
        &["does not fit", "32 MiB", "--memory"],
    );
}

#[test]
fn an_initrd_that_does_not_fit() {
    require_kvm!();
    let sandbox = Sandbox::new();
    let kernel = Elf::with(SILENCE).write(&sandbox, "kernel");
    let initrd = sandbox.file("initrd");
    fs::File::create(&initrd).and_then(|f| f.set_len(64 << 20)).expect("a file in the sandbox");
    let (kernel, initrd) = (kernel.to_str().expect("UTF-8"), initrd.to_str().expect("UTF-8"));
    let args = ["run", "--kernel", kernel, "--initrd", initrd, "--memory", "64M"];
    refused(&sandbox, &args, &[initrd, "does not fit", "--memory"]);
}

#[test]
fn memory_that_cannot_be() {
    let sandbox = Sandbox::new();
    for (memory, expected) in [
        ("0", "expected"),
        ("0M", "16M"),
        ("1M", "16M"),
        ("lots", "no size"),
        ("-1M", "memory"),
        ("900T", "expected"),
    ] {
        refused(&sandbox, &["run", &format!("--memory={memory}")], &[memory, expected]);
    }
}

#[test]
fn vcpus_that_cannot_be() {
    let sandbox = Sandbox::new();
    for cpus in ["0", "33", "two"] {
        refused(&sandbox, &["run", "--cpus", cpus], &[cpus, "--cpus"]);
    }
}

#[test]
fn a_command_line_too_long() {
    require_kvm!();
    let sandbox = Sandbox::new();
    let kernel = Elf::with(SILENCE).write(&sandbox, "kernel");
    let kernel = kernel.to_str().expect("a path in UTF-8");
    refused(&sandbox, &["run", "--kernel", kernel, "--cmdline", &"a".repeat(5000)], &["5000", "at most"]);
}

#[test]
fn a_socket_path_in_use() {
    require_kvm!();
    let sandbox = Sandbox::new();
    let socket = sandbox.file("vm.sock");
    let _holder = UnixListener::bind(&socket).expect("a socket in the sandbox");
    let socket_name = socket.to_str().expect("a path in UTF-8");
    for option in ["--control", "--com2"] {
        refused(&sandbox, &["run", "--console", "none", option, socket_name], &[socket_name]);
        assert!(socket.exists(), "another process's socket was removed");
    }
}

#[test]
fn fleet_files() {
    let guest = "[[guest]]\nname = \"a\"\nmemory = \"64M\"\n";
    let cases: &[(&str, String, &[&str])] = &[
        ("an unknown key", format!("name = \"f\"\ncolour = \"red\"\n{guest}"), &["colour", "expected"]),
        ("an unknown key of a guest", format!("name = \"f\"\n{guest}colour = 1\n"), &["colour", "expected"]),
        ("a repeated key", format!("name = \"f\"\nname = \"g\"\n{guest}"), &["name", "duplicate key"]),
        ("two guests of one name", format!("name = \"f\"\n{guest}{guest}"), &["\"a\"", "two guests"]),
        ("no guests", "name = \"f\"\n".into(), &["no guests", "[[guest]]"]),
        ("no TOML", "this is no fleet".into(), &[]),
        ("memory unparsable", "name = \"f\"\n[[guest]]\nname = \"a\"\nmemory = \"lots\"\n".into(), &["lots"]),
        ("too many vCPUs", format!("name = \"f\"\n{guest}cpus = 33\n"), &["33", "32"]),
    ];
    for (what, text, expected) in cases {
        eprintln!("{what}");
        fleet_refused(text, expected);
    }
}

#[test]
fn a_fleet_that_is_not_there() {
    let sandbox = Sandbox::new();
    refused(
        &sandbox,
        &["fleet", "up", "/nonexistent/fleet.toml"],
        &["/nonexistent/fleet.toml", "No such file"],
    );
    refused(&sandbox, &["fleet", "status", "--name", "nobody"], &["nobody"]);
    refused(&sandbox, &["fleet", "down", "--name", "nobody"], &["nobody"]);
}

#[test]
fn an_unknown_command() {
    let sandbox = Sandbox::new();
    let outcome = refused(&sandbox, &["dmeo"], &["dmeo", "demo"]);
    assert_eq!(outcome.code, Some(2), "{outcome}");
}

#[test]
fn demo_arguments() {
    let sandbox = Sandbox::new();
    refused(&sandbox, &["demo", "--guests", "0"], &["--guests"]);
    refused(&sandbox, &["demo", "--memory", "1M"], &["16M"]);
    refused(&sandbox, &["demo", "--engine", "magic"], &["magic", "ksm", "off"]);
}
