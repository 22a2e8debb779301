//! What the first process of a Linux guest does before it serves: mounts, modules, network
//! interfaces, the channel.

use core::ffi::CStr;
use core::fmt::{self, Write};

use guest::protocol::Text;

use crate::exec;
use crate::network;
use crate::root::{self, Process};
use crate::sys::{self, Access, Errno, Fd, STDERR, STDIN, STDOUT};

/// The first thing written, on the console: benches time its arrival.
const FIRST_LINE: &str = "samepage agent: init\n";

const MODULES: &str = "/modules/";
const MODULE_ORDER: &CStr = c"/modules/order";
/// Those that are loaded only where there is persistent memory.
const PMEM_ORDER: &CStr = c"/modules/order.pmem";
/// The kind of such a device, as the kernel writes it.
const PMEM_KIND: &[u8] = b"0x001b";
/// The most virtio devices of a guest.
const MAX_VIRTIO: u32 = 16;
const CHANNEL: &CStr = c"/dev/ttyS1";

/// Longest path and longest parameters of a module, with the final NUL.
pub(crate) const PATH_MAX: usize = 256;
/// The longest command line of x86, and its end.
const CMDLINE_BYTES: usize = 2049;

/// Writes a line to the console, if there is one.
pub(crate) fn log(message: fmt::Arguments<'_>) {
    let mut line = Text::new();
    let _ = writeln!(line, "samepage agent: {message}");
    let _ = STDERR.write(line.as_bytes());
}

/// Mounts, loads modules, configures the network, opens the control channel, and switches to
/// another root if there is one. A failure is reported and the rest goes on, except without that
/// root. Whether this process is the first one still.
pub(crate) fn start() -> (Channel, bool) {
    let told = STDOUT.write(FIRST_LINE.as_bytes());
    for (kind, at) in [(c"proc", c"/proc"), (c"sysfs", c"/sys"), (c"devtmpfs", c"/dev")] {
        if let Err(error) = sys::mkdir(at).and_then(|()| sys::mount(kind, at)) {
            log(format_args!("mounting {kind:?} on {at:?}: {error}"));
        }
    }
    if told.is_err() {
        open_console();
        let _ = STDOUT.write(FIRST_LINE.as_bytes());
    }
    load_modules(MODULE_ORDER);
    if has_pmem() {
        load_modules(PMEM_ORDER);
    }
    let mut buffer = [0; CMDLINE_BYTES];
    let read = Fd::open(c"/proc/cmdline", Access::Read).and_then(|file| {
        let len = file.read_all(&mut buffer);
        file.close();
        len
    });
    let cmdline = read.ok().and_then(|len| str::from_utf8(&buffer[..len]).ok()).unwrap_or_default();
    network::start(cmdline);
    let channel = Channel::open();
    let is_init = root::switch(cmdline) == Process::Init;
    // Before there are pages of a workload, which a process of its own would share.
    exec::start();
    (channel, is_init)
}

/// An initramfs without /dev/console starts its first process with no files open.
fn open_console() {
    if let Ok(console) = Fd::open(c"/dev/console", Access::ReadWrite) {
        for standard in [STDIN, STDOUT, STDERR] {
            if console != standard {
                console.dup_to(standard);
            }
        }
    }
}

/// Whether the virtio bus, which there is when its module is loaded, has a device of that kind.
fn has_pmem() -> bool {
    (0..MAX_VIRTIO).any(|number| {
        let (mut path, mut digits, mut kind) = ([0; PATH_MAX], Text::new(), [0; 8]);
        let _ = write!(digits, "{number}");
        let parts = [b"/sys/bus/virtio/devices/virtio", digits.as_bytes(), b"/device"];
        let Some(path) = c_string(&mut path, &parts) else { return false };
        let Ok(file) = Fd::open(path, Access::Read) else { return false };
        let read = file.read_all(&mut kind);
        file.close();
        read.is_ok_and(|len| kind[..len].starts_with(PMEM_KIND))
    })
}

fn load_modules(order: &CStr) {
    each_module(order, |line| {
        if let Err(error) = load_module(line) {
            log(format_args!("module {}: {error}", str::from_utf8(line).unwrap_or("?")));
        }
    });
}

/// Gives the memory of the initramfs' files back that are not needed again.
pub(crate) fn remove_modules() {
    for order in [MODULE_ORDER, PMEM_ORDER] {
        each_module(order, |line| {
            let mut path = [0; PATH_MAX];
            let name = line.split(|byte| *byte == b' ').next().unwrap_or_default();
            if let Some(path) = c_string(&mut path, &[MODULES.as_bytes(), name]) {
                let _ = sys::root::unlink(path);
            }
        });
        let _ = sys::root::unlink(order);
    }
}

/// Calls `each` with the lines of a list of modules.
fn each_module(order: &CStr, mut each: impl FnMut(&[u8])) {
    let mut buffer = [0; 8192];
    let read = Fd::open(order, Access::Read).and_then(|file| {
        let len = file.read_all(&mut buffer);
        file.close();
        len
    });
    let len = match read {
        Ok(len) => len,
        Err(error) => return log(format_args!("{order:?}: {error}")),
    };
    for line in buffer[..len].split(|byte| *byte == b'\n') {
        let line = line.trim_ascii();
        if !line.is_empty() {
            each(line);
        }
    }
}

/// `line` is a file name and, behind a space, parameters.
fn load_module(line: &[u8]) -> Result<(), Errno> {
    const NAME_TOO_LONG: Errno = Errno(36);
    let (name, parameters) = match line.iter().position(|byte| *byte == b' ') {
        Some(at) => (&line[..at], line[at..].trim_ascii()),
        None => (line, &[][..]),
    };
    let (mut path, mut parameter_string) = ([0; PATH_MAX], [0; PATH_MAX]);
    let path = c_string(&mut path, &[MODULES.as_bytes(), name]).ok_or(NAME_TOO_LONG)?;
    let parameters = c_string(&mut parameter_string, &[parameters]).ok_or(NAME_TOO_LONG)?;
    let file = Fd::open(path, Access::Read)?;
    let loaded = file.load_module(parameters);
    file.close();
    match loaded {
        Err(sys::EEXIST) => Ok(()),
        loaded => loaded,
    }
}

/// The parts after one another, as a C string in `buffer`.
pub(crate) fn c_string<'a>(buffer: &'a mut [u8; PATH_MAX], parts: &[&[u8]]) -> Option<&'a CStr> {
    let mut len = 0;
    for part in parts {
        buffer.get_mut(len..len + part.len())?.copy_from_slice(part);
        len += part.len();
    }
    CStr::from_bytes_until_nul(buffer).ok()
}

/// Where commands come from and replies go.
#[derive(Clone, Copy)]
pub(crate) struct Channel {
    /// Commands.
    pub(crate) input: Fd,
    /// Replies.
    pub(crate) output: Fd,
}

impl Channel {
    /// Standard input and output.
    pub(crate) const STANDARD: Channel = Channel { input: STDIN, output: STDOUT };

    /// The second serial port, or the console if this machine has none.
    fn open() -> Self {
        let port = Fd::open(CHANNEL, Access::ReadWrite).and_then(|fd| {
            fd.probe()?;
            fd.set_raw().map(|()| fd)
        });
        match port {
            Ok(fd) => Self { input: fd, output: fd },
            Err(error) => {
                log(format_args!("{CHANNEL:?}: {error}; the console takes commands"));
                Self::STANDARD
            }
        }
    }
}
