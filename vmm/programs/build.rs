//! Builds the two programs that run inside guests and hands their paths to `include_bytes!`.
//!
//! They are freestanding and need other code generation than the hypervisor: a nested `cargo build`
//! with a target directory of its own gives them that, with the toolchain that builds the rest and
//! nothing else. Their crate has no dependencies, so nothing is fetched.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Program and the variable that names its file.
const PROGRAMS: [(&str, &str); 2] = [("kernel", "SAMEPAGE_KERNEL"), ("agent", "SAMEPAGE_AGENT")];

/// The baseline processor, fixed addresses, and small code.
const FLAGS: [&str; 3] = ["-Ctarget-cpu=x86-64", "-Crelocation-model=static", "-Cforce-unwind-tables=no"];

/// Fixed here, so that the programs are the same whatever the profile of the hypervisor.
const PROFILE: [&str; 7] = [
    "profile.release.opt-level=3",
    "profile.release.debug=false",
    "profile.release.strip=true",
    "profile.release.lto=true",
    "profile.release.codegen-units=1",
    "profile.release.panic='abort'",
    "profile.release.overflow-checks=false",
];

fn main() {
    if let Err(message) = build() {
        // One line a cause, and a failed build: cargo shows both.
        eprintln!("error: the programs of the `guest` crate could not be built: {message}");
        std::process::exit(1);
    }
}

fn build() -> Result<(), String> {
    let workspace = PathBuf::from(variable("CARGO_MANIFEST_DIR")?).join("../..");
    let guest = workspace.join("guest");
    let target_dir = PathBuf::from(variable("OUT_DIR")?).join("guest");
    let target = variable("TARGET")?;
    if !target.starts_with("x86_64-") {
        return Err(format!("the target is {target}, expected x86_64-*"));
    }

    println!("cargo:rerun-if-changed=build.rs");
    for path in ["Cargo.toml", "build.rs", "src"] {
        println!("cargo:rerun-if-changed={}", guest.join(path).display());
    }
    println!("cargo:rerun-if-changed={}", workspace.join("Cargo.toml").display());

    let mut cargo = Command::new(variable("CARGO")?);
    cargo
        .args(["build", "--package", "guest", "--bins", "--release", "--offline"])
        .arg("--manifest-path")
        .arg(workspace.join("Cargo.toml"))
        .args(["--target", &target])
        .arg("--target-dir")
        .arg(&target_dir);
    for setting in PROFILE {
        cargo.args(["--config", setting]);
    }
    // What was set for the hypervisor (flags, wrappers such as clippy's, profiles, a target
    // directory) is not for these programs.
    for (name, _) in env::vars_os() {
        if is_for_the_outer_build(&name.to_string_lossy()) {
            cargo.env_remove(&name);
        }
    }
    cargo.env("CARGO_ENCODED_RUSTFLAGS", FLAGS.join("\x1f"));

    let output = cargo.output().map_err(|error| format!("{cargo:?} did not start: {error}"))?;
    if !output.status.success() {
        return Err(format!("{cargo:?}: {}\n{}", output.status, String::from_utf8_lossy(&output.stderr)));
    }
    for (program, name) in PROGRAMS {
        let path = target_dir.join(&target).join("release").join(program);
        export(name, &path)?;
    }
    Ok(())
}

fn is_for_the_outer_build(name: &str) -> bool {
    let exact = ["RUSTFLAGS", "CARGO_ENCODED_RUSTFLAGS", "CARGO_TARGET_DIR", "CARGO_MAKEFLAGS", "MAKEFLAGS"];
    let prefixes = ["CARGO_PROFILE_", "CARGO_BUILD_", "CARGO_CFG_", "CARGO_FEATURE_", "CARGO_PKG_"];
    exact.contains(&name)
        || prefixes.iter().any(|prefix| name.starts_with(prefix))
        || ["RUSTC_WRAPPER", "RUSTC_WORKSPACE_WRAPPER"].contains(&name)
        || name.starts_with("CARGO_TARGET_") && name.ends_with("_RUSTFLAGS")
}

fn export(name: &str, path: &Path) -> Result<(), String> {
    if !path.is_file() {
        return Err(format!("{} is missing after the build", path.display()));
    }
    println!("cargo:rustc-env={name}={}", path.display());
    Ok(())
}

fn variable(name: &str) -> Result<String, String> {
    env::var(name).map_err(|error| format!("{name}: {error}; run this through cargo"))
}
