//! The flag that Control-C sets, so that long work can stop cleanly.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread;

use signal_hook::consts::SIGHUP;
use signal_hook::iterator::Signals;

use super::print::errln;
use super::signals;

/// The exit status when a second signal does not wait for the work that the first one asked to
/// stop.
const AT_ONCE: i32 = 130;

static FLAG: OnceLock<Arc<AtomicBool>> = OnceLock::new();

/// A flag that SIGINT, SIGTERM and SIGHUP set, those of them that were not ignored when this
/// process was started. Each is reported on standard error. A second SIGINT or SIGTERM ends the
/// process at once; a second SIGHUP does not, as a shell passes it on to a program that already has
/// it from the kernel.
///
/// # Errors
/// The handlers or their thread cannot be set up.
pub fn flag() -> io::Result<Arc<AtomicBool>> {
    if let Some(flag) = FLAG.get() {
        return Ok(flag.clone());
    }
    let flag = Arc::new(AtomicBool::new(false));
    let mut arriving = Signals::new(signals::ending())?;
    let set = flag.clone();
    thread::Builder::new().name("signals".into()).stack_size(64 << 10).spawn(move || {
        for signal in arriving.forever() {
            let name = signals::name(signal);
            if !set.swap(true, Ordering::SeqCst) {
                errln!("note: {name}: stopping cleanly; a second one stops at once");
            } else if signal != SIGHUP {
                errln!("error: {name} again: stopped before the work was done");
                signal_hook::low_level::exit(AT_ONCE);
            }
        }
    })?;
    Ok(FLAG.get_or_init(|| flag).clone())
}

/// True once the flag of [`flag`] is set.
pub fn is_set(flag: &AtomicBool) -> bool {
    flag.load(Ordering::Relaxed)
}
