//! The values that an option takes by name, each with its line in the help. The types are of crates
//! that know no command line.

use clap::builder::{PossibleValue, PossibleValuesParser, TypedValueParser};
use fleet::metrics::Format;
use fleet::spec::EngineName;
use image::vmlinux::Unpack;
use jail::Mode;
use lab::contender::Contender;
use memory::layout::{MAX_RAM_BYTES, MIN_RAM_BYTES};
use memory::ram::Backing;
use memory::size::{SizeError, parse_size};
use store::Compression;

/// Value, name, line in the help.
type Choices<T> = &'static [(T, &'static str, &'static str)];

const ENGINES: Choices<EngineName> = &[
    (EngineName::Ksm, "ksm", "The host kernel's samepage merging"),
    (
        EngineName::Slab,
        "slab",
        "Samepage's own: pages of sealed memory files, found by what guests write, each trust domain by itself",
    ),
    (EngineName::Off, "off", "Nothing: the baseline to compare with"),
];

const KERNEL_DECOMPRESS: Choices<Unpack> = &[
    (Unpack::Host, "host", "This program, before the guest starts: faster, and always to the same addresses"),
    (
        Unpack::Guest,
        "guest",
        "The kernel's own decompressor, in the guest: with address randomization (KASLR), unless the command line says nokaslr",
    ),
];

const BACKINGS: Choices<Backing> = &[
    (
        Backing::Anonymous,
        "anonymous",
        "Private anonymous memory, never reserved. The host kernel can merge it, and back it with huge pages by itself",
    ),
    (Backing::Memfd, "memfd", "A memfd, never reserved: memory that another process can map"),
    (
        Backing::Hugetlb,
        "hugetlb",
        "2 MiB pages of the host's pool (`vm.nr_hugepages`), reserved from the start",
    ),
];

const FORMATS: Choices<Format> = &[
    (Format::Text, "text", "Prometheus' own text format, 0.0.4: what promtool and node_exporter read"),
    (Format::OpenMetrics, "openmetrics", "OpenMetrics text, 1.0.0"),
];

const CONTENDERS: Choices<Contender> = &[
    (Contender::Off, "off", "Nothing merges: the baseline"),
    (Contender::Slab, "slab", "Samepage's own engine"),
    (Contender::SlabFrugal, "slab-10", "The same, with at most 10 % of one processor"),
    (Contender::Ksm, "ksm", "KSM at 20000 pages, 10 ms, as fleets set it"),
    (Contender::KsmDefault, "ksm-default", "KSM as the kernel starts with: 100 pages, 20 ms, smart scan"),
    (Contender::KsmAdvisor, "ksm-advisor", "KSM led by the kernel's scan-time advisor, smart scan"),
];

const SECCOMP: Choices<Mode> = &[
    (Mode::Kill, "kill", "It ends the VM, with status 148 and the call's name on standard error"),
    (Mode::Errno, "errno", "It fails (EPERM)"),
    (Mode::Log, "log", "It is made, and the kernel logs it"),
    (Mode::Off, "off", "It is made: there are no filters"),
];

const COMPRESSIONS: Choices<Compression> =
    &[(Compression::Lz4, "lz4", "Fast"), (Compression::Zstd, "zstd", "Smaller, and slower to write")];

/// Other names that a value has.
const ALIASES: &[(&str, &[&str])] = &[("text", &["classic", "prometheus"])];

fn value(name: &'static str, help: &'static str) -> PossibleValue {
    let aliases = ALIASES.iter().find(|(of, _)| *of == name).map_or(&[][..], |(_, aliases)| aliases);
    PossibleValue::new(name).help(help).aliases(aliases.iter().copied())
}

fn parser<T: Copy + Send + Sync>(choices: Choices<T>) -> impl TypedValueParser<Value = T> {
    let values: Vec<_> = choices.iter().map(|(_, name, help)| value(name, help)).collect();
    PossibleValuesParser::new(values).try_map(move |given| {
        let choice = choices.iter().find(|(_, name, help)| value(name, help).matches(&given, false));
        choice.map(|(value, ..)| *value).ok_or_else(|| format!("no value is called {given:?}"))
    })
}

pub(crate) fn engine() -> impl TypedValueParser<Value = EngineName> {
    parser(ENGINES)
}

pub(crate) fn kernel_decompress() -> impl TypedValueParser<Value = Unpack> {
    parser(KERNEL_DECOMPRESS)
}

pub(crate) fn backing() -> impl TypedValueParser<Value = Backing> {
    parser(BACKINGS)
}

pub(crate) fn format() -> impl TypedValueParser<Value = Format> {
    parser(FORMATS)
}

pub(crate) fn seccomp() -> impl TypedValueParser<Value = Mode> {
    parser(SECCOMP)
}

pub(crate) fn contender() -> impl TypedValueParser<Value = Contender> {
    parser(CONTENDERS)
}

/// Parses a guest's memory.
pub(super) fn guest_memory(text: &str) -> Result<u64, SizeError> {
    parse_size(text, MIN_RAM_BYTES, MAX_RAM_BYTES)
}

pub(crate) fn compression() -> impl TypedValueParser<Value = Compression> {
    parser(COMPRESSIONS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_has_one_name_everywhere() {
        for (contender, name, _) in CONTENDERS {
            assert_eq!(contender.name(), *name);
            assert_eq!(serde_json::to_value(contender).unwrap(), *name);
        }
        for (engine, name, _) in ENGINES {
            assert_eq!(engine.name(), *name);
            assert_eq!(serde_json::to_value(engine).unwrap(), *name);
        }
        for (mode, name, _) in SECCOMP {
            assert_eq!(serde_json::to_value(mode).unwrap(), *name);
        }
        for (compression, name, _) in COMPRESSIONS {
            assert_eq!(serde_json::to_value(compression).unwrap(), *name);
        }
        for (place, name, _) in KERNEL_DECOMPRESS {
            assert_eq!(serde_json::to_value(place).unwrap(), *name);
        }
    }

    #[test]
    fn other_names_mean_the_same() {
        let command = clap::Command::new("x").arg(clap::Arg::new("format").value_parser(format()));
        for name in ["text", "classic", "prometheus"] {
            let given = command.clone().try_get_matches_from(["x", name]).unwrap();
            assert_eq!(given.get_one::<Format>("format"), Some(&Format::Text));
        }
        assert!(command.try_get_matches_from(["x", "xml"]).is_err());
    }
}
