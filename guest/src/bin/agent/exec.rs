//! Commands that a program on the host has run in this guest, over the frames of [`guest::exec`]. A
//! process waits on the port and forks one for each stream; that one starts the command, and passes
//! on what goes in and comes out.

use core::ffi::CStr;
use core::ptr;

use guest::exec::{HEADER_BYTES, Header, Kind, MAX_ARGUMENTS, MAX_CONTENT_BYTES, PORT};

use crate::init::{PATH_MAX, c_string, log};
use crate::sys::process::{self, Child, Pipe, Poll, Ready};
use crate::sys::root as calls;
use crate::sys::{self, ENOENT, Errno, Fd, RETRY_MILLIS, STDERR, STDIN, STDOUT};

/// The most commands at a time: a host that asks for more is refused.
const MAX_COMMANDS: usize = 64;
/// Where programs are that are named without a slash.
const PLACES: [&str; 6] =
    ["/usr/local/sbin/", "/usr/local/bin/", "/usr/sbin/", "/usr/bin/", "/sbin/", "/bin/"];
const SIGHUP: i32 = 1;
const NOT_FOUND: u8 = 127;
/// Bytes that are passed on at a time.
const PIECE_BYTES: usize = 4096;

/// Starts the process that waits for streams, if this guest has sockets to its host.
pub(crate) fn start() {
    let Ok(listener) = process::listen_vsock(PORT) else { return };
    match calls::fork() {
        Ok(0) => serve(listener),
        Ok(_) => {}
        Err(error) => log(format_args!("no commands for the host: {error}")),
    }
    listener.close();
}

fn serve(listener: Fd) -> ! {
    let mut running = 0;
    loop {
        let stream = process::accept(listener);
        // Each was counted when it was forked.
        while running > 0 && process::reap() {
            running -= 1;
        }
        let Ok(stream) = stream else {
            sys::sleep_millis(RETRY_MILLIS);
            continue;
        };
        if running == MAX_COMMANDS {
            refuse(stream, "too many commands run at a time");
        } else {
            match calls::fork() {
                Ok(0) => {
                    listener.close();
                    run(stream);
                    sys::exit(0);
                }
                Ok(_) => running += 1,
                Err(_) => refuse(stream, "there is no memory for another process"),
            }
        }
        stream.close();
    }
}

/// Serves one stream to its end.
fn run(stream: Fd) {
    let mut content = [0; MAX_CONTENT_BYTES];
    let Some((Kind::Run, len)) = receive(stream, &mut content) else {
        return refuse(stream, "the first frame is no command");
    };
    let mut arguments = [ptr::null(); MAX_ARGUMENTS + 1];
    let mut count = 0;
    for argument in content[..len].split_inclusive(|byte| *byte == 0) {
        let (Ok(argument), Some(place)) =
            (CStr::from_bytes_with_nul(argument), arguments[..MAX_ARGUMENTS].get_mut(count))
        else {
            return refuse(stream, "the command has too many arguments, or one that does not end");
        };
        *place = argument.as_ptr();
        count += 1;
    }
    let name = content[..len].split(|byte| *byte == 0).next().unwrap_or_default();
    if count == 0 || name.is_empty() {
        return refuse(stream, "there is no command");
    }
    let pipes = [Pipe::new(), Pipe::new(), Pipe::new()];
    let [Ok(input), Ok(output), Ok(error)] = pipes else {
        return refuse(stream, "there are no descriptors for its pipes");
    };
    match calls::fork() {
        Ok(0) => {
            input.read.dup_to(STDIN);
            output.write.dup_to(STDOUT);
            error.write.dup_to(STDERR);
            start_program(name, &arguments);
        }
        Ok(pid) => {
            input.read.close();
            output.write.close();
            error.write.close();
            pass_on(
                stream,
                Child(pid),
                input.write,
                [(output.read, Kind::Output), (error.read, Kind::Error)],
            );
        }
        Err(_) => refuse(stream, "there is no memory for another process"),
    }
}

