//! The built-in guest: a bare-metal kernel of one program, which serves the control protocol.
//!
//! Loaded as ELF64 at 1 MiB by Samepage and entered in 64-bit mode with `rsi` at Linux boot
//! parameters (of which it reads the memory map and the command line). `start.s` leaves ring 0
//! after some thirty instructions; everything here runs in ring 3, with the ports it needs opened
//! by the I/O bitmap of its task. So it runs at full speed on every KVM, also where ring 0 is
//! emulated. It uses no interrupts: it waits in the VMM, through a port of Samepage's.
//!
//! Command line: `tsc_khz=N`, the frequency of the time stamp counter, for the rate of churn;
//! `virtio_mmio=0xADDRESS:N`, where to look for a balloon; `generation=N`, the address of the
//! number that differs in each copy of this guest; `processors=N`, how many it has. The first does
//! all the work; the others read pages when `touch` says so, and wait in the VMM otherwise.
#![no_std]
#![no_main]
#![expect(unsafe_code, reason = "the entry points from assembly")]

use core::arch::global_asm;
use core::panic::PanicInfo;

use guest::protocol::{Command, Kind, Ready, Reply};
use guest::service::{Out, Port, Service, Wait};
use guest::tsc;
use guest::virtio::Transport;
use guest::virtio::balloon::{Driver, PageMap};
use guest::workload::{Pages, Workload};

use memory::{BootParams, Generation, PhysicalPages, Plan, Unfit};
use processors::Processors;
use serial::{Input, Ports};

mod memory;
mod mmio;
mod port;
mod processors;
#[path = "../runtime.rs"]
mod runtime;
mod serial;

global_asm!(include_str!("start.s"));

const DEFAULT_TSC_KHZ: u64 = 2_500_000;

/// While there is work, input is looked at this often.
const POLL_MICROS: u64 = 10_000;

struct Clock {
    khz: u64,
}

impl Clock {
    fn micros(&self) -> u64 {
        (u128::from(tsc::now()) * 1000 / u128::from(self.khz)) as u64
    }
}

/// The first Rust code, in ring 3.
#[unsafe(no_mangle)]
extern "C" fn kernel_main(boot_params: *const u8) -> ! {
    let mut ports = Ports::new();
    // SAFETY: `start.s` passes on what the VMM gave it.
    let boot = unsafe { BootParams::new(boot_params) };
    // SAFETY: this is the only call, and nothing has used memory but the image.
    let Plan { pages, generations, page_map, mem_pages, stacks } = match unsafe { memory::plan(&boot) } {
        Ok(plan) => plan,
        Err(Unfit::NoRam) => panic!("the memory map has no RAM around the kernel at 1 MiB"),
        Err(Unfit::TooSmall { have }) => {
            panic!("{have} bytes of RAM above 1 MiB leave no page for a workload")
        }
    };
    let mut generation = Generation::of(&boot);
    let count = boot.parameter("processors").unwrap_or(1);
    let khz = boot.parameter("tsc_khz").filter(|khz| *khz > 0).unwrap_or(DEFAULT_TSC_KHZ);
    let clock = Clock { khz };
    let mut processors = Processors::start(count, stacks, khz);
    let ready = Ready { kind: Kind::Builtin, pages: pages.count(), base: pages.base(), mem_pages };
    let balloon =
        boot.virtio_mmio().and_then(|(base, count)| mmio::find_balloon(base, count)).map(|window| {
            let (shared, gpa) = mmio::shared();
            let mut driver =
                Driver::new(window, shared, gpa, PageMap::new(pages.frames(), page_map), mem_pages);
            // A device that does not start is no reason not to serve: `balloon report` tells.
            let _ = driver.on();
            driver
        });
    let mut service = Service::with_balloon(Workload::new(pages, generations), balloon);
    ports.send(Port::Control, &Reply::Ready(ready));
    ports.greet();
    serve(&mut service, &mut ports, &clock, &mut generation, &mut processors)
}

fn serve<T: Transport>(
    service: &mut Service<'_, PhysicalPages, T>,
    ports: &mut Ports,
    clock: &Clock,
    generation: &mut Generation,
    processors: &mut Processors,
) -> ! {
    let mut wait = Wait::Forever;
    let mut polled_micros = 0;
    loop {
        look(service, ports, generation);
        let now = clock.micros();
        if wait != Wait::No || now.saturating_sub(polled_micros) >= POLL_MICROS {
            polled_micros = now;
            service.poll_balloon();
            while poll(service, ports, generation, processors, now) {}
        }
        wait = service.step(clock.micros(), ports);
        port::wait(wait);
    }
}

/// Sees whether this guest has become a copy, and then says so. Nothing else is done in between:
/// others may know what comes next.
fn look<P: Pages, T: Transport>(
    service: &mut Service<'_, P, T>,
    ports: &mut Ports,
    generation: &mut Generation,
) {
    if let Some(number) = generation.change() {
        service.reseed(number);
        ports.send(Port::Control, &Reply::Generation { number });
    }
}

/// Carries out the commands that have arrived. False if there were none.
fn poll<T: Transport>(
    service: &mut Service<'_, PhysicalPages, T>,
    ports: &mut Ports,
    generation: &mut Generation,
    processors: &mut Processors,
    now: u64,
) -> bool {
    let mut some = false;
    for port in [Port::Control, Port::Console] {
        let input = ports.read(port);
        some |= !matches!(input, Input::Nothing);
        if !matches!(input, Input::Line) {
            continue;
        }
        // What was read may have been sent to a copy.
        look(service, ports, generation);
        let mut reader = ports.take_line(port);
        let Some(line) = reader.push(b'\n') else { continue };
        if let Ok(Command::Touch(touch)) = line.and_then(Command::parse) {
            ports.send(port, &processors.obey(touch, service.workload()));
        } else if let Some(power) = service.line(port, line, now, ports) {
            port::end(power);
        }
    }
    some
}

/// Entered from `start.s` after an exception, in ring 3 with a fresh stack.
#[unsafe(no_mangle)]
extern "C" fn kernel_trap(vector: u64, error: u64, rip: u64, cr2: u64, rsp: u64) -> ! {
    let name = match vector {
        0 => "divide error",
        3 => "breakpoint",
        6 => "invalid opcode",
        8 => "double fault",
        12 => "stack fault",
        13 => "general protection",
        14 => "page fault",
        17 => "alignment check",
        18 => "machine check",
        19 => "SIMD exception",
        _ => "exception",
    };
    die(format_args!("{name} vector={vector} error={error:#x} rip={rip:#x} cr2={cr2:#x} rsp={rsp:#x}"))
}

#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    match info.location() {
        Some(at) => die(format_args!("{} at {}:{}", info.message(), at.file(), at.line())),
        None => die(format_args!("{}", info.message())),
    }
}

fn die(message: core::fmt::Arguments<'_>) -> ! {
    Ports::new().last_words(message);
    port::panicked()
}
