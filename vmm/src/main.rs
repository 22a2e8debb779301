//! The `samepage` command.

fn main() -> std::process::ExitCode {
    vmm::main()
}
