//! Link arguments for the two freestanding programs. The library and its tests link as usual.

use std::env;

/// Static, at a fixed address, and without the C library's start files. Both GNU ld and LLD, behind
/// `cc`, take these.
const FREESTANDING: [&str; 7] = [
    "-nostdlib",
    "-nostartfiles",
    "-static",
    "-no-pie",
    "-Wl,--build-id=none",
    "-Wl,-z,noexecstack",
    "-Wl,-z,norelro",
];

fn main() {
    let script = format!("{}/src/bin/kernel/kernel.ld", env::var("CARGO_MANIFEST_DIR").unwrap_or_default());
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-changed={script}");
    for argument in FREESTANDING {
        println!("cargo:rustc-link-arg-bin=kernel={argument}");
        println!("cargo:rustc-link-arg-bin=agent={argument}");
    }
    println!("cargo:rustc-link-arg-bin=kernel=-Wl,-T,{script}");
    // The script aligns its sections itself; a larger page size would only pad the file.
    println!("cargo:rustc-link-arg-bin=kernel=-Wl,-z,max-page-size=4096");
}
