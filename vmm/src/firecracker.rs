//! Options that callers of `firecracker` pass: those with a meaning here work, those that change
//! nothing are accepted, and those that Samepage could not honour are refused by name.

use std::path::PathBuf;

use machine::api::{LogLevel, Logger, MAX_BODY_BYTES};
use machine::snapshot::info::{STATE_FORMAT, of_file};

/// The most that `--http-api-max-payload-size` allows.
const MAX_PAYLOAD_BYTES: u64 = 1 << 30;

/// By Firecracker's names, in the order of its help.
#[derive(clap::Args)]
#[group(skip)]
#[command(next_help_heading = "Options for callers of Firecracker, with --api-sock or --config-file")]
pub(super) struct Args {
    /// Append the program's messages to this file or FIFO [default: standard error]
    #[arg(long, requires = "api", value_name = "FILE")]
    log_path: Option<PathBuf>,
    /// Minimum level of messages: Off, Error, Warning, Info, Debug or Trace [default: Info with a
    /// --log-path]
    #[arg(long, requires = "api", value_name = "LEVEL")]
    level: Option<LogLevel>,
    /// Only messages of this module and those below it
    #[arg(long, requires = "api", value_name = "MODULE")]
    module: Option<String>,
    /// Show the level in messages
    #[arg(long, requires = "api")]
    show_level: bool,
    /// Show the source location in messages
    #[arg(long, requires = "api")]
    show_log_origin: bool,
    /// Write metrics to this file or FIFO, as PUT /metrics
    #[arg(long, requires = "api", value_name = "FILE")]
    metrics_path: Option<PathBuf>,
    /// Maximum size of a request's body
    #[arg(long, requires = "api", value_name = "BYTES", default_value_t = MAX_BODY_BYTES as u64, value_parser = clap::value_parser!(u64).range(1..=MAX_PAYLOAD_BYTES))]
    http_api_max_payload_size: u64,
    /// As --seccomp off
    #[arg(long, requires = "api")]
    no_seccomp: bool,
    /// Maximum size of the metadata service's contents, as JSON
    #[arg(long, requires = "api", value_name = "BYTES", default_value_t = machine::MMDS_SIZE_LIMIT as u64, value_parser = clap::value_parser!(u64).range(1..=MAX_PAYLOAD_BYTES))]
    mmds_size_limit: u64,
    /// Put this JSON file into the metadata service
    #[arg(long, requires = "api", value_name = "FILE")]
    metadata: Option<PathBuf>,
    // Used only in metrics that Samepage does not have.
    #[arg(long, requires = "api", hide = true)]
    start_time_us: Option<u64>,
    #[arg(long, requires = "api", hide = true)]
    start_time_cpu_us: Option<u64>,
    #[arg(long, requires = "api", hide = true)]
    parent_cpu_time_us: Option<u64>,
    #[arg(long, requires = "api", hide = true)]
    boot_timer: bool,
    // Not implemented yet.
    #[arg(long, hide = true, value_name = "FILE")]
    seccomp_filter: Option<PathBuf>,
    #[arg(long, hide = true)]
    enable_pci: bool,
    /// Print the version of the state files that are written, and end
    #[arg(long)]
    snapshot_version: bool,
    /// Print the version of this state file, and end
    #[arg(long, value_name = "FILE")]
    describe_snapshot: Option<PathBuf>,
}

impl Args {
    /// The first unsupported option given, and the reason.
    pub(super) fn refused(&self) -> Option<String> {
        let (option, what) = if self.seccomp_filter.is_some() {
            (
                "--seccomp-filter",
                "its filters are its own, one for each kind of thread (--seccomp); leave it out to accept that",
            )
        } else if self.enable_pci {
            ("--enable-pci", "its devices are virtio-mmio")
        } else {
            return None;
        };
        Some(format!("{option} is not supported by Samepage yet: {what}"))
    }

    /// What is to be printed instead of running a VM.
    pub(super) fn printed(&self) -> anyhow::Result<Option<String>> {
        let version = |format| format!("v{format}.0.0");
        match &self.describe_snapshot {
            Some(path) => Ok(Some(version(of_file(path)?.format))),
            None => Ok(self.snapshot_version.then(|| version(STATE_FORMAT))),
        }
    }

    /// A note on an accepted option without effect that the caller may rely on.
    pub(super) fn note(&self) -> Option<&'static str> {
        self.boot_timer.then_some("note: --boot-timer does nothing: Samepage has no boot timer device")
    }

    /// The logger's settings, if any were given.
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

    /// Whether system calls are not to be filtered.
    pub(super) fn no_seccomp(&self) -> bool {
        self.no_seccomp
    }

    pub(super) fn metrics_path(&self) -> Option<PathBuf> {
        self.metrics_path.clone()
    }

    /// Maximum size of the metadata service's contents.
    pub(super) fn mmds_limit(&self) -> usize {
        self.mmds_size_limit as usize
    }

    pub(super) fn metadata(&self) -> Option<PathBuf> {
        self.metadata.clone()
    }

    /// Maximum size of a request's body.
    pub(super) fn max_body_bytes(&self) -> usize {
        self.http_api_max_payload_size as usize
    }
}
