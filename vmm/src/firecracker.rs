//! Options of `firecracker` that its callers give: what means something here works, what changes nothing is accepted, and
//! what would not be done is refused by name.

use std::path::PathBuf;

use machine::api::{LogLevel, Logger, MAX_BODY_BYTES};

/// The most that `--http-api-max-payload-size` allows.
const MAX_PAYLOAD_BYTES: u64 = 1 << 30;

/// By Firecracker's names, in the order of its help.
#[derive(clap::Args)]
#[group(id = "firecracker")]
#[command(next_help_heading = "Options for callers of Firecracker, with --api-sock or --config-file")]
pub(super) struct Args {
    /// Append the program's messages to this file or FIFO [default: standard error]
    #[arg(long, requires = "api", value_name = "FILE")]
    log_path: Option<PathBuf>,
    /// The least that is worth a message: Off, Error, Warning, Info, Debug or Trace [default: Info with a --log-path]
    #[arg(long, requires = "api", value_name = "LEVEL")]
    level: Option<LogLevel>,
    /// Only messages of this module and those below it
    #[arg(long, requires = "api", value_name = "MODULE")]
    module: Option<String>,
    /// Have messages say their level
    #[arg(long, requires = "api")]
    show_level: bool,
    /// Have messages say where in the source they come from
    #[arg(long, requires = "api")]
    show_log_origin: bool,
    /// Write metrics to this file or FIFO, as PUT /metrics
    #[arg(long, requires = "api", value_name = "FILE")]
    metrics_path: Option<PathBuf>,
    /// The longest body of a request
    #[arg(long, requires = "api", value_name = "BYTES", default_value_t = MAX_BODY_BYTES as u64, value_parser = clap::value_parser!(u64).range(1..=MAX_PAYLOAD_BYTES))]
    http_api_max_payload_size: u64,

    // What there is nothing to switch off or to limit for.
    #[arg(long, requires = "api", hide = true)]
    no_seccomp: bool,
    #[arg(long, requires = "api", hide = true)]
    mmds_size_limit: Option<u64>,
    // What only goes into metrics that Samepage has not.
    #[arg(long, requires = "api", hide = true)]
    start_time_us: Option<u64>,
    #[arg(long, requires = "api", hide = true)]
    start_time_cpu_us: Option<u64>,
    #[arg(long, requires = "api", hide = true)]
    parent_cpu_time_us: Option<u64>,
    #[arg(long, requires = "api", hide = true)]
    boot_timer: bool,
    // What is not there yet.
    #[arg(long, hide = true, value_name = "FILE")]
    seccomp_filter: Option<PathBuf>,
    #[arg(long, hide = true, value_name = "FILE")]
    metadata: Option<PathBuf>,
    #[arg(long, hide = true)]
    enable_pci: bool,
    #[arg(long, hide = true)]
    snapshot_version: bool,
    #[arg(long, hide = true, value_name = "FILE")]
    describe_snapshot: Option<PathBuf>,
}

impl Args {
    /// What was asked for that Samepage does not do, and why not.
    pub(super) fn refused(&self) -> Option<String> {
        let (option, what) = if self.seccomp_filter.is_some() {
            ("--seccomp-filter", "its VMs run without a filter of system calls; leave it out to accept that")
        } else if self.metadata.is_some() {
            ("--metadata", "it has no metadata service (MMDS)")
        } else if self.enable_pci {
            ("--enable-pci", "its devices are virtio-mmio")
        } else if self.snapshot_version {
            ("--snapshot-version", "it has no snapshots")
        } else if self.describe_snapshot.is_some() {
            ("--describe-snapshot", "it has no snapshots")
        } else {
            return None;
        };
        Some(format!("{option} is not supported by Samepage yet: {what}"))
    }

    /// What was asked for and changes nothing, where the caller may look for it.
    pub(super) fn note(&self) -> Option<&'static str> {
        self.boot_timer.then_some("note: --boot-timer does nothing: Samepage has no boot timer device")
    }

    /// How messages are logged, if anything was said about it.
    pub(super) fn logger(&self) -> Option<Logger> {
        let logger = Logger {
            log_path: self.log_path.clone(),
            level: self.level,
            show_level: self.show_level.then_some(true),
            show_log_origin: self.show_log_origin.then_some(true),
            module: self.module.clone(),
        };
        (logger != Logger::default()).then_some(logger)
    }

    /// Where metrics go.
    pub(super) fn metrics_path(&self) -> Option<PathBuf> {
        self.metrics_path.clone()
    }

    /// The longest body of a request.
    pub(super) fn max_body_bytes(&self) -> usize {
        self.http_api_max_payload_size as usize
    }
}
