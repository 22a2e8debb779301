//! A 16550A serial port, over `vm_superio::Serial`.
//!
//! What this adds: guest output never blocks or fails because of the sink (it waits in a bounded
//! buffer, then is lost and counted), and the event loop can feed input without polling: it offers
//! bytes, keeps what was not accepted, and [`Serial::drained_fd`] signals when the guest has read
//! everything.
//!
//! Baud rate, parity and modem lines are stored and have no effect.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::io::{self, ErrorKind, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use vm_superio::Trigger;
use vm_superio::serial::SerialEvents;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::bus::BusDevice;
use crate::interrupt::IrqLine;
use crate::state::{RestoreError, SerialState};
use crate::warn::Limited;

/// First port of COM1.
pub const COM1_BASE: u64 = 0x3f8;
/// First port of COM2.
pub const COM2_BASE: u64 = 0x2f8;
/// Ports of one serial device.
pub const SERIAL_LEN: u64 = 8;

/// Output that waits for a slow sink. More than a boot log, little enough that a guest cannot use
/// it to eat host memory.
const OUTPUT_BACKLOG_BYTES: usize = 64 * 1024;

/// vm-superio's receive FIFO, which it keeps private; a test holds the number to be true.
const FIFO_BYTES: usize = 64;

const MCR_OFFSET: u8 = 4;
const MCR_LOOP: u8 = 0x10;

/// The port.
#[derive(Debug)]
pub struct Serial {
    uart: vm_superio::Serial<Line, Arc<Drained>, Output>,
    drained: Arc<Drained>,
    line: Line,
}

impl Serial {
    /// A port that interrupts through `irq` and writes what the guest sends to `out`.
    ///
    /// `out` is called on the vCPU's thread: give it a non-blocking descriptor (or something that
    /// only copies). It is flushed after every byte.
    ///
    /// # Errors
    /// If the eventfd behind [`Serial::drained_fd`] cannot be made: the process is out of file
    /// descriptors.
    pub fn new(irq: IrqLine, out: Box<dyn Write + Send>) -> io::Result<Self> {
        let drained = Arc::new(Drained { fd: EventFd::new(EFD_NONBLOCK)?, armed: AtomicBool::new(false) });
        let line = Line(Arc::new(irq));
        let uart = vm_superio::Serial::with_events(line.clone(), Arc::clone(&drained), Output::new(out));
        Ok(Self { uart, drained, line })
    }

    /// Bytes that [`Serial::input`] would accept now.
    pub fn input_room(&self) -> usize {
        self.uart.fifo_capacity()
    }

    /// Puts bytes in the receive FIFO and interrupts the guest. Returns how many were accepted,
    /// from the front: at most [`Serial::input_room`], and none while the guest has the port in
    /// loopback mode.
    pub fn input(&mut self, bytes: &[u8]) -> usize {
        if !bytes.is_empty() {
            self.drained.armed.store(true, Ordering::Relaxed);
        }
        // The only errors are a full FIFO, which accepts nothing, and an interrupt, which cannot
        // fail.
        self.uart.enqueue_raw_bytes(bytes).unwrap_or(0)
    }

    /// Whether there is input that the guest has not read.
    pub fn has_input(&self) -> bool {
        self.uart.fifo_capacity() < FIFO_BYTES
    }

    /// Becomes readable when it is worth calling [`Serial::input`] again after it was offered
    /// something: the guest has read the last byte, or has left loopback mode. Non-blocking.
    pub fn drained_fd(&self) -> &EventFd {
        &self.drained.fd
    }

    /// Whether output waits for the sink. Call [`Serial::flush_output`] when the sink is writable
    /// again.
    pub fn has_pending_output(&self) -> bool {
        !self.uart.writer().pending.is_empty()
    }

    /// Tries again to write output that the sink did not take.
    pub fn flush_output(&mut self) {
        self.uart.writer_mut().retry();
    }

    /// Bytes that the guest sent and that were dropped.
    pub fn lost_output_bytes(&self) -> u64 {
        self.uart.writer().lost.count()
    }
}

impl Serial {
    /// What it is, with what the guest wrote and the sink has not taken.
    pub fn save(&self) -> SerialState {
        let uart = self.uart.state();
        SerialState {
            registers: [
                uart.baud_divisor_low,
                uart.baud_divisor_high,
                uart.interrupt_enable,
                uart.interrupt_identification,
                uart.line_control,
                uart.line_status,
                uart.modem_control,
                uart.modem_status,
                uart.scratch,
            ],
            input: uart.in_buffer,
            output: self.uart.writer().pending.iter().copied().collect(),
        }
    }

