//! A VM's API: Firecracker's REST API over a Unix socket.
//!
//! Two threads. The one called "api" ([`wire::http::Server`]) deals with clients and their bytes.
//! The main thread carries out what they ask ([`instance`]), between the turns of the event loop
//! that also serves the VM's devices.

mod balloon;
mod call;
mod config_file;
mod fault;
mod http;
mod instance;
mod keys;
mod launch;
pub mod logger;
mod metrics;
mod model;
mod request;
mod response;
mod snapshot;

use std::io;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::thread;

use thiserror::Error;

pub use config_file::ConfigFileError;
pub use fault::Fault;
pub use http::MAX_BODY_BYTES;
pub use instance::VERSION;
pub use model::{LogLevel, Logger};
pub use snapshot::LoadSnapshot;

use self::call::{Inbox, Wake, way};
use self::http::{Api, MAX_CONNECTIONS, rules};
use self::instance::{Instance, Launch};
use self::launch::Launcher;
use self::model::{ActionType, Metrics};
use self::request::Request;
use crate::listener::ListenerError;
use crate::{Ending, EventLoop, Listener, VmConfig, VmError};
use wire::http::{Listener as Listening, Server};

/// The exit status for a config file that cannot be used; Firecracker's.
pub const EXIT_BAD_CONFIGURATION: u8 = 152;

/// Where Firecracker makes its socket if it is not told.
pub const API_SOCKET: &str = "/run/firecracker.socket";
/// What follows the API socket's path in that of the control socket of a VM that is called as
/// `firecracker` and has a daemon. The daemon looks there.
pub const CONTROL_SUFFIX: &str = ".control";
/// The version of Firecracker whose API description this one follows: what a program called
/// `firecracker` says.
pub const FIRECRACKER_VERSION: &str = "1.17.0-dev";

/// What the API and the command line say together.
#[derive(Clone, Debug)]
pub struct Options {
    /// Where the API's socket is made. None: the config file is all there is.
    pub socket: Option<PathBuf>,
    /// A VM to start at once.
    pub config_file: Option<PathBuf>,
    /// A snapshot to load at once.
    pub load: Option<LoadSnapshot>,
    /// How this program's messages are logged until the API says otherwise.
    pub logger: Option<Logger>,
    /// Where metrics go until the API says otherwise.
    pub metrics_path: Option<PathBuf>,
    /// The longest body of a request.
    pub max_body_bytes: usize,
    /// The most bytes of what the metadata service shows.
    pub mmds_limit: usize,
    /// A JSON file with what it shows at first.
    pub metadata: Option<PathBuf>,
    /// What `GET /version` says.
    pub firecracker_version: &'static str,
    /// What the API does not say: sockets, console, merging, the VM's name. Its `cmdline` is for
    /// kernels without `boot_args`.
    pub rest: VmConfig,
}

