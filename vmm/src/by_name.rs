//! The program called as `firecracker`, or `samepage firecracker`: its arguments, exit statuses and output, for callers that start a
//! binary of that name. What `samepage run` shares with it is in `firecracker.rs`.
//!
//! A VM started so joins the daemon that `SAMEPAGE_MERGE`, or the file [`MERGE_FILE`] beside the program's name, says.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Parser;
use jail::Mode;
use machine::api::{self, API_SOCKET, CONTROL_SUFFIX, FIRECRACKER_VERSION};
use machine::{Console, VmConfig};
use os::print::{errln, outln};

use super::errors::{help_with, say};
use super::{exit_status, firecracker, run as vm};

/// Names the merge socket of a daemon.
const MERGE_VARIABLE: &str = "SAMEPAGE_MERGE";
/// Beside the program's name, with the merge socket's path in its first line.
const MERGE_FILE: &str = "samepage.merge";
/// The longest such file: a path, and a line feed.
const MAX_MERGE_FILE_BYTES: u64 = 4097;
/// Firecracker's exit status for arguments that are wrong.
const EXIT_BAD_ARGUMENTS: u8 = 153;
/// Firecracker's name of a VM that has none.
const ANONYMOUS: &str = "anonymous-instance";

/// What the program may be called.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Name {
    Firecracker,
    Jailer,
}

impl Name {
    /// By the last part of its path, or by the first argument; None is `samepage` itself. The rest are its arguments.
    pub(super) fn of(mut arguments: Vec<OsString>) -> (Option<Self>, Vec<OsString>) {
        let called = |text: &OsStr| match Path::new(text).file_name().and_then(OsStr::to_str) {
            Some("firecracker") => Some(Self::Firecracker),
            Some("jailer") => Some(Self::Jailer),
            _ => None,
        };
        if let Some(name) = arguments.first().and_then(|first| called(first)) {
            return (Some(name), arguments);
        }
        // The subcommand that `samepage help` lists; its exit statuses are Firecracker's, too.
        if arguments.get(1).is_some_and(|second| second == "firecracker") {
            arguments.remove(0);
            return (Some(Self::Firecracker), arguments);
        }
        (None, arguments)
    }
}

/// Run one VM with Firecracker's command line; also by a link to samepage that is called firecracker
#[derive(clap::Args)]
#[command(disable_version_flag = true)]
#[command(group = clap::ArgGroup::new("api").args(["api_sock", "config_file"]).multiple(true))]
#[command(after_help = "This is Samepage under Firecracker's name. What differs from Firecracker, in short:
  - Merging: with SAMEPAGE_MERGE=SOCKET, or a file samepage.merge beside the link with SOCKET in it, the VM joins that daemon
    (samepage host --open). Its control socket is then at API_SOCK.control.
  - GET / says app_name Samepage; GET /version and --version say the version whose API is followed.
  - SIGTERM, SIGINT and SIGHUP end the VM in good order, with status 0.
  - --enable-pci and --seccomp-filter are refused, --boot-timer does nothing. Snapshots are Samepage's own.
  - The API's socket has mode 0600. On a terminal, Control-A x ends the VM.
The reference has the whole list: resources/docs/reference/firecracker.md.

Exit status: 0 the VM ended, 1 it could not start or go on, 152 the configuration was wrong, 153 the arguments were.")]
pub(super) struct Args {
    /// Where the API's socket is made
    #[arg(long, value_name = "SOCKET", default_value = API_SOCKET)]
    api_sock: PathBuf,
    /// The VM's name: letters, digits and hyphens, at most 64
    #[arg(long, value_name = "ID", default_value = ANONYMOUS, value_parser = vm::id)]
    id: String,
    /// Start the VM that this JSON file describes
    #[arg(long, value_name = "FILE")]
    config_file: Option<PathBuf>,
    /// Make no API socket: --config-file describes everything
    #[arg(long, requires = "config_file")]
    no_api: bool,
    /// Make a control socket here [default, with a daemon: API_SOCK.control]
    #[arg(long, value_name = "SOCKET")]
    control: Option<PathBuf>,
    #[command(flatten)]
    firecracker: firecracker::Args,
    /// Print the version, and end
    #[arg(long, short = 'V')]
    version: bool,
    /// Ignored, as Firecracker does
    #[arg(last = true, hide = true)]
    extra: Vec<OsString>,
}

