//! Where figures come from, so that a page of them can be cited: time, host, kernel, command, KSM's
//! settings, and the processes that were measured.

use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use super::environment::Environment;
use measure::html::{Item, Section, Table};
use os::{Moment, named_file};

/// Characters of a command line that are kept.
const MAX_COMMAND: usize = 2000;

/// A process that was measured.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Measuree {
    pub pid: u32,
    pub command: String,
}

impl Measuree {
    pub fn of(pid: u32) -> Self {
        let line = named_file::read(Path::new(&format!("/proc/{pid}/cmdline"))).unwrap_or_default();
        Self { pid, command: command_line(line.split(|byte| *byte == 0)) }
    }
}

/// When, where and how.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Provenance {
    /// The date and time, in UTC.
    pub date: String,
    pub host: String,
    pub command: String,
    /// The machine, its kernel, their settings.
    pub environment: Environment,
    /// The processes that were measured.
    pub processes: Vec<Measuree>,
}

impl Provenance {
    /// Of this command, now.
    pub fn now(pids: impl IntoIterator<Item = u32>) -> Self {
        let seconds = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        let moment = Moment::of(seconds);
        let arguments: Vec<Vec<u8>> =
            std::env::args_os().map(std::ffi::OsString::into_encoded_bytes).collect();
        Self {
            date: format!("{} {} UTC", moment.date(), moment.time()),
            host: std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default().trim().to_owned(),
            command: command_line(arguments.iter().map(Vec::as_slice)),
            environment: Environment::now(),
            processes: pids.into_iter().map(Measuree::of).collect(),
        }
    }

    /// The end of a page.
    pub fn section(&self) -> Section {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_can_be_pasted() {
        let line = |arguments: &[&str]| command_line(arguments.iter().map(|text| text.as_bytes()));
        assert_eq!(line(&["qemu", "-m", "1G", "a b", "it's", ""]), r"qemu -m 1G 'a b' 'it'\''s'");
        assert!(line(&["x".repeat(5000).as_str()]).ends_with(" ..."));
        assert!(Measuree::of(std::process::id()).command.contains("lab"));
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
