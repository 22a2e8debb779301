//! The agent: the same protocol and the same workloads as the built-in guest, in a real kernel.
//!
//! As process 1 (the initramfs' `/init`) it mounts what it needs, loads the modules that
//! `/modules/order` lists, and takes commands on the second serial port, or on the console if there
//! is none. With `root=` on the kernel's command line it goes on beside the init of that root. As any other process it takes commands on standard input, and has process 1 carry out
//! `poweroff` and `reboot`.
//!
//! Static, with neither a C library nor `std`: it is all there is in the guest's user space.
#![no_std]
#![no_main]
#![expect(unsafe_code, reason = "the entry point from assembly")]

use core::arch::global_asm;
use core::fmt::Write;
use core::panic::PanicInfo;
use core::sync::atomic::{AtomicI32, Ordering};

use guest::protocol::{Command, Done, ErrorCode, Kind, LineReader, MAX_LINE, Ready, Reply, Text};
use guest::service::{Out, Port, Power, Service, Wait};
use guest::workload::{Pages, Workload};

use disk::Cached;
use generation::Generation;
use init::{Channel, log};
use memory::{MappedPages, MemInfo};
use sys::{Fd, RETRY_MILLIS};

mod balloon;
mod clock;
mod disk;
mod exec;
mod frames;
mod generation;
mod init;
mod memory;
mod network;
mod power;
mod root;
#[path = "../runtime.rs"]
mod runtime;
mod sys;

global_asm!(".global _start", "_start:", "xor ebp, ebp", "and rsp, -16", "call agent_main", "ud2");

/// Where replies go, for the panic handler.
static OUTPUT: AtomicI32 = AtomicI32::new(sys::STDOUT.0);

/// The first Rust code.
#[unsafe(no_mangle)]
extern "C" fn agent_main() -> ! {
    let (channel, is_init) = match sys::pid() {
        1 => init::start(),
        _ => (Channel::STANDARD, false),
    };
    OUTPUT.store(channel.output.0, Ordering::Relaxed);
    let memory = MemInfo::read().unwrap_or_else(|error| {
        log(format_args!("/proc/meminfo: {error}; no pages for a workload"));
        MemInfo { total: 0, available: 0 }
    });
    let (pages, generations) = MappedPages::new(memory.usable());
    let ready = Ready { kind: Kind::Linux, pages: pages.count(), base: 0, mem_pages: memory.total };
    let mut service = Service::new(Workload::new(pages, generations));
    let (line, disk, generation) = (LineReader::new(), Cached::NEW, Generation::find());
    let mut agent = Agent { channel, line, is_init, disk, generation };
    agent.send(Port::Control, &Reply::Ready(ready));
    agent.serve(&mut service)
}

struct Agent {
    channel: Channel,
    line: LineReader,
    is_init: bool,
    disk: Cached,
    generation: Generation,
}

impl Agent {
    fn serve<P: Pages>(&mut self, service: &mut Service<'_, P>) -> ! {
        loop {
            self.look(service);
            let millis = match service.step(sys::now_micros(), self) {
                Wait::No => 0,
                Wait::Millis(millis) => i32::try_from(millis).unwrap_or(i32::MAX),
                Wait::Forever => -1,
            };
            if self.channel.input.wait_readable(millis) {
                self.obey(service);
            }
        }
    }

    /// Sees whether this guest has become a copy, and then says so. Nothing else is done in between.
    fn look<P: Pages>(&mut self, service: &mut Service<'_, P>) {
        if let Some(number) = self.generation.change() {
            service.reseed(number);
            self.send(Port::Control, &Reply::Generation { number });
        }
    }

    /// Reads once, and carries out the lines that this completes.
    fn obey<P: Pages>(&mut self, service: &mut Service<'_, P>) {
        let mut buffer = [0; MAX_LINE];
        let len = match self.channel.input.read(&mut buffer) {
            Ok(len @ 1..) => len,
            Ok(0) if !self.is_init => sys::exit(0),
            // A closed port, or a signal: there is no other client.
            _ => return sys::sleep_millis(RETRY_MILLIS),
        };
        // What was read may have been sent to a copy.
        self.look(service);
        for byte in &buffer[..len] {
            if *byte == b'\n' {
                let mut line = core::mem::take(&mut self.line);
                let Some(line) = line.push(*byte) else { continue };
                // Commands for this kernel, which do not involve the workload.
                let reply = match line.and_then(Command::parse) {
                    Ok(Command::Balloon(action)) => Some(balloon::obey(action)),
                    Ok(Command::Frames { from }) => Some(frames::obey(from)),
                    Ok(Command::Disk(action)) => Some(self.disk.obey(action)),
                    Ok(Command::Clock { millis }) => Some(clock::obey(millis)),
                    Ok(Command::Random) => Some(random()),
                    Ok(Command::Mac { was, is }) => Some(network::obey(was, is)),
                    Ok(Command::Poweroff) if !self.is_init => Some(power::ask(Power::Off)),
                    Ok(Command::Reboot) if !self.is_init => Some(power::ask(Power::Reset)),
                    _ => None,
                };
                if let Some(reply) = reply {
                    self.send(Port::Control, &reply);
                    continue;
                }
                if let Some(power) = service.line(Port::Control, line, sys::now_micros(), self) {
                    self.channel.output.drain();
                    power::end(power);
                }
            } else {
                // Only `\n` ends a line.
                let _ = self.line.push(*byte);
            }
        }
    }
}

impl Out for Agent {
    fn send(&mut self, _port: Port, reply: &Reply) {
        send(self.channel.output, reply);
    }
}

/// A random number of the kernel's.
fn random() -> Reply {
    match sys::random() {
        Ok(number) => Reply::Ok(Done::Random { number }),
        Err(error) => {
            Reply::Err { code: ErrorCode::Failed, message: Text::of(format_args!("getrandom: {error}")) }
        }
    }
}

/// Sends a line. A failed write cannot be reported anywhere.
fn send(output: Fd, reply: &Reply) {
    let mut line = Line { bytes: [0; MAX_LINE], len: 0 };
    // Replies fit by construction.
    let _ = writeln!(line, "{reply}");
    let _ = output.write(&line.bytes[..line.len]);
}

/// A reply, gathered so that it is written by one system call.
struct Line {
    bytes: [u8; MAX_LINE],
    len: usize,
}

impl Write for Line {
    fn write_str(&mut self, text: &str) -> core::fmt::Result {
        let end = self.len + text.len();
        self.bytes.get_mut(self.len..end).ok_or(core::fmt::Error)?.copy_from_slice(text.as_bytes());
        self.len = end;
        Ok(())
    }
}

#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    let message = match info.location() {
        Some(at) => Text::of(format_args!("{} at {}:{}", info.message(), at.file(), at.line())),
        None => Text::of(info.message()),
    };
    log(format_args!("panic {message}"));
    let output = Fd(OUTPUT.load(Ordering::Relaxed));
    send(output, &Reply::Panic { message });
    output.drain();
    // The kernel panics when process 1 exits: the VMM must see that the guest failed.
    sys::sync();
    sys::exit(101)
}
