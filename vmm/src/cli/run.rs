//! `samepage run`: one VM in the foreground.

use std::path::PathBuf;
use std::process::ExitCode;

use crate::memory::ram::Backing;
use crate::vm::{self, Config, Console, Ending, KernelSource, MAX_VCPUS, probe};
use anyhow::Context;
use devices::virtio::balloon;

/// The command line a Linux guest gets unless told otherwise.
const LINUX_CMDLINE: &str = "console=ttyS0 quiet panic=-1 pci=off";

/// Run one VM in the foreground: the built-in guest, or a Linux kernel
#[derive(clap::Args)]
#[command(after_help = "Examples:
  samepage run                                   the built-in guest, on this terminal: type `help`
  samepage run --memory 1G --cpus 4 --kernel vmlinuz --initrd initrd.img
  samepage run --kernel vmlinux --cmdline 'console=ttyS0' --control ./vm.sock
  samepage run --console none --com2 ./com2.sock   driven through a socket, nothing on the terminal

`samepage image` makes a kernel and an initrd. On a terminal, Control-A x ends the VM. The exit status is
0 when the guest powered off, reset, or was stopped; 1 when it could not start or could not go on.")]
pub(super) struct Args {
    /// Kernel to start: an ELF vmlinux, a bzImage or a distribution's vmlinuz [default: the built-in guest]
    #[arg(long, value_name = "FILE")]
    kernel: Option<PathBuf>,
    /// Initial RAM disk
    #[arg(long, value_name = "FILE", requires = "kernel")]
    initrd: Option<PathBuf>,
    /// The command line of --kernel
    #[arg(long, value_name = "TEXT", default_value = LINUX_CMDLINE)]
    cmdline: String,
    /// Guest memory with its unit: 16M to 1T
    #[arg(long, value_name = "SIZE", default_value = "128M", value_parser = super::memory)]
    memory: u64,
    /// Number of vCPUs, 1 to 32
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=i64::from(MAX_VCPUS)))]
    cpus: u8,
    /// Where the console (COM1) goes: stdio, none, or a file to append to
    #[arg(long, value_name = "WHERE", default_value = "stdio", value_parser = console)]
    console: Console,
    /// Make a control socket here, one JSON object a line: status, pause, resume, stop, mergeable, kvm_stats
    #[arg(long, value_name = "SOCKET")]
    control: Option<PathBuf>,
    /// Make a socket here that carries COM2, through which the guest takes commands (fill, verify, ...)
    #[arg(long, value_name = "SOCKET")]
    com2: Option<PathBuf>,
    /// The VM's name, for messages
    #[arg(long, default_value = "vm")]
    name: String,
    /// Leave the balloon out
    #[arg(long)]
    no_balloon: bool,
    /// Let the guest take pages back from its balloon when it runs out of memory
    #[arg(long, conflicts_with = "no_balloon")]
    deflate_on_oom: bool,
    /// Let the guest tell of free pages as it frees them, and give them back to the host
    #[arg(long, conflicts_with = "no_balloon")]
    free_page_reporting: bool,
    /// Let the host ask for free pages (over the API)
    #[arg(long, conflicts_with = "no_balloon")]
    free_page_hinting: bool,
    /// Let the host kernel's samepage merging (KSM) have the guest's memory
    #[arg(long)]
    mergeable: bool,
    /// What guest memory is made of: anonymous memory, a memfd, or 2 MiB pages of the host's pool (vm.nr_hugepages)
    #[arg(long, value_name = "KIND", default_value = "anonymous")]
    backing: Backing,
    /// Ask the host for huge pages, or forbid them [default: as the host does by itself]
    #[arg(long, value_name = "yes|no", value_parser = yes_or_no)]
    huge_pages: Option<bool>,
    /// End when standard input ends
    #[arg(long, hide = true)]
    lifeline: bool,
}

pub(super) fn run(args: Args) -> anyhow::Result<ExitCode> {
    let name = args.name;
    if args.kernel.is_some()
        && let Some(backend) = probe::backend().filter(|b| !b.runs_stock_kernels())
    {
        // Linux gets as far as an instruction that is not emulated only after minutes, and says nothing meanwhile.
        eprintln!(
            "note: this KVM ({}) emulates ring 0: a stock kernel crawls for minutes and then fails; \
             `samepage doctor` says more",
            backend.short_name()
        );
    }
    let config = Config {
        name: name.clone(),
        kernel: args.kernel.map_or(KernelSource::BuiltIn(super::BUILT_IN_KERNEL), KernelSource::File),
        initrd: args.initrd,
        cmdline: args.cmdline,
        memory_bytes: args.memory,
        backing: args.backing,
        vcpus: args.cpus,
        console: args.console,
        control: args.control,
        com2: args.com2,
        balloon: (!args.no_balloon).then_some(balloon::Config {
            target_pages: 0,
            deflate_on_oom: args.deflate_on_oom,
            statistics: true,
            hinting: args.free_page_hinting,
            reporting: args.free_page_reporting,
        }),
        mergeable: args.mergeable,
        huge_pages: args.huge_pages,
        lifeline: args.lifeline,
    };
    match vm::run(&config).with_context(|| format!("{name} did not start"))? {
        Ending::PowerOff | Ending::Reset | Ending::Stopped => Ok(ExitCode::SUCCESS),
        Ending::Fault(report) => {
            eprintln!("error: {name}: {report}");
            Ok(ExitCode::FAILURE)
        }
    }
}

fn console(text: &str) -> Result<Console, String> {
    match text {
        "" => Err("expected stdio, none, or the name of a file".into()),
        "stdio" => Ok(Console::Stdio),
        "none" => Ok(Console::None),
        file => Ok(Console::File(file.into())),
    }
}

fn yes_or_no(text: &str) -> Result<bool, String> {
    match text {
        "yes" => Ok(true),
        "no" => Ok(false),
        _ => Err("expected yes or no".into()),
    }
}
