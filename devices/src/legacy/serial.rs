//! A 16550A serial port, over `vm_superio::Serial`.
//!
//! What this adds: guest output never blocks or fails because of the sink (it waits in a bounded buffer,
//! then is lost and counted), and the event loop can feed input without polling: it offers bytes, keeps what
//! was not accepted, and is told through [`Serial::drained_fd`] when the guest has read everything.
//!
//! Baud rate, parity and modem lines are stored and mean nothing.

use std::collections::VecDeque;
use std::io::{self, ErrorKind, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use vm_superio::serial::SerialEvents;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::bus::BusDevice;
use crate::interrupt::IrqLine;
use crate::warn::Limited;

/// First port of COM1.
pub const COM1_BASE: u64 = 0x3f8;
/// First port of COM2.
pub const COM2_BASE: u64 = 0x2f8;
/// Ports of one serial device.
pub const SERIAL_LEN: u64 = 8;

/// Output that waits for a slow sink. More than a boot log, little enough that a guest cannot use it to eat
/// host memory.
const OUTPUT_BACKLOG_BYTES: usize = 64 * 1024;

/// vm-superio's receive FIFO, which it keeps private; a test holds the number to be true.
const FIFO_BYTES: usize = 64;

const MCR_OFFSET: u8 = 4;
const MCR_LOOP: u8 = 0x10;

/// The port.
#[derive(Debug)]
pub struct Serial {
    uart: vm_superio::Serial<IrqLine, Arc<Drained>, Output>,
    drained: Arc<Drained>,
}

impl Serial {
    /// A port that interrupts through `irq` and writes what the guest sends to `out`.
    ///
    /// `out` is called on the vCPU's thread: give it a non-blocking descriptor (or something that only
    /// copies). It is flushed after every byte.
    ///
    /// # Errors
    /// If the eventfd behind [`Serial::drained_fd`] cannot be made: the process is out of file descriptors.
    pub fn new(irq: IrqLine, out: Box<dyn Write + Send>) -> io::Result<Self> {
        let drained = Arc::new(Drained { fd: EventFd::new(EFD_NONBLOCK)?, armed: AtomicBool::new(false) });
        let uart = vm_superio::Serial::with_events(irq, Arc::clone(&drained), Output::new(out));
        Ok(Self { uart, drained })
    }

    /// Bytes that [`Serial::input`] would accept now.
    pub fn input_room(&self) -> usize {
        self.uart.fifo_capacity()
    }

    /// Puts bytes in the receive FIFO and interrupts the guest. Returns how many were accepted, from the
    /// front: at most [`Serial::input_room`], and none while the guest has the port in loopback mode.
    pub fn input(&mut self, bytes: &[u8]) -> usize {
        if !bytes.is_empty() {
            self.drained.armed.store(true, Ordering::Relaxed);
        }
        // The only errors are a full FIFO, which accepts nothing, and an interrupt, which cannot fail.
        self.uart.enqueue_raw_bytes(bytes).unwrap_or(0)
    }

    /// Whether there is input that the guest has not read.
    pub fn has_input(&self) -> bool {
        self.uart.fifo_capacity() < FIFO_BYTES
    }

    /// Becomes readable when it is worth calling [`Serial::input`] again after it was offered something: the
    /// guest has read the last byte, or has left loopback mode. Non-blocking.
    pub fn drained_fd(&self) -> &EventFd {
        &self.drained.fd
    }

    /// Whether output waits for the sink. Call [`Serial::flush_output`] when the sink is writable again.
    pub fn has_pending_output(&self) -> bool {
        !self.uart.writer().pending.is_empty()
    }

    /// Tries again to write output that the sink did not take.
    pub fn flush_output(&mut self) {
        self.uart.writer_mut().retry();
    }

    /// Bytes that the guest sent and nobody will ever see.
    pub fn lost_output_bytes(&self) -> u64 {
        self.uart.writer().lost.count()
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
                    // Input offered during loopback was refused; the guest's probing is over, so ask for it again.
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
            // Fails only when the counter is full, and then it is readable, which is all that matters.
            let _ = self.fd.write(1);
        }
    }
}

/// A sink that always succeeds: what the real one does not take waits, what cannot wait is lost and counted.
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
