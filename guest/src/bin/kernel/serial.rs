//! The serial ports: the control channel and the console.
//!
//! The VMM's UART always takes output and holds back input, so nothing here waits for the line
//! status register before it writes.

use core::fmt::{self, Write};

use guest::protocol::{CONSOLE_PORT, CONTROL_PORT, LineReader, MAX_LINE, Reply};
use guest::service::{Out, Port};

use crate::port::{read_u8, write_u8};

const DATA: u16 = 0;
const INTERRUPT_ENABLE: u16 = 1;
const FIFO_CONTROL: u16 = 2;
const LINE_CONTROL: u16 = 3;
const MODEM_CONTROL: u16 = 4;
const LINE_STATUS: u16 = 5;

const DATA_READY: u8 = 1;

const BANNER: &str = "\r\nSamepage built-in guest. `help` lists the commands.\r\n";
const PROMPT: &str = "> ";
const HELP: &str = "\
fill seed=N common=N zero=P common_pct=P dup=P unique=P [pages=N]  write every page; percentages sum to 100\r
churn class=zero|common|dup|unique|all rate=N [seconds=N]          rewrite N pages a second; 0 stops\r
latency class=zero|common|dup|unique|all rate=N [seconds=N]        time N random writes a second; 0 stops\r
verify                                                             check every page\r
free percent=P                                                     forget part of the pages\r
idle                                                               stop everything\r
report                                                             counts\r
balloon report|check|touch|off|on|hostile [pages=N] [kind=KIND]    look after the balloon, or misuse it\r
chase class=C nodes=N packed=0|1                                   time N reads that wait for one another; N is a power of two\r
touch class=C cpus=N                                               have N other processors read pages; 0 stops\r
poweroff | reboot                                                  end the guest\r
";

pub(crate) struct Serial {
    base: u16,
    line: LineReader,
}

impl Serial {
    fn new(base: u16) -> Self {
        for (register, value) in
            [(INTERRUPT_ENABLE, 0), (LINE_CONTROL, 0x03), (FIFO_CONTROL, 0x07), (MODEM_CONTROL, 0x03)]
        {
            write_u8(base + register, value);
        }
        Self { base, line: LineReader::new() }
    }

    fn pending(&self) -> bool {
        read_u8(self.base + LINE_STATUS) & DATA_READY != 0
    }

    fn read(&self) -> u8 {
        read_u8(self.base + DATA)
    }
}

impl Write for Serial {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for byte in text.bytes() {
            write_u8(self.base + DATA, byte);
        }
        Ok(())
    }
}

/// Both ports. Errors of `write!` are dropped throughout: a UART has none, and a `Display` of ours
/// neither.
pub(crate) struct Ports {
    control: Serial,
    console: Serial,
}

impl Ports {
    /// Both ports, initialised.
    pub(crate) fn new() -> Self {
        Self { control: Serial::new(CONTROL_PORT), console: Serial::new(CONSOLE_PORT) }
    }

    /// Prints a greeting on the console.
    pub(crate) fn greet(&mut self) {
        let _ = self.console.write_str(BANNER);
        let _ = self.console.write_str(PROMPT);
    }

    /// Reports on both ports why the guest dies.
    pub(crate) fn last_words(&mut self, message: fmt::Arguments<'_>) {
        let text = guest::protocol::Text::of(message);
        let reply = Reply::Panic { message: text };
        let _ = write!(self.console, "\r\n{reply}\r\n");
        let _ = writeln!(self.control, "{reply}");
    }

    /// The line whose end was read, but for its `\n`.
    pub(crate) fn take_line(&mut self, port: Port) -> LineReader {
        core::mem::take(match port {
            Port::Control => &mut self.control.line,
            Port::Console => &mut self.console.line,
        })
    }

    /// Reads what has arrived, at most to the end of a line.
    pub(crate) fn read(&mut self, port: Port) -> Input {
        match port {
            Port::Control => self.control.read_line(),
            Port::Console => self.console.edit_line(),
        }
    }
}

/// What [`Ports::read`] found.
pub(crate) enum Input {
    /// Nothing had arrived.
    Nothing,
    /// Part of a line.
    Part,
    /// The end of a line, for [`Ports::take_line`].
    Line,
}

impl Serial {
    /// The status is read once, not before each byte: the VMM's UART reads as 0 when it is empty,
    /// and no line holds a 0.
    fn read_line(&mut self) -> Input {
        if !self.pending() {
            return Input::Nothing;
        }
        for _ in 0..MAX_LINE {
            match self.read() {
                0 => break,
                b'\n' => return Input::Line,
                // Only `\n` ends a line.
                byte => _ = self.line.push(byte),
            }
        }
        Input::Part
    }

    /// A key typed on the console: echoed; backspace, Ctrl-C, Ctrl-U and `help` are known.
    fn edit_line(&mut self) -> Input {
        if !self.pending() {
            return Input::Nothing;
        }
        match self.read() {
            b'\r' | b'\n' => {
                let _ = self.write_str("\r\n");
                match self.line.so_far() {
                    "help" | "?" => _ = write!(self, "{HELP}{PROMPT}"),
                    "" => _ = self.write_str(PROMPT),
                    // The reply brings the next prompt.
                    _ => return Input::Line,
                }
                self.line.clear();
            }
            0x08 | 0x7f if self.line.pop() => _ = self.write_str("\x08 \x08"),
            0x03 | 0x15 => {
                self.line.clear();
                let _ = write!(self, "\r\n{PROMPT}");
            }
            byte @ b' '..=b'~' => {
                let _ = self.line.push(byte);
                write_u8(self.base + DATA, byte);
            }
            _ => {}
        }
        Input::Part
    }
}

impl Out for Ports {
    fn send(&mut self, port: Port, reply: &Reply) {
        let _ = match port {
            Port::Control => writeln!(self.control, "{reply}"),
            // It may come in the middle of a typed line.
            Port::Console => {
                let typed = self.console.line.clone();
                write!(self.console, "\r{reply}\r\n{PROMPT}{}", typed.so_far())
            }
        };
    }
}