/// As a program of its own.
#[derive(Parser)]
#[command(name = "firecracker", disable_version_flag = true)]
struct Program {
    #[command(flatten)]
    args: Args,
}

/// As a subcommand: [`Name::of`] has found it before, but for `samepage help`.
pub(super) fn run(args: Args) -> anyhow::Result<ExitCode> {
    start(args, OsStr::new(""))
}

/// The program of that name.
pub(super) fn main(name: Name, arguments: Vec<OsString>) -> ExitCode {
    if name == Name::Jailer {
        return super::jailer::main(arguments);
    }
    let link = arguments.first().cloned().unwrap_or_default();
    let args = match parse(arguments) {
        Ok(args) => args,
        Err(said) => return help_with(&said, Some(EXIT_BAD_ARGUMENTS)),
    };
    start(args, &link).unwrap_or_else(|error| {
        say(&*error);
        exit_status::of(&error)
    })
}

fn parse(arguments: Vec<OsString>) -> Result<Args, clap::Error> {
    Program::try_parse_from(with_api_sock(arguments)).map(|program| program.args)
}

/// Firecracker makes its socket at a place of its own if none is given.
fn with_api_sock(mut arguments: Vec<OsString>) -> Vec<OsString> {
    let options = arguments.iter().skip(1).take_while(|argument| *argument != "--");
    let is_given = options.map(|argument| argument.as_bytes()).any(|bytes| {
        ["--api-sock", "--no-api"].iter().any(|option| bytes == option.as_bytes())
            || bytes.starts_with(b"--api-sock=")
    });
    if !is_given && !arguments.is_empty() {
        arguments.splice(1..1, ["--api-sock", API_SOCKET].map(OsString::from));
    }
    arguments
}

fn start(args: Args, link: &OsStr) -> anyhow::Result<ExitCode> {
    if args.version {
        outln!(
            "Firecracker v{FIRECRACKER_VERSION}\n\nThis is Samepage {}, which follows that version's API.",
            api::VERSION
        )?;
        return Ok(ExitCode::SUCCESS);
    }
    if let Some(why) = args.firecracker.refused() {
        errln!("error: {why}");
        return Ok(ExitCode::from(EXIT_BAD_ARGUMENTS));
    }
    if let Some(text) = args.firecracker.printed()? {
        outln!("{text}")?;
        return Ok(ExitCode::SUCCESS);
    }
    if let Some(note) = args.firecracker.note() {
        errln!("{note}");
    }
    let socket = (!args.no_api).then_some(args.api_sock);
    let merge = merge_socket(std::env::var_os(MERGE_VARIABLE), link)?;
    let control = args.control.or_else(|| {
        let mut path = OsString::from(socket.as_ref().filter(|_| merge.is_some())?);
        path.push(CONTROL_SUFFIX);
        Some(path.into())
    });
    if merge.is_some() && control.is_none() {
        errln!("note: with --no-api a daemon takes this VM in only with --control SOCKET");
    }
    let seccomp = if args.firecracker.no_seccomp() { Mode::Off } else { Mode::default() };
    let rest =
        VmConfig { name: args.id, merge, control, seccomp, console: Console::Stdio, ..VmConfig::default() };
    vm::serve(api::Options {
        socket,
        config_file: args.config_file,
        load: None,
        logger: args.firecracker.logger(),
        metrics_path: args.firecracker.metrics_path(),
        max_body_bytes: args.firecracker.max_body_bytes(),
        mmds_limit: args.firecracker.mmds_limit(),
        metadata: args.firecracker.metadata(),
        firecracker_version: FIRECRACKER_VERSION,
        rest,
    })
}

