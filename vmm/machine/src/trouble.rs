//! Why output of a VM is lost.

use std::io;
use std::sync::{Arc, Mutex};

use os::{limits, print};

/// Why a console's output was lost the last time, if any was. Clones share it.
#[derive(Clone, Debug, Default)]
pub struct Trouble(Arc<Mutex<Option<String>>>);

impl Trouble {
    /// Some could not be written.
    pub(super) fn note(&self, error: &io::Error) {
        let advice = limits::advice(error).map_or(String::new(), |advice| format!("; {advice}"));
        *os::lock(&self.0) = Some(format!("{error}{advice}"));
    }

    /// Why some is lost, of the console's output or of this process's messages, which in a fleet go
    /// to the same file.
    pub fn why(&self) -> Option<String> {
        let why = os::lock(&self.0).clone();
        why.or_else(|| print::lost().map(|lost| lost.why))
    }
}