/// Why a VM with an API could not be served.
#[derive(Debug, Error)]
pub enum ApiError {
    /// The config file cannot be used.
    #[error("the VM cannot be configured by {path}", path = path.display())]
    ConfigFile {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: ConfigFileError,
    },
    /// The config file is right, but the VM does not start.
    #[error("the VM of {path} cannot be started", path = path.display())]
    Start {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: Fault,
    },
    /// The snapshot that the command line names cannot be loaded.
    #[error("the VM cannot be loaded")]
    Load(#[source] Fault),
    /// What the command line says of the API cannot be done.
    #[error("the command line cannot be carried out")]
    CommandLine(#[source] Fault),
    /// The socket or the event loop failed.
    #[error("the API cannot be served")]
    Vm(#[from] VmError),
    /// The same of its socket.
    #[error("the API cannot be served")]
    Socket(#[from] ListenerError),
    /// The API's thread could not be started.
    #[error("cannot start the API's thread")]
    Thread(#[source] io::Error),
}

impl ApiError {
    /// Whether it is the config file's fault.
    pub fn is_bad_configuration(&self) -> bool {
        match self {
            Self::ConfigFile { .. } => true,
            Self::Start { source, .. } => !matches!(source, Fault::Start(_)),
            Self::Load(_) | Self::CommandLine(_) | Self::Vm(_) | Self::Socket(_) | Self::Thread(_) => false,
        }
    }
}

/// Serves the API, with a VM once it is started, until the VM ends or a signal ends the program.
pub fn run(options: Options) -> Result<Ending, ApiError> {
    let Options {
        socket,
        config_file,
        load,
        logger,
        metrics_path,
        max_body_bytes,
        mmds_limit,
        metadata,
        firecracker_version,
        mut rest,
    } = options;
    rest.has_api = socket.is_some();
    logger::name(&rest.name);
    // Before signals have handlers: one ends the wait for a FIFO's writer.
    let configured = config_file.map(|path| match config_file::read(&path) {
        Ok(requests) => Ok((path, requests)),
        Err(source) => Err(ApiError::ConfigFile { path, source }),
    });
    let configured = configured.transpose()?;
    let events = EventLoop::new(rest.lifeline)?;
    let listener = socket.as_deref().map(Listener::bind_private).transpose()?;
    let mut instance = Instance::new(rest.name.clone(), Launcher::new(rest, events));
    instance.says_version(firecracker_version);
    let mmds = instance.mmds(mmds_limit);
    if let Some(path) = metadata {
        config_file::metadata(&path, mmds, mmds_limit)
            .map_err(|source| ApiError::ConfigFile { path, source })?;
    }
    let asked =
        [logger.map(Request::PutLogger), metrics_path.map(|path| Request::PutMetrics(Metrics::to(path)))];
    for request in asked.into_iter().flatten() {
        instance.carry_out(request).map_err(ApiError::CommandLine)?;
    }
    // After it is known where messages go: the first request is one.
    let (_server, inbox) = match &listener {
        Some(listener) => {
            let (server, inbox) = serve(listener.socket()?, max_body_bytes).map_err(ApiError::Thread)?;
            instance.launch_mut().events.add(Box::new(inbox.called().clone()));
            (Some(server), Some(inbox))
        }
        None => (None, None),
    };
    if let Some((path, requests)) = configured {
        configure(&mut instance, requests)
            .map_err(|source| ApiError::ConfigFile { path: path.clone(), source })?;
        let start = instance.carry_out(Request::PutAction(ActionType::InstanceStart));
        start.map_err(|source| ApiError::Start { path, source })?;
    }
    if let Some(load) = load {
        instance.carry_out(Request::LoadSnapshot(Box::new(load))).map_err(ApiError::Load)?;
    }
    let ending = loop {
        let ending = instance.launch_mut().events.turn()?;
        for call in inbox.iter().flat_map(|inbox| inbox.take(MAX_CONNECTIONS)) {
            call.carry_out(|request| instance.serve(request));
        }
        if let Some(ending) = ending {
            break ending;
        }
    };
    if let Some(vm) = instance.into_vm() {
        vm.stop();
    }
    Ok(ending)
}

/// Starts the thread that serves the clients of `listener` (non-blocking). Their requests, with
/// bodies of at most `max_body_bytes`, come out of the inbox.
fn serve(listener: UnixListener, max_body_bytes: usize) -> io::Result<(Server, Inbox)> {
    let (caller, inbox) = way(Wake::new()?)?;
    let thread = thread::Builder::new().name("api".into()).stack_size(256 << 10);
    let listener = Listening::Unix(listener);
    Ok((Server::start(thread, listener, rules(max_body_bytes), Api(caller))?, inbox))
}

/// Tells the instance what a file says.
fn configure<L: Launch>(
    instance: &mut Instance<L>,
    requests: Vec<(&'static str, Request)>,
) -> Result<(), ConfigFileError> {
    for (section, request) in requests {
        instance.carry_out(request).map_err(ConfigFileError::section(section))?;
    }
    Ok(())
}
