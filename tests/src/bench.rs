//! The provenance that every bench prints beside its figures.

use std::path::Path;

use lab::provenance::Provenance;

/// When, where and how: the command is `tests/bench` as it is called for this program.
#[must_use]
pub fn provenance() -> Provenance {
    let provenance = Provenance::now([]);
    Provenance { command: as_called(&provenance.command), ..provenance }
}

/// The words of a command line, with the program of a bench as `tests/bench` names it.
fn as_called(command: &str) -> String {
    let (program, words) = command.split_once(' ').unwrap_or((command, ""));
    let name = Path::new(program).file_name().map_or(program.into(), |name| name.to_string_lossy());
    let name = name.strip_suffix("-bench").unwrap_or(&name);
    format!("tests/bench {name} {words}").trim_end().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_can_be_typed_again() {
        assert_eq!(as_called("target/release/merge-bench --rounds 2"), "tests/bench merge --rounds 2");
        assert_eq!(as_called("/x/balloon-vs-swap-bench"), "tests/bench balloon-vs-swap");
        assert_eq!(as_called("torture --pages 10"), "tests/bench torture --pages 10");
        assert!(provenance().date.ends_with(" UTC"));
    }
}