    /// Makes it what was saved, with its own line and sink. If the guest is to be interrupted for
    /// what it has not read, it is.
    ///
    /// # Errors
    /// More input or output was saved than there is room for.
    pub fn restore(&mut self, state: &SerialState) -> Result<(), RestoreError> {
        let (input, output) = (state.input.len(), state.output.len());
        if input > FIFO_BYTES || output > OUTPUT_BACKLOG_BYTES {
            let (most_input, most_output) = (FIFO_BYTES, OUTPUT_BACKLOG_BYTES);
            return Err(RestoreError::Serial { input, output, most_input, most_output });
        }
        let r = state.registers;
        let saved = vm_superio::SerialState {
            baud_divisor_low: r[0],
            baud_divisor_high: r[1],
            interrupt_enable: r[2],
            interrupt_identification: r[3],
            line_control: r[4],
            line_status: r[5],
            modem_control: r[6],
            modem_status: r[7],
            scratch: r[8],
            in_buffer: state.input.clone(),
        };
        let mut sink = std::mem::replace(self.uart.writer_mut(), Output::new(Box::new(io::sink())));
        sink.pending = state.output.iter().copied().collect();
        self.drained.armed.store(true, Ordering::Relaxed);
        let (line, drained) = (self.line.clone(), Arc::clone(&self.drained));
        // The only errors are a full FIFO, which was looked at, and an interrupt, which cannot
        // fail.
        if let Ok(uart) = vm_superio::Serial::from_state(&saved, line, drained, sink) {
            self.uart = uart;
        }
        Ok(())
    }
}

/// The port's interrupt line, which the port keeps when its registers are replaced.
#[derive(Clone, Debug)]
struct Line(Arc<IrqLine>);

impl Trigger for Line {
    type E = Infallible;

    fn trigger(&self) -> Result<(), Infallible> {
        self.0.trigger();
        Ok(())
    }
}

impl BusDevice for Serial {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        // The ISA bus splits a wide access to a byte-wide device into neighbouring ports.
        for (register, byte) in (offset..).zip(data) {
            *byte = u8::try_from(register).map_or(0xff, |register| self.uart.read(register));
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        for (register, &byte) in (offset..).zip(data) {
            if let Ok(register) = u8::try_from(register) {
                // Neither the sink (see Output) nor the interrupt line ever returns an error.
                let _ = self.uart.write(register, byte);
                if register == MCR_OFFSET && byte & MCR_LOOP == 0 && !self.has_input() {
                    // Input offered during loopback was refused; the guest's probing is over, so
                    // ask for it again.
                    self.drained.signal();
                }
            }
        }
    }
}

/// Tells the event loop that the receive FIFO is empty.
#[derive(Debug)]
struct Drained {
    fd: EventFd,
    /// Set when input arrived, so that a guest that polls an empty port costs no system calls.
    armed: AtomicBool,
}

impl SerialEvents for Drained {
    fn buffer_read(&self) {}
    fn out_byte(&self) {}
    fn tx_lost_byte(&self) {}

    fn in_buffer_empty(&self) {
        self.signal();
    }
}

impl Drained {
    fn signal(&self) {
        if self.armed.swap(false, Ordering::Relaxed) {
            // Fails only when the counter is full, and then it is readable, which is all that
            // matters.
            let _ = self.fd.write(1);
        }
    }
}

/// A sink that always succeeds: what the real one does not take waits, what cannot wait is lost and
/// counted.
struct Output {
    sink: Box<dyn Write + Send>,
    pending: VecDeque<u8>,
    lost: Limited,
}

impl Output {
    fn new(sink: Box<dyn Write + Send>) -> Self {
        Self { sink, pending: VecDeque::new(), lost: Limited::new("serial: output byte lost") }
    }

    /// Offers the backlog to the sink until it is empty or the sink has had enough.
    fn retry(&mut self) {
        while !self.pending.is_empty() {
            let (front, _) = self.pending.as_slices();
            let len = front.len();
            match self.sink.write(front) {
                Ok(0) => return,
                // A sink that claims more than it was given must not make drain() panic.
                Ok(taken) => drop(self.pending.drain(..taken.min(len))),
                Err(e) if is_transient(&e) => return,
                Err(e) => {
                    // The reader is gone; one byte at a time finds out whether it comes back.
                    self.pending.pop_front();
                    self.lost.hit(format_args!("{e}"));
                    return;
                }
            }
        }
    }

    fn push(&mut self, byte: u8) {
        if self.pending.len() < OUTPUT_BACKLOG_BYTES {
            self.pending.push_back(byte);
        } else {
            self.lost.hit(format_args!("the sink has not taken {OUTPUT_BACKLOG_BYTES} bytes"));
        }
    }
}

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        for &byte in bytes {
            self.push(byte);
        }
        self.retry();
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        match self.sink.flush() {
            Err(e) if !is_transient(&e) => self.lost.hit(format_args!("flush: {e}")),
            _ => {}
        }
        Ok(())
    }
}

impl std::fmt::Debug for Output {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Output")
            .field("pending", &self.pending.len())
            .field("lost", &self.lost)
            .finish_non_exhaustive()
    }
}

fn is_transient(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted)
}

#[cfg(test)]
mod tests;
