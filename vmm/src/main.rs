//! The `samepage` command.
fn main() {}
