//! Where figures come from, so that a page of them can be cited: when, on which host and kernel, by which command, how KSM was set, and
//! what the processes are that were measured.

use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use lab::experiment::environment::Environment;
use measure::html::{Item, Section, Table};
use os::named_file;

/// Characters of a command line that are kept.
const MAX_COMMAND: usize = 2000;

/// A process that was measured.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Measuree {
    /// Its number.
    pub(super) pid: u32,
    /// Its command line.
    pub(super) command: String,
}

impl Measuree {
    pub(super) fn of(pid: u32) -> Self {
        let line = named_file::read(Path::new(&format!("/proc/{pid}/cmdline"))).unwrap_or_default();
        Self { pid, command: command_line(line.split(|byte| *byte == 0)) }
    }
}

/// When, where and how.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct Provenance {
    /// The date and time, in UTC.
    pub(super) date: String,
    /// The host's name.
    pub(super) host: String,
    /// This command.
    pub(super) command: String,
    /// The machine, its kernel, how that is set.
    pub(super) environment: Environment,
    /// The processes that were measured.
    pub(super) processes: Vec<Measuree>,
}

impl Provenance {
    /// Of this command, now.
    pub(super) fn now(pids: impl IntoIterator<Item = u32>) -> Self {
        let seconds = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        let arguments: Vec<Vec<u8>> =
            std::env::args_os().map(std::ffi::OsString::into_encoded_bytes).collect();
        Self {
            date: utc(seconds),
            host: std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default().trim().to_owned(),
            command: command_line(arguments.iter().map(Vec::as_slice)),
            environment: Environment::now(),
            processes: pids.into_iter().map(Measuree::of).collect(),
        }
    }

    /// The end of a page.
    pub(super) fn section(&self) -> Section {
        let mut rows = vec![
            vec!["date".to_owned(), self.date.clone()],
            vec!["host".to_owned(), self.host.clone()],
            vec!["machine".to_owned(), self.environment.line()],
            vec!["command".to_owned(), self.command.clone()],
        ];
        let knob = |(path, value): (&String, &String)| vec![path.clone(), value.clone()];
        rows.extend(self.environment.knobs.iter().map(knob));
        let process = |process: &Measuree| vec![format!("process {}", process.pid), process.command.clone()];
        rows.extend(self.processes.iter().map(process));
        let header = ["what", "as it was when the command began"].map(String::from).to_vec();
        Section {
            heading: "How it was measured".into(),
            text: String::new(),
            items: vec![Item::Table(Table { header, rows })],
        }
    }
}

/// Arguments as a shell would take them, cut short if there are very many.
fn command_line<'a>(arguments: impl Iterator<Item = &'a [u8]>) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./=:,+@%".contains(c);
    let quoted = |argument: &[u8]| {
        let text = String::from_utf8_lossy(argument);
        match !text.is_empty() && text.chars().all(plain) {
            true => text.into_owned(),
            false => format!("'{}'", text.replace('\'', "'\\''")),
        }
    };
    let mut words: Vec<&[u8]> = arguments.collect();
    // /proc ends every argument with a zero, the last one too.
    if words.last().is_some_and(|last| last.is_empty()) {
        words.pop();
    }
    let line = words.into_iter().map(quoted).collect::<Vec<_>>().join(" ");
    match line.char_indices().nth(MAX_COMMAND) {
        Some((at, _)) => format!("{} ...", &line[..at]),
        None => line,
    }
}

/// Seconds since 1970 as a date and a time. Source: Howard Hinnant, "chrono-compatible low-level date algorithms", civil_from_days.
fn utc(seconds: u64) -> String {
    let (days, rest) = (seconds / 86_400 + 719_468, seconds % 86_400);
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted + 2) / 5 + 1;
    let month = if shifted < 10 { shifted + 3 } else { shifted - 9 };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    let (hour, minute, second) = (rest / 3600, rest / 60 % 60, rest % 60);
    format!("{year:04}-{month:02}-{day:02} {hour:02}:{minute:02}:{second:02} UTC")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_those_of_the_calendar() {
        assert_eq!(utc(0), "1970-01-01 00:00:00 UTC");
        assert_eq!(utc(951_782_399), "2000-02-28 23:59:59 UTC");
        assert_eq!(utc(951_782_400), "2000-02-29 00:00:00 UTC");
        assert_eq!(utc(1_735_689_599), "2024-12-31 23:59:59 UTC");
        assert_eq!(utc(4_107_542_400), "2100-03-01 00:00:00 UTC");
    }

    #[test]
    fn arguments_can_be_pasted() {
        let line = |arguments: &[&str]| command_line(arguments.iter().map(|text| text.as_bytes()));
        assert_eq!(line(&["qemu", "-m", "1G", "a b", "it's", ""]), r"qemu -m 1G 'a b' 'it'\''s'");
        assert!(line(&["x".repeat(5000).as_str()]).ends_with(" ..."));
        assert!(Measuree::of(std::process::id()).command.contains("vmm"));
    }

    #[test]
    fn a_page_says_where_its_figures_are_from() {
        let provenance = Provenance::now([std::process::id()]);
        let section = provenance.section().to_string();
        for words in ["UTC", "Linux ", "command", "process "] {
            assert!(section.contains(words), "{section}");
        }
    }
}
