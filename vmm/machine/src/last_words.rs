//! What a guest's kernel says last on its console: whether it has panicked, and of what.
//!
//! A kernel without a driver for the panic port says it here alone, and then resets as it would for
//! a reboot. All of it is the guest's word: it decides how the guest's end is reported, and nothing
//! else.

use std::io::{self, Write};
use std::sync::{Arc, Mutex};

/// What Linux's panic() says, with the reason behind it.
const PANIC: &str = "Kernel panic - not syncing: ";
/// What Linux says when it ends in good order, whatever was said before.
const ORDERLY: [&str; 3] = ["reboot: Restarting system", "reboot: Power down", "reboot: System halted"];
/// What the built-in guest begins its last line with.
const BUILT_IN_PANIC: &str = "panic ";
/// As much of a line as is looked at.
const LINE_BYTES: usize = 512;
/// As much of a reason as is kept.
const REASON_CHARS: usize = 200;

/// What was heard. Clones share it.
#[derive(Clone, Debug, Default)]
pub struct LastWords(Arc<Mutex<Option<String>>>);

impl LastWords {
    /// Why the guest's kernel panicked, as it says; None if it has not said so.
    pub fn panic(&self) -> Option<String> {
        os::lock(&self.0).clone()
    }

    /// Listens to what goes to `console`.
    pub fn listen(&self, console: Box<dyn Write + Send>) -> Listening {
        Listening { console, line: Vec::with_capacity(LINE_BYTES), words: self.clone() }
    }

    fn hear(&self, line: &[u8]) {
        let line = String::from_utf8_lossy(line);
        let heard = match line.split_once(PANIC).map(|(_, reason)| reason) {
            Some(reason) => Some(reason),
            None => line.strip_prefix(BUILT_IN_PANIC),
        };
        let ends = ORDERLY.iter().any(|said| line.contains(said));
        if heard.is_none() && !ends {
            return;
        }
        // It may hold anything, also what would command the terminal that shows it.
        let printable =
            |reason: &str| reason.chars().filter(|c| !c.is_control()).take(REASON_CHARS).collect();
        *os::lock(&self.0) = heard.map(printable);
    }
}

/// The console's output, on its way.
pub struct Listening {
    console: Box<dyn Write + Send>,
    line: Vec<u8>,
    words: LastWords,
}

impl Write for Listening {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        // What the console does not take was said all the same.
        for byte in bytes {
            match byte {
                b'\n' | b'\r' => {
                    self.words.hear(&self.line);
                    self.line.clear();
                }
                _ if self.line.len() < LINE_BYTES => self.line.push(*byte),
                _ => {}
            }
        }
        self.console.write_all(bytes)?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.console.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn heard(said: &[u8]) -> Option<String> {
        let words = LastWords::default();
        let mut console = words.listen(Box::new(io::sink()));
        // As a serial port has them: one by one.
        said.iter().for_each(|byte| console.write_all(&[*byte]).unwrap());
        words.panic()
    }

    #[test]
    fn a_panic_is_heard_with_its_reason() {
        let linux = b"[    3.9] note: swapper/0[1] exited\r\n[    3.9] Kernel panic - not syncing: Attempted to kill init!\r\n[    4.0] Kernel Offset: disabled\r\n";
        assert_eq!(heard(linux).as_deref(), Some("Attempted to kill init!"));
        assert_eq!(heard(b"\r\npanic page fault vector=14\r\n").as_deref(), Some("page fault vector=14"));
        assert_eq!(heard(b"login: panic\r\nno panic here\r\n"), None);
        assert_eq!(heard(b"Kernel panic - not syncing: cut sho"), None, "not said to the end");
    }

    #[test]
    fn an_orderly_end_is_one_whatever_was_said_before() {
        let log = b"$ cat old.log\r\nKernel panic - not syncing: of yore\r\n$ reboot\r\n[ 9.1] reboot: Restarting system\r\n";
        assert_eq!(heard(log), None);
        let then = [&log[..], b"Kernel panic - not syncing: now\r\n"].concat();
        assert_eq!(heard(&then).as_deref(), Some("now"));
    }

    #[test]
    fn a_hostile_console_costs_no_more_than_a_line() {
        let mut said = vec![b'x'; 1 << 20];
        said.extend(b"\r\nKernel panic - not syncing: \x1b[2J\xff\xfe");
        said.extend([b'y'; 1 << 16]);
        said.push(b'\n');
        let reason = heard(&said).unwrap();
        assert!(reason.chars().count() == REASON_CHARS && !reason.contains('\x1b'), "{reason:?}");
    }
}
