//! `samepage run`: one VM in the foreground.

use crate::choice;
use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use super::firecracker;
use anyhow::Context;
use clap::Parser;
use clap::error::ErrorKind;
use devices::virtio::balloon;
use jail::Mode;
use machine::api;
use machine::working_set::{MAX_SAMPLES, SAMPLES, Sampling};
use machine::{
    Console, Drive, Ending, Interface, LINUX_CMDLINE, MAX_VCPUS, PANICKED, Pmem, Unpack, VmConfig, Vsock,
    handover, probe,
};
use memory::numa::Placement;
use memory::own;
use memory::ram::Backing;
use os::print::{errln, outln};

/// The longest name of a VM in the API; Firecracker's limit.
const MAX_ID_BYTES: usize = 64;

/// Run one VM in the foreground: the built-in guest, or a Linux kernel
#[derive(clap::Args)]
#[command(group = clap::ArgGroup::new("api").args(["api_sock", "config_file", "load"]).multiple(true))]
#[command(after_help = "Examples:
  samepage run                                   the built-in guest, on this terminal: type `help`
  samepage run --memory 1G --cpus 4 --kernel vmlinuz --initrd initrd.img
  samepage run --kernel vmlinux --cmdline 'console=ttyS0' --control ./vm.sock
  samepage run --kernel vmlinux --initrd initrd.cpio --drive disk.img --drive /srv/data.img,ro   /dev/vda, /dev/vdb
  samepage run --kernel vmlinux --initrd initrd.cpio --drive root.img,overlay --cmdline 'console=ttyS0 root=/dev/vda rw'
  samepage run --kernel vmlinux --initrd initrd.cpio --pmem base.img,ro --cmdline 'console=ttyS0 root=/dev/pmem0 rootflags=dax ro'
  samepage run --kernel vmlinux --initrd initrd.cpio --net tap0,mac=02:00:00:00:00:01   eth0 on the TAP tap0
  samepage run --kernel vmlinux --initrd initrd.cpio --vsock cid=3,path=./v.sock   streams between guest and host
  samepage run --kernel vmlinuz --kernel-decompress guest --memory 256M   its own decompressor runs, with address randomization
  samepage run --console none --com2 ./com2.sock   driven through a socket, nothing on the terminal
  samepage run --sample-working-set 10 --control ./vm.sock   how much of its memory the guest uses: {\"op\":\"working_set\"}
  samepage run --oom-score-adj 500               out of memory, the host's kernel ends this VM before others
  samepage run --api-sock ./api.sock             Firecracker's REST API: the guest starts by a request
    curl --unix-socket ./api.sock -X PUT http://localhost/boot-source -d '{\"kernel_image_path\": \"builtin\"}'
    curl --unix-socket ./api.sock -X PUT http://localhost/actions -d '{\"action_type\": \"InstanceStart\"}'
  samepage run --api-sock ./api.sock --config-file resources/api/vm.json   the same, started from a file
  samepage run --load vm.state --memory-file vm.memory --resume   a VM goes on where PUT /snapshot/create saved it

`samepage image` makes a kernel and an initrd. On a terminal, Control-A x ends the VM. The exit status is
0 when the guest powered off, reset, or was stopped; 1 when it could not start or could not go on, when its kernel
panicked, or when it was asked to power off and did not in time; 152 when --config-file cannot be used.")]
pub(super) struct Args {
    /// Serve Firecracker's REST API on a socket here; the guest is configured and started by
    /// requests
    #[arg(long, value_name = "SOCKET")]
    api_sock: Option<PathBuf>,
    /// Start the VM described by this JSON file, with the API's objects as its sections
    #[arg(long, value_name = "FILE")]
    config_file: Option<PathBuf>,
    /// Load the VM of this state file, which PUT /snapshot/create wrote; it stands paused until it
    /// is resumed
    #[arg(long, value_name = "STATE", requires = "memory_file", conflicts_with = "config_file")]
    load: Option<PathBuf>,
    /// The memory file of --load
    #[arg(long, requires = "load", value_name = "FILE")]
    memory_file: Option<PathBuf>,
    /// Let the VM of --load run at once
    #[arg(long, requires = "load")]
    resume: bool,
    /// Make no API socket: --config-file describes everything
    #[arg(long, requires = "config_file", conflicts_with = "api_sock")]
    no_api: bool,
    /// The VM's name in the API: letters, digits and hyphens
    #[arg(long, requires = "api", conflicts_with = "name", value_parser = id)]
    id: Option<String>,
    /// Kernel to start: an ELF vmlinux, a bzImage or a distribution's vmlinuz [default: the
    /// built-in guest]
    #[arg(long, conflicts_with = "api", value_name = "FILE")]
    kernel: Option<PathBuf>,
    /// Where a compressed kernel is decompressed; `guest` enables KASLR, unless --cmdline has nokaslr
    #[arg(long, alias = "unpack", conflicts_with = "api", value_name = "WHERE", requires = "kernel", default_value = "host", value_parser = choice::kernel_decompress())]
    kernel_decompress: Unpack,
    /// Initial RAM disk
    #[arg(long, conflicts_with = "api", value_name = "FILE", requires = "kernel")]
    initrd: Option<PathBuf>,
    /// The command line of --kernel
    #[arg(long, conflicts_with = "api", value_name = "TEXT", default_value = LINUX_CMDLINE)]
    cmdline: String,
    /// A disk: a raw image or a block device, writable, or read-only with `,ro`; with `,overlay` it stays as it is, and what the guest
    /// writes ends with it, or is kept in FILE; up to 4 times, for /dev/vda and so on. An image that looks like another format (qcow2, xz)
    /// is refused unless `,raw` is given
    #[arg(long, conflicts_with = "api", value_name = "FILE[,ro][,overlay[=FILE]][,raw]")]
    drive: Vec<OsString>,
    /// A file that the guest has as memory beside its RAM (virtio-pmem), for /dev/pmem0 and so on: written to the file, or read-only with `,ro`;
    /// up to 4 times. Guests of one file have one copy of it, in the host's page cache
    #[arg(long, conflicts_with = "api", value_name = "FILE[,ro]")]
    pmem: Vec<OsString>,
    /// A network interface on a TAP of the host's, or on one made for this VM (`auto`, which takes CAP_NET_ADMIN); up to 4 times, for
    /// eth0 and so on. `bridge` is for `auto`
    #[arg(long, conflicts_with = "api", value_name = "TAP|auto[,mac=ADDRESS][,mtu=BYTES][,bridge=NAME]")]
    net: Vec<Interface>,
    /// Sockets between guest and host: the host connects to SOCKET and says `CONNECT PORT`; the guest connects to the host's
    /// SOCKET_PORT
    #[arg(long, conflicts_with = "api", value_name = "cid=N,path=SOCKET")]
    vsock: Option<Vsock>,
    /// Guest memory with its unit: 16M to 1T
    #[arg(long, conflicts_with = "api", value_name = "SIZE", default_value = "128M", value_parser = choice::guest_memory)]
    memory: u64,
    /// Number of vCPUs, 1 to 32
    #[arg(long, conflicts_with = "api", value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=i64::from(MAX_VCPUS)))]
    cpus: u8,
    /// Where the console (COM1) goes: stdio, none, or a file to append to
    #[arg(long, value_name = "WHERE", default_value = "stdio", value_parser = console)]
    console: Console,
    /// Make a control socket here, one JSON object a line: status, pause, resume, stop, throttle,
    /// ...
    #[arg(long, value_name = "SOCKET")]
    control: Option<PathBuf>,
    /// Make a socket here for COM2, on which the guest takes commands (fill, verify, ...)
    #[arg(long, value_name = "SOCKET")]
    com2: Option<PathBuf>,
    /// The VM's name, for messages
    #[arg(long, default_value = "vm")]
    name: String,
    /// Leave the balloon out
    #[arg(long, conflicts_with = "api")]
    no_balloon: bool,
    /// Offer deflate on OOM: the guest takes pages back from its balloon when it runs out of memory
    #[arg(long, conflicts_with_all = ["no_balloon", "api"])]
    deflate_on_oom: bool,
    /// Offer free page reporting: the guest returns free pages to the host as it frees them
    #[arg(long, conflicts_with_all = ["no_balloon", "api"])]
    free_page_reporting: bool,
    /// Offer free page hinting: the host may ask for free pages
    #[arg(long, conflicts_with_all = ["no_balloon", "api"])]
    free_page_hinting: bool,
    /// Register guest memory with the host kernel's samepage merging (KSM)
    #[arg(long)]
    mergeable: bool,
    /// Register guest memory with Samepage's own merging, through its matchmaker's socket, which
    /// may appear later
    #[arg(long, conflicts_with = "mergeable", value_name = "SOCKET")]
    merge: Option<PathBuf>,
    /// Backing of guest memory: anonymous memory, a memfd, or 2 MiB pages of the host's pool
    /// (vm.nr_hugepages)
    #[arg(long, conflicts_with = "api", value_name = "KIND", default_value = "anonymous", value_parser = choice::backing())]
    backing: Backing,
    /// Ask the host for huge pages, or forbid them [default: the host's setting]
    #[arg(long, conflicts_with = "api", value_name = "yes|no", value_parser = yes_or_no)]
    huge_pages: Option<bool>,
    /// The NUMA node that the VM's memory comes from and that it runs on. `bind`, unless said otherwise, takes no memory of other nodes, `prefer`
    /// does when this one is full
    #[arg(long, conflicts_with = "api", value_name = "NODE[,bind|prefer]")]
    numa: Option<Placement>,
    /// Estimate the guest's working set from a sample of pages, watched for SECONDS at a time: 0.01
    /// to 3600
    #[arg(long, value_name = "SECONDS", value_parser = sampling_period)]
    sample_working_set: Option<Duration>,
    /// Pages in a sample of --sample-working-set: 1 to 2000
    #[arg(long, requires = "sample_working_set", value_name = "N", default_value_t = SAMPLES, value_parser = clap::value_parser!(u64).range(1..=MAX_SAMPLES))]
    samples: u64,
    /// Limit the guest's first touches, in pages a second, until changed through the control socket
    #[arg(long, value_name = "PAGES_PER_SECOND", value_parser = clap::value_parser!(u64).range(1..))]
    throttle: Option<u64>,
    /// The process's oom_score_adj: -1000 (the out-of-memory killer never picks it) to 1000 (it
    /// picks it first)
    #[arg(long, value_name = "N", allow_hyphen_values = true, value_parser = clap::value_parser!(i16).range(oom_score_adj()))]
    oom_score_adj: Option<i16>,
    /// What becomes of a system call that the VM's process does not need
    #[arg(long, value_name = "ACTION", default_value = "kill", conflicts_with = "no_seccomp", value_parser = choice::seccomp())]
    seccomp: Mode,
    /// End when standard input ends
    #[arg(long, hide = true)]
    lifeline: bool,
    #[command(flatten)]
    firecracker: firecracker::Args,
    /// The daemon that starts this VM, and with which it ends as long as no other process can know
    /// of it
    #[arg(long, hide = true, value_name = "PID")]
    daemon: Option<i32>,
    /// Read the VM's whole description from this descriptor; the other options allowed beside it
    /// only identify the VM in lists of processes and to a later daemon
    #[arg(long, hide = true, value_name = "N", conflicts_with_all = ["api", "kernel", "drive", "pmem", "net", "vsock", "merge", "mergeable"])]
    config_fd: Option<i32>,
}

impl Args {
    /// The VM's configuration, from the command line.
    fn config(&mut self) -> VmConfig {
        VmConfig {
            name: self.id.take().unwrap_or_else(|| std::mem::take(&mut self.name)),
            kernel: self.kernel.take(),
            unpack: self.kernel_decompress,
            initrd: self.initrd.take(),
            cmdline: Some(std::mem::take(&mut self.cmdline)),
            memory_bytes: self.memory,
            backing: self.backing,
            cpus: self.cpus,
            drives: self.drive.iter().enumerate().map(|(n, text)| Drive::from_argument(text, n)).collect(),
            pmem: self.pmem.iter().enumerate().map(|(n, text)| Pmem::from_argument(text, n)).collect(),
            net: std::mem::take(&mut self.net),
            vsock: self.vsock.take(),
            balloon: (!self.no_balloon).then_some(balloon::Config {
                target_pages: 0,
                deflate_on_oom: self.deflate_on_oom,
                statistics: true,
                hinting: self.free_page_hinting,
                reporting: self.free_page_reporting,
            }),
            huge_pages: self.huge_pages,
            numa: self.numa,
            mergeable: self.mergeable,
            merge: self.merge.take(),
            sampling: self.sample_working_set.map(|period| Sampling { period, samples: self.samples }),
            throttle: self.throttle,
            entropy: Default::default(),
            mmds: None,
            track_dirty_pages: false,
            image: None,
            console: self.console.clone(),
            control: self.control.take(),
            com2: self.com2.take(),
            seccomp: if self.firecracker.no_seccomp() { Mode::Off } else { self.seccomp },
            has_api: false,
            oom_score_adj: self.oom_score_adj,
            lifeline: self.lifeline,
            daemon: self.daemon,
        }
    }
}

pub(super) fn run(mut args: Args) -> anyhow::Result<ExitCode> {
    if let Some(why) = args.firecracker.refused() {
        clap::Error::raw(ErrorKind::InvalidValue, format!("{why}\n")).exit();
    }
    if let Some(text) = args.firecracker.printed()? {
        outln!("{text}")?;
        return Ok(ExitCode::SUCCESS);
    }
    if args.load.is_some() && !args.resume && args.api_sock.is_none() && args.control.is_none() {
        let why = "--load leaves the VM paused, and nothing can resume it: add --resume, or --control or --api-sock";
        clap::Error::raw(ErrorKind::MissingRequiredArgument, format!("{why}\n")).exit();
    }
    if let Some(note) = args.firecracker.note() {
        errln!("{note}");
    }
    let config = match args.config_fd {
        Some(fd) => handover::read(fd)?,
        None => args.config(),
    };
    let load = args.load.zip(args.memory_file);
    let load = load.map(|(state, memory)| api::LoadSnapshot::of_files(state, memory, args.resume));
    if args.api_sock.is_some() || args.config_file.is_some() || load.is_some() {
        return serve(api::Options {
            socket: args.api_sock,
            config_file: args.config_file,
            load,
            logger: args.firecracker.logger(),
            metrics_path: args.firecracker.metrics_path(),
            max_body_bytes: args.firecracker.max_body_bytes(),
            mmds_limit: args.firecracker.mmds_limit(),
            metadata: args.firecracker.metadata(),
            firecracker_version: api::VERSION,
            rest: config,
        });
    }
    start(&config)
}

/// Serves a VM with an API until it ends.
pub(super) fn serve(options: api::Options) -> anyhow::Result<ExitCode> {
    prepare(&options.rest)?;
    let (name, on_stdio) = (options.rest.name.clone(), options.rest.console == Console::Stdio);
    Ok(status(&name, on_stdio, api::run(options)?))
}

/// What a daemon starts a VM's process with. It is parsed by itself: to describe all commands and their options, as [`Args`] needs,
/// takes a good part of a millisecond, of each clone.
#[derive(clap::Parser)]
#[command(disable_help_flag = true, disable_version_flag = true)]
pub(super) struct Handed {
    #[arg(long)]
    name: String,
    #[arg(long)]
    control: PathBuf,
    #[arg(long)]
    daemon: Option<i32>,
    #[arg(long)]
    config_fd: i32,
}

impl Handed {
    /// From the command line, if it is such a one.
    pub(super) fn parse(mut words: impl Iterator<Item = OsString>) -> Option<Self> {
        let program = words.next()?;
        (words.next()? == "run").then(|| Self::try_parse_from(std::iter::once(program).chain(words)).ok())?
    }
}

/// Runs the VM that a daemon has described.
pub(super) fn run_handed(handed: &Handed) -> anyhow::Result<ExitCode> {
    start(&handover::read(handed.config_fd)?)
}

/// Makes this process what `config` says of it, and says what its VM is not good for.
pub(super) fn prepare(config: &VmConfig) -> anyhow::Result<()> {
    config.prepare_process()?;
    if config.kernel.is_some()
        && let Some(backend) = probe::backend().filter(|b| !b.runs_stock_kernels())
    {
        // Linux takes minutes, in silence, to reach an instruction that is not emulated.
        errln!(
            "note: this KVM ({}) emulates ring 0: a stock kernel crawls for minutes and then fails; \
             `samepage doctor` says more",
            backend.short_name()
        );
    }
    Ok(())
}

/// Runs a VM until it ends.
fn start(config: &VmConfig) -> anyhow::Result<ExitCode> {
    prepare(config)?;
    let ending = machine::run(config, |_| {}).with_context(|| format!("{} did not start", config.name))?;
    Ok(status(&config.name, config.console == Console::Stdio, ending))
}

/// What the process ends with, and why.
pub(super) fn status(name: &str, on_stdio: bool, ending: Ending) -> ExitCode {
    tracing::info!("{name} has ended: {ending:?}");
    if on_stdio && matches!(ending, Ending::Panicked(_)) {
        // It may have been in the middle of a line.
        errln!("");
    }
    match ending {
        Ending::PowerOff | Ending::Reset | Ending::Stopped => return ExitCode::SUCCESS,
        Ending::Panicked(Some(reason)) => errln!("error: {name}: {PANICKED}: {reason}"),
        Ending::Panicked(None) => {
            errln!("error: {name}: {PANICKED}; its console may say why");
        }
        Ending::CutOff { limit } => errln!(
            "error: {name}: the guest was asked to power off, had not after {} s, and was stopped: data not yet \
             written to its drives is lost",
            limit.as_secs()
        ),
        Ending::Fault(report) => {
            errln!("error: {name}: {report}");
        }
    }
    ExitCode::FAILURE
}

/// The range in the integer that clap compares in.
fn oom_score_adj() -> std::ops::RangeInclusive<i64> {
    i64::from(*own::OOM_SCORE_ADJ.start())..=i64::from(*own::OOM_SCORE_ADJ.end())
}

fn console(text: &str) -> Result<Console, String> {
    match text {
        "" => Err("expected stdio, none, or the name of a file".into()),
        "stdio" => Ok(Console::Stdio),
        "none" => Ok(Console::None),
        file => Ok(Console::File(file.into())),
    }
}

/// Parses an API's name of a VM, as Firecracker does.
pub(super) fn id(text: &str) -> Result<String, String> {
    match text.len() {
        1..=MAX_ID_BYTES if text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-') => Ok(text.into()),
        _ => Err(format!("expected 1 to {MAX_ID_BYTES} letters, digits and hyphens")),
    }
}

fn sampling_period(text: &str) -> Result<Duration, String> {
    match text.parse() {
        Ok(seconds @ 0.01..=3600.0) => Ok(Duration::from_secs_f64(seconds)),
        _ => Err("expected a number of seconds, 0.01 to 3600".into()),
    }
}

fn yes_or_no(text: &str) -> Result<bool, String> {
    match text {
        "yes" => Ok(true),
        "no" => Ok(false),
        _ => Err("expected yes or no".into()),
    }
}
