//! Whether this guest is a copy of another one, and has to begin anew with what is random: the 128
//! bits of VMGenID, which the VMM changes in each copy before its first instruction. The kernel
//! does that too, by an interrupt, a moment later.

use crate::init::log;
use crate::sys::{self, Access, Errno, Fd};

/// The device by its name in /proc/iomem.
const DEVICE: &str = " : VMGENCTR:00";
/// Reseeds the kernel's generator at once.
const RNDRESEEDCRNG: usize = 0x5207;

/// The number of this copy.
pub(crate) struct Generation {
    at: Option<&'static [sys::Word; 2]>,
    known: [u64; 2],
}

impl Generation {
    /// Where the kernel found it. If there is none, or it may not be read, it never changes.
    pub(crate) fn find() -> Self {
        let at = address().and_then(|address| match address.map(sys::map_physical) {
            None => Ok(None),
            Some(mapped) => mapped.map(Some),
        });
        let at = at.unwrap_or_else(|error| {
            log(format_args!(
                "the generation cannot be read: {error}; a copy of this guest will not say that it is one"
            ));
            None
        });
        let mut generation = Self { at, known: [0; 2] };
        generation.known = generation.now();
        generation
    }

    fn now(&self) -> [u64; 2] {
        self.at.map_or([0; 2], |words| words.each_ref().map(sys::Word::get))
    }

    /// The number, if it has changed since the last time: then what the kernel draws from now on no
    /// other copy draws.
    pub(crate) fn change(&mut self) -> Option<u64> {
        let now = self.now();
        if now == core::mem::replace(&mut self.known, now) {
            return None;
        }
        if let Err(error) = reseed(now) {
            log(format_args!(
                "/dev/urandom: {error}; the kernel's generator is reseeded by the kernel alone"
            ));
        }
        Some(now[0])
    }
}

/// The physical address of the number.
fn address() -> Result<Option<usize>, Errno> {
    let mut buffer = [0; 16384];
    let file = Fd::open(c"/proc/iomem", Access::Read)?;
    let len = file.read_all(&mut buffer);
    file.close();
    let text = str::from_utf8(&buffer[..len?]).unwrap_or_default();
    let found = text.lines().find_map(|line| line.strip_suffix(DEVICE)?.trim_ascii().split('-').next());
    // The kernel shows zeros to a process that may not know.
    Ok(found.and_then(|at| usize::from_str_radix(at, 16).ok()).filter(|at| *at != 0))
}

fn reseed(number: [u64; 2]) -> Result<(), Errno> {
    let file = Fd::open(c"/dev/urandom", Access::ReadWrite)?;
    let written =
        file.write(number.map(u64::to_ne_bytes).as_flattened()).and_then(|()| file.command(RNDRESEEDCRNG));
    file.close();
    written
}
