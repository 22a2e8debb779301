//! `samepage exec`: runs a command in a guest, over a stream to the agent.

use std::ffi::OsString;
use std::io::{self, Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{Context, bail};
use fleet::runtime::FleetDir;
use fleet::target::Target;
use guest::exec::{HEADER_BYTES, Header, Kind, MAX_ARGUMENTS, MAX_CONTENT_BYTES, PORT};
use signal_hook::consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGUSR1, SIGUSR2};
use signal_hook::iterator::Signals;

/// Run a command in a Linux guest
#[derive(clap::Args)]
#[command(after_help = "Examples:
  samepage exec web-0 -- ip address
  samepage exec web-0 -- sh -c 'cat >/etc/motd' <motd
  samepage exec ./v.sock -- cat /etc/os-release      of `samepage run --vsock cid=3,path=./v.sock`

The agent runs the command, as root and without a terminal; standard input, output and error are the command's, and signals sent to
this process (INT, TERM, HUP, QUIT, USR1, USR2) are sent to it. The guest has to be one of Linux with the agent and with a vsock:
`vsock = true` in the fleet file. The exit status is the command's, 128 and the signal's number if a signal ended it, 127 if there is no
such program, and 1 if the guest was not reached.")]
pub(super) struct Args {
    /// A guest's name, or the path of a guest's vsock, with a / in it
    #[arg(value_name = "GUEST")]
    guest: String,
    /// The fleet; not needed while only one is up
    #[arg(long, visible_alias = "fleet", value_name = "FLEET")]
    name: Option<String>,
    /// The command and its arguments
    #[arg(value_name = "COMMAND", required = true, last = true)]
    command: Vec<OsString>,
}

/// How long the agent may take to answer.
const CONNECT_LIMIT: Duration = Duration::from_secs(10);
/// The longest answer of the vsock's.
const MAX_ANSWER_BYTES: usize = 32;

pub(super) fn run(args: Args) -> anyhow::Result<ExitCode> {
    let socket = socket(&args)?;
    let mut command = Vec::new();
    for argument in &args.command {
        command.extend_from_slice(argument.as_bytes());
        command.push(0);
    }
    if args.command.len() > MAX_ARGUMENTS || command.len() > MAX_CONTENT_BYTES {
        bail!(
            "the command has {} arguments of {} bytes: expected at most {MAX_ARGUMENTS} of {MAX_CONTENT_BYTES}",
            args.command.len(),
            command.len()
        );
    }
    let stream = connect(&socket).with_context(|| {
        format!(
            "the agent of {} does not answer on {}: expected a Linux guest with the agent of this version, that is up",
            args.guest,
            socket.display()
        )
    })?;
    // Before the command runs: a signal from then on is the command's.
    let signals = Signals::new([SIGINT, SIGTERM, SIGHUP, SIGQUIT, SIGUSR1, SIGUSR2])?;
    let sender = Sender(Arc::new(Mutex::new(stream.try_clone()?)));
    sender.send(Kind::Run, &command).context("the command cannot be sent")?;
    pass_on_input(sender.clone());
    pass_on_signals(signals, sender);
    receive(stream)
}

/// The vsock of the guest.
fn socket(args: &Args) -> anyhow::Result<PathBuf> {
    if args.guest.contains('/') {
        return Ok(PathBuf::from(&args.guest));
    }
    let target = Target::find(&args.guest, args.name.clone())?;
    let socket = match &target.fleet {
        Some(fleet) => FleetDir::of(fleet).vsock(&target.guest)?,
        None => bail!("{} is no guest of a fleet", args.guest),
    };
    match socket.exists() {
        true => Ok(socket),
        false => bail!("guest {} has no vsock: expected `vsock = true` in its fleet file", args.guest),
    }
}

/// As the host's side of a vsock wants it: `CONNECT PORT`, answered by `OK PORT`.
fn connect(socket: &Path) -> io::Result<UnixStream> {
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(CONNECT_LIMIT))?;
    stream.write_all(format!("CONNECT {PORT}\n").as_bytes())?;
    let mut answer = Vec::new();
    // Byte by byte: what follows is the agent's.
    while answer.last() != Some(&b'\n') && answer.len() < MAX_ANSWER_BYTES {
        let mut byte = [0];
        stream.read_exact(&mut byte)?;
        answer.extend(byte);
    }
    match answer.starts_with(b"OK ") {
        true => stream.set_read_timeout(None).map(|()| stream),
        false => Err(io::ErrorKind::InvalidData.into()),
    }
}

/// Sends frames whole, from any thread.
#[derive(Clone)]
struct Sender(Arc<Mutex<UnixStream>>);

impl Sender {
    fn send(&self, kind: Kind, content: &[u8]) -> io::Result<()> {
        let mut frame = Header { kind, len: content.len() }.bytes().to_vec();
        frame.extend_from_slice(content);
        os::lock(&self.0).write_all(&frame)
    }
}

/// The threads end with the process.
fn pass_on_input(sender: Sender) {
    std::thread::spawn(move || {
        let mut piece = [0; MAX_CONTENT_BYTES];
        let mut input = io::stdin().lock();
        loop {
            let sent = match input.read(&mut piece) {
                Ok(len @ 1..) => sender.send(Kind::Input, &piece[..len]),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                _ => return drop(sender.send(Kind::InputEnd, &[])),
            };
            if sent.is_err() {
                return;
            }
        }
    });
}

fn pass_on_signals(mut signals: Signals, sender: Sender) {
    std::thread::spawn(move || {
        for signal in signals.forever() {
            if let Ok(number) = u8::try_from(signal) {
                let _ = sender.send(Kind::Signal, &[number]);
            }
        }
    });
}

/// Writes what comes out, and returns how the command ended.
fn receive(mut stream: UnixStream) -> anyhow::Result<ExitCode> {
    let mut content = vec![0; MAX_CONTENT_BYTES];
    loop {
        let mut header = [0; HEADER_BYTES];
        stream.read_exact(&mut header).context("the guest ended, or its agent did, before the command")?;
        let Some(Header { kind, len }) = Header::parse(header) else {
            bail!("what the guest sends is no frame of the agent's: {header:?}");
        };
        let content = content.get_mut(..len).context("a frame that is too long")?;
        stream.read_exact(content).context("the guest ended in the middle of a frame")?;
        match kind {
            Kind::Output => write(&mut io::stdout(), content).context("standard output")?,
            Kind::Error => write(&mut io::stderr(), content).context("standard error")?,
            Kind::Exited => {
                let status: [u8; 4] = (&*content).try_into().context("a frame of another length")?;
                return Ok(exit_code(i32::from_le_bytes(status)));
            }
            Kind::Refused => bail!("the guest refuses: {}", String::from_utf8_lossy(content).escape_debug()),
            _ => bail!("the guest sends what only the host does: {kind:?}"),
        }
    }
}

fn write(to: &mut impl Write, bytes: &[u8]) -> io::Result<()> {
    to.write_all(bytes)?;
    to.flush()
}

/// The status of wait(2) as a shell has it.
fn exit_code(status: i32) -> ExitCode {
    let code = match status & 0x7f {
        0 => status >> 8 & 0xff,
        signal => 128 + signal,
    };
    ExitCode::from(u8::try_from(code).unwrap_or(u8::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_status_is_as_a_shell_has_it() {
        for (status, code) in [(0, 0), (0x0300, 3), (0xff00, 255), (15, 143), (0x8b, 139)] {
            assert_eq!(exit_code(status), ExitCode::from(code));
        }
    }
}
