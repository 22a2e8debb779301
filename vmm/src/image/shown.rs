//! What making an image shows: how far it is, and where it put things.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use image::progress::Progress;
use indicatif::{ProgressBar, ProgressStyle};

use crate::progress::{draw_target, is_set};

/// A progress bar where stderr is a terminal, and nothing elsewhere.
pub(super) struct Bar(pub(super) ProgressBar, Arc<AtomicBool>);

impl Bar {
    pub(super) fn new(interrupted: Arc<AtomicBool>) -> Self {
        Self(ProgressBar::with_draw_target(None, draw_target()), interrupted)
    }
}

impl Progress for Bar {
    fn stage(&mut self, what: &str, total_bytes: Option<u64>) {
        let template = match total_bytes {
            Some(_) => "{msg} {bar:30} {bytes}/{total_bytes}",
            None => "{spinner} {msg}",
        };
        if let Ok(style) = ProgressStyle::with_template(template) {
            self.0.set_style(style);
        }
        self.0.reset();
        match total_bytes {
            Some(total) => self.0.set_length(total),
            None => self.0.unset_length(),
        }
        self.0.set_message(what.to_string());
        self.0.tick();
    }

    fn at(&mut self, bytes: u64) {
        self.0.set_position(bytes);
    }

    fn stopped(&self) -> bool {
        is_set(&self.1)
    }
}

/// A path as a shell takes it.
pub(super) fn quoted(path: &Path) -> String {
    let text = path.display().to_string();
    let plain = |c: char| c.is_ascii_alphanumeric() || "/._+-~=:@%,".contains(c);
    if text.chars().all(plain) { text } else { format!("'{}'", text.replace('\'', r"'\''")) }
}
