//! The end of what a guest and its VM wrote.

use std::fs;
use std::io::{self, Read, Seek, SeekFrom};

use super::Guest;

/// How much of a log an error message shows.
const LOG_TAIL_BYTES: u64 = 600;

impl Guest {
    /// Why its VM failed, as it says itself at the end of the log.
    pub(super) fn last_error(&self) -> Option<String> {
        let mark = format!("error: {}: ", self.spec.name);
        let tail = self.log_end();
        let why = tail.lines().rev().find_map(|line| line.strip_prefix(&mark))?;
        Some(why.into())
    }

    /// The end of what it and its VM wrote, as a clause for an error message.
    pub(super) fn log_tail(&self) -> String {
        match self.log_end().trim() {
            "" => String::new(),
            text => format!(":\n    {}", text.replace('\n', "\n    ")),
        }
    }

    fn log_end(&self) -> String {
        // No more than the end is read: a guest may have written any amount.
        let read = || {
            let mut file = fs::File::open(self.dir.log(&self.spec.name))?;
            let bytes = file.metadata()?.len();
            file.seek(SeekFrom::Start(bytes.saturating_sub(LOG_TAIL_BYTES)))?;
            let mut tail = Vec::new();
            file.take(LOG_TAIL_BYTES).read_to_end(&mut tail)?;
            io::Result::Ok(tail)
        };
        let tail = read().unwrap_or_default();
        let text = String::from_utf8_lossy(&tail);
        // A guest's console may hold anything, also what would command the terminal that shows
        // this.
        text.replace(|c: char| c.is_control() && c != '\n', " ")
    }
}
