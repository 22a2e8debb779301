//! Where this program's own messages go: standard error, or what `PUT /logger` and `--log-path`
//! say, in lines like Firecracker's. There is one logger a process, as there is one VM.

use std::fmt::{self, Write as _};
use std::fs::File;
use std::io::{self, Write as _};
use std::sync::{Mutex, MutexGuard};
use std::time::{SystemTime, UNIX_EPOCH};

use tracing::field::{Field, Visit};
use tracing::level_filters::LevelFilter;
use tracing::subscriber::Interest;
use tracing::{Event, Level, Metadata, Subscriber};
use tracing_subscriber::layer::{Context, Layer, SubscriberExt};
use tracing_subscriber::registry;

use super::model::{LogLevel, Logger};
use os::print::Stderr;
use os::{Moment, named_file};

static STATE: Mutex<State> = Mutex::new(State::new());

/// What is logged, and where.
struct State {
    level: LevelFilter,
    /// Standard error without it.
    file: Option<File>,
    id: String,
    show_level: bool,
    show_origin: bool,
    module: Option<String>,
}

impl State {
    const fn new() -> Self {
        let id = String::new();
        Self { level: LevelFilter::WARN, file: None, id, show_level: false, show_origin: false, module: None }
    }

    fn is_logged(&self, metadata: &Metadata) -> bool {
        *metadata.level() <= self.level
            && self.module.as_deref().is_none_or(|module| is_within(metadata.target(), module))
    }

    /// A line for a file: the time, the source, and the message.
    fn line(&self, metadata: &Metadata, message: &str) -> String {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let mut line = format!("{}.{:09} [{}", Moment::of(now.as_secs()), now.subsec_nanos(), self.id);
        // Writing to memory does not fail.
        let _ = write!(line, ":{}", std::thread::current().name().unwrap_or("?"));
        if self.show_level {
            let _ = write!(line, ":{}", metadata.level());
        }
        if self.show_origin {
            let (file, at) = (metadata.file().unwrap_or("?"), metadata.line().unwrap_or(0));
            let _ = write!(line, ":{file}:{at}");
        }
        let _ = writeln!(line, "] {message}");
        line
    }
}

fn state() -> MutexGuard<'static, State> {
    os::lock(&STATE)
}

/// The crates below `vmm/` that a VM process is made of, and the command.
const VMM: [&str; 8] = ["vmm", "machine", "merge", "measure", "memory", "image", "os", "programs"];

/// Whether a module is this one or below it. `vmm` is all of [`VMM`], and `vmm::machine` is
/// `machine`.
fn is_within(target: &str, module: &str) -> bool {
    let module = match module.strip_prefix("vmm") {
        Some("") => return VMM.contains(&target.split("::").next().unwrap_or(target)),
        Some(below) => below.strip_prefix("::").unwrap_or(module),
        None => module,
    };
    target.strip_prefix(module).is_some_and(|rest| rest.is_empty() || rest.starts_with("::"))
}

/// From now on this program's messages of `level` and above are logged, on standard error at first.
pub fn start(level: Level) {
    state().level = LevelFilter::from_level(level);
    // One that is there already stays.
    let _ = tracing::subscriber::set_global_default(registry().with(Log));
}

/// What the VM is called in the lines of a file.
pub(super) fn name(id: &str) {
    state().id = id.to_owned();
}

/// Logs as `logger` says from now on; what it does not say stays as it is.
pub(super) fn configure(logger: &Logger) -> io::Result<()> {
    let file = logger.log_path.as_deref().map(|path| named_file::append(path, 0o600)).transpose()?;
    let mut state = state();
    // Firecracker's level when nothing is said.
    state.level = match logger.level.unwrap_or(LogLevel::Info) {
        LogLevel::Off => LevelFilter::OFF,
        LogLevel::Error => LevelFilter::ERROR,
        LogLevel::Warning => LevelFilter::WARN,
        LogLevel::Info => LevelFilter::INFO,
        LogLevel::Debug => LevelFilter::DEBUG,
        LogLevel::Trace => LevelFilter::TRACE,
    };
    state.file = file.or(state.file.take());
    state.show_level = logger.show_level.unwrap_or(state.show_level);
    state.show_origin = logger.show_log_origin.unwrap_or(state.show_origin);
    state.module = logger.module.clone().or(state.module.take());
    Ok(())
}

/// Gives every message to the state of the moment.
struct Log;

impl<S: Subscriber> Layer<S> for Log {
    fn register_callsite(&self, _: &'static Metadata<'static>) -> Interest {
        // The level may change.
        Interest::sometimes()
    }

    fn enabled(&self, metadata: &Metadata<'_>, _: Context<'_, S>) -> bool {
        state().is_logged(metadata)
    }

    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        let metadata = event.metadata();
        let mut message = Message::default();
        event.record(&mut message);
        let text = format!("{}{}", message.text, message.fields);
        let mut state = state();
        // Neither a full disk, nor a FIFO that is full or has lost its reader, is a reason to stop:
        // the line is lost.
        let line = state.line(metadata, &text);
        let _ = match &mut state.file {
            Some(file) => file.write_all(line.as_bytes()),
            None => writeln!(Stderr, "{:>5} {}: {text}", metadata.level(), metadata.target()),
        };
    }
}

/// An event's message, and its other fields after it.
#[derive(Default)]
struct Message {
    text: String,
    fields: String,
}

impl Visit for Message {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        let _ = match field.name() {
            "message" => write!(self.text, "{value:?}"),
            name => write!(self.fields, " {name}={value:?}"),
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modules_are_whole() {
        for (target, module, within) in [
            ("machine::api::server", "machine::api", true),
            ("machine::api", "machine::api", true),
            ("machine::apish", "machine::api", false),
            ("machine::api::server", "vmm::machine::api", true),
            ("machine::api::server", "vmm", true),
            ("vmm::run", "vmm", true),
            ("devices", "vmm", false),
        ] {
            assert_eq!(is_within(target, module), within, "{target} {module}");
        }
    }
}