/// Becomes the program, or says why not as a shell would.
fn start_program(name: &[u8], arguments: &[*const core::ffi::c_char; MAX_ARGUMENTS + 1]) -> ! {
    let mut failed = ENOENT;
    let places: &[&str] = if name.contains(&b'/') { &[""] } else { &PLACES };
    for place in places {
        let mut path = [0; PATH_MAX];
        match c_string(&mut path, &[place.as_bytes(), name]) {
            Some(path) => {
                let error = process::execute(path, arguments);
                if error != ENOENT {
                    failed = error;
                }
            }
            None => failed = Errno(36),
        }
    }
    log(format_args!("{}: {failed}", str::from_utf8(name).unwrap_or("the command")));
    sys::exit(NOT_FOUND)
}

/// Passes on what goes in and comes out, until the command and its output have ended, or the stream
/// has.
fn pass_on(stream: Fd, child: Child, input: Fd, mut outputs: [(Fd, Kind); 2]) {
    process::block_sigpipe();
    process::set_nonblocking(input);
    let ended = child.descriptor();
    let mut content = [0; MAX_CONTENT_BYTES];
    // What of `content` is still for the command.
    let mut pending = 0..0;
    let mut takes_input = true;
    let mut open = [true; 2];
    let mut status = None;
    loop {
        let mut polls = [
            Poll::reading(stream, pending.is_empty()),
            Poll::writing(input, takes_input && !pending.is_empty()),
            Poll::reading(outputs[0].0, open[0]),
            Poll::reading(outputs[1].0, open[1]),
            Poll::reading(ended, status.is_none()),
        ];
        // Once it has ended, what others of its group still write is not waited for.
        let millis = if status.is_some() { 0 } else { -1 };
        let ready = process::poll(&mut polls, millis);
        if let (Some(status), Ready::None) = (status, ready) {
            return send(stream, Kind::Exited, &i32::to_le_bytes(status)).unwrap_or(());
        }
        for ((at, (fd, kind)), open) in outputs.iter_mut().enumerate().zip(&mut open) {
            if *open && polls[2 + at].is_ready() {
                let mut piece = [0; PIECE_BYTES];
                match fd.read(&mut piece) {
                    Ok(len @ 1..) if send(stream, *kind, &piece[..len]).is_ok() => {}
                    Ok(1..) => return child.signal(SIGHUP),
                    _ => *open = false,
                }
            }
        }
        if polls[1].is_ready() {
            match process::write_some(input, &content[pending.clone()]) {
                Ok(len) => pending.start += len,
                // It has closed it, which is its business.
                Err(_) => pending = 0..0,
            }
        }
        if polls[0].is_ready() {
            match receive(stream, &mut content) {
                Some((Kind::Input, len)) if takes_input => pending = 0..len,
                Some((Kind::InputEnd, _)) if takes_input => {
                    input.close();
                    takes_input = false;
                }
                Some((Kind::Signal, 1)) => child.signal(i32::from(content[0])),
                Some((Kind::Input | Kind::InputEnd, _)) => {}
                _ => return child.signal(SIGHUP),
            }
        }
        if status.is_none() {
            status = child.wait();
        }
    }
}

fn refuse(stream: Fd, why: &str) {
    let _ = send(stream, Kind::Refused, why.as_bytes());
}

fn send(stream: Fd, kind: Kind, content: &[u8]) -> Result<(), Errno> {
    process::send(stream, &Header { kind, len: content.len() }.bytes())?;
    process::send(stream, content)
}

/// The next frame, whole. None at the end, or of what is none.
fn receive(stream: Fd, content: &mut [u8; MAX_CONTENT_BYTES]) -> Option<(Kind, usize)> {
    let mut header = [0; HEADER_BYTES];
    (stream.read_all(&mut header) == Ok(HEADER_BYTES)).then_some(())?;
    let Header { kind, len } = Header::parse(header)?;
    (stream.read_all(&mut content[..len]) == Ok(len)).then_some((kind, len))
}