/// The merge socket of the daemon that this VM is to join: of the variable; or else of the file beside `link`, by which the program was
/// called. An empty name is none.
fn merge_socket(variable: Option<OsString>, link: &OsStr) -> anyhow::Result<Option<PathBuf>> {
    if let Some(socket) = variable {
        return Ok(Some(socket).filter(|socket| !socket.is_empty()).map(PathBuf::from));
    }
    let Some(file) = beside(link, std::env::var_os("PATH")) else { return Ok(None) };
    let named =
        |source: io::Error| anyhow::Error::new(source).context(format!("cannot read {}", file.display()));
    let mut text = Vec::new();
    match os::named_file::stream(&file) {
        Ok(open) => {
            io::Read::read_to_end(&mut io::Read::take(open, MAX_MERGE_FILE_BYTES), &mut text)
                .map_err(named)?;
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(named(error)),
    }
    let line = text.split(|byte| *byte == b'\n').next().unwrap_or_default().trim_ascii();
    let socket = PathBuf::from(OsString::from_vec(line.to_vec()));
    anyhow::ensure!(
        socket.is_absolute(),
        "{} says {socket:?}: expected the absolute path of a daemon's merge socket in its first line",
        file.display()
    );
    Ok(Some(socket))
}

/// [`MERGE_FILE`] in the directory of the name by which the program was called, as the shell finds it.
fn beside(link: &OsStr, path: Option<OsString>) -> Option<PathBuf> {
    if link.as_bytes().contains(&b'/') {
        return Some(Path::new(link).parent()?.join(MERGE_FILE));
    }
    let path = path?;
    let place = std::env::split_paths(&path).find(|place| fs::metadata(place.join(link)).is_ok());
    Some(place?.join(MERGE_FILE))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(text: &str) -> Vec<OsString> {
        text.split_whitespace().map(OsString::from).collect()
    }

    #[test]
    fn names_are_known() {
        for (text, name, rest) in [
            ("/usr/bin/firecracker --id a", Some(Name::Firecracker), 3),
            ("samepage firecracker --id a", Some(Name::Firecracker), 3),
            ("./jailer", Some(Name::Jailer), 1),
            ("samepage run firecracker", None, 3),
            ("", None, 0),
        ] {
            let (found, arguments) = Name::of(words(text));
            assert_eq!((found, arguments.len()), (name, rest), "{text}");
        }
    }

    #[test]
    fn the_socket_has_a_place_of_its_own() {
        for (text, api_sock, id) in [
            ("firecracker", API_SOCKET, ANONYMOUS),
            ("firecracker --id a --level Info", API_SOCKET, "a"),
            ("firecracker --api-sock=/a", "/a", ANONYMOUS),
            ("firecracker --api-sock /b --no-seccomp -- --api-sock c", "/b", ANONYMOUS),
        ] {
            let args = parse(words(text)).unwrap_or_else(|e| panic!("{text}: {e}"));
            assert_eq!((args.api_sock.as_path(), args.id.as_str()), (Path::new(api_sock), id), "{text}");
        }
        for text in
            ["firecracker --no-api", "firecracker --id a_b", "firecracker --foo", "firecracker --kernel k"]
        {
            assert!(parse(words(text)).is_err(), "{text}");
        }
    }

    #[test]
    fn the_daemon_is_named_by_the_variable_or_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let link = dir.path().join("firecracker");
        let of = |variable: Option<&str>| merge_socket(variable.map(OsString::from), link.as_os_str());
        assert_eq!(of(None).unwrap(), None);
        assert_eq!(of(Some("/m")).unwrap(), Some("/m".into()));
        let file = dir.path().join(MERGE_FILE);
        fs::write(&file, "/run/a b.sock \nmore").unwrap();
        assert_eq!(of(None).unwrap(), Some("/run/a b.sock".into()));
        assert_eq!(of(Some("")).unwrap(), None, "an empty variable joins none");
        for text in ["", "a.sock\n"] {
            fs::write(&file, text).unwrap();
            assert!(of(None).unwrap_err().to_string().contains("expected the absolute path"), "{text:?}");
        }
        fs::write(&link, "").unwrap();
        let path = std::env::join_paths([Path::new("/nowhere"), dir.path()]).unwrap();
        assert_eq!(beside(OsStr::new("firecracker"), Some(path)), Some(file));
        assert_eq!(beside(OsStr::new("firecracker"), None), None);
    }
}
