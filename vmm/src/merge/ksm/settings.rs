//! The knobs under `/sys/kernel/mm/ksm`: read, set, put back.
//!
//! Source: the kernel's Documentation/admin-guide/mm/ksm.rst and mm/ksm.c. Knobs that a kernel does not
//! have are left out. `max_page_sharing` and `merge_across_nodes` are never touched: the kernel only lets
//! them change while nothing is merged.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::merge::EngineError;

/// How KSM is to run while a fleet is merged.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KsmSettings {
    /// Pages scanned before each sleep. `None`: the kernel's advisor chooses.
    pub pages_to_scan: Option<u64>,
    /// Length of the sleep.
    pub sleep_ms: u64,
    /// Merge empty pages with the kernel's zero frame. Kernel 4.12.
    pub use_zero_pages: bool,
    /// Skip pages that did not merge in past passes. Kernel 6.7.
    pub smart_scan: bool,
}

impl KsmSettings {
    /// One to two GiB a second, for measurements that should end soon.
    pub fn fast() -> Self {
        Self { pages_to_scan: Some(20_000), sleep_ms: 10, use_zero_pages: true, smart_scan: false }
    }

    /// What the kernel starts with: 100 pages every 20 ms.
    pub fn kernel_default() -> Self {
        Self { pages_to_scan: Some(100), sleep_ms: 20, use_zero_pages: false, smart_scan: true }
    }

    /// The kernel's scan-time advisor, with its own limits. Kernel 6.8.
    pub fn advisor() -> Self {
        Self { pages_to_scan: None, sleep_ms: 20, use_zero_pages: true, smart_scan: true }
    }
}

impl Default for KsmSettings {
    fn default() -> Self {
        Self::fast()
    }
}

/// The values of all knobs at one time, in the order in which they can be written back: the advisor refuses
/// changes of `pages_to_scan`, so it is off while they are made, and `run` comes last.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Saved {
    /// Name and text of each knob.
    pub knobs: Vec<(String, String)>,
}

const ADVISOR: &str = "advisor_mode";
const RUN: &str = "run";
/// Every knob this module may change, and so saves.
const KNOBS: [&str; 6] = ["sleep_millisecs", "use_zero_pages", "smart_scan", "pages_to_scan", ADVISOR, RUN];

/// The directory of KSM's knobs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Knobs(pub PathBuf);

impl Default for Knobs {
    fn default() -> Self {
        Self(PathBuf::from("/sys/kernel/mm/ksm"))
    }
}

impl Knobs {
    /// The path of one knob.
    pub fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    /// Whether the kernel has KSM.
    pub fn exist(&self) -> bool {
        self.path(RUN).exists()
    }

    /// Whether we may change them.
    pub fn writable(&self) -> bool {
        fs::OpenOptions::new().write(true).open(self.path(RUN)).is_ok()
    }

    /// Whether KSM scans now.
    pub fn running(&self) -> Result<bool, EngineError> {
        self.get(RUN).map(|value| value.as_deref() == Some("1"))
    }

    /// Reads every knob.
    pub fn save(&self) -> Result<Saved, EngineError> {
        let mut saved = Saved::default();
        for name in KNOBS {
            if let Some(value) = self.get(name)? {
                saved.knobs.push((name.to_owned(), value));
            }
        }
        Ok(saved)
    }

    /// Applies `settings` and starts scanning.
    pub fn apply(&self, settings: &KsmSettings) -> Result<(), EngineError> {
        let flag = |on: bool| u64::from(on).to_string();
        self.put_if_there(ADVISOR, "none")?;
        self.put(&self.path("sleep_millisecs"), &settings.sleep_ms.to_string())?;
        self.put_if_there("use_zero_pages", &flag(settings.use_zero_pages))?;
        self.put_if_there("smart_scan", &flag(settings.smart_scan))?;
        match settings.pages_to_scan {
            Some(pages) => self.put(&self.path("pages_to_scan"), &pages.to_string())?,
            None => self.put_if_there(ADVISOR, "scan-time")?,
        }
        self.put(&self.path(RUN), "1")
    }

    /// Puts `saved` back. Goes on after an error, so that one knob does not cost the others; returns the
    /// first. A saved `run` of 0 stops scanning and keeps what is merged (2 would unmerge it).
    pub fn restore(&self, saved: &Saved) -> Result<(), EngineError> {
        let mut first = self.put_if_there(ADVISOR, "none").err();
        for (name, value) in &saved.knobs {
            if let Err(error) = self.put(&self.path(name), value) {
                first.get_or_insert(error);
            }
        }
        first.map_or(Ok(()), Err)
    }

    /// A knob's value; of a choice such as `[none] scan-time`, the one chosen.
    fn get(&self, name: &str) -> Result<Option<String>, EngineError> {
        let path = self.path(name);
        match fs::read_to_string(&path) {
            Ok(text) => Ok(Some(chosen(&text).to_owned())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(EngineError::Read { path, source }),
        }
    }

    fn put_if_there(&self, name: &str, value: &str) -> Result<(), EngineError> {
        let path = self.path(name);
        if path.exists() { self.put(&path, value) } else { Ok(()) }
    }

    fn put(&self, path: &Path, value: &str) -> Result<(), EngineError> {
        fs::write(path, value).map_err(|source| EngineError::Write {
            path: path.to_owned(),
            value: value.to_owned(),
            source,
        })
    }
}

fn chosen(text: &str) -> &str {
    let bracketed = text.split_once('[').and_then(|(_, rest)| rest.split_once(']'));
    bracketed.map_or(text.trim(), |(choice, _)| choice)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A directory that looks like the kernel's.
    fn fake(knobs: &[(&str, &str)]) -> (tempfile::TempDir, Knobs) {
        let directory = tempfile::tempdir().unwrap();
        for (name, value) in knobs {
            fs::write(directory.path().join(name), value).unwrap();
        }
        let knobs = Knobs(directory.path().to_owned());
        (directory, knobs)
    }

    fn text(knobs: &Knobs, name: &str) -> String {
        fs::read_to_string(knobs.path(name)).unwrap()
    }

    #[test]
    fn a_choice_is_the_bracketed_word() {
        assert_eq!(chosen("none [scan-time]\n"), "scan-time");
        assert_eq!(chosen("100\n"), "100");
    }

    #[test]
    fn what_was_changed_is_put_back() {
        let (_directory, knobs) = fake(&[
            ("run", "0\n"),
            ("pages_to_scan", "100\n"),
            ("sleep_millisecs", "20\n"),
            ("use_zero_pages", "0\n"),
            ("smart_scan", "1\n"),
            ("advisor_mode", "none [scan-time]\n"),
        ]);
        let saved = knobs.save().unwrap();
        knobs.apply(&KsmSettings::fast()).unwrap();
        assert_eq!(text(&knobs, "pages_to_scan"), "20000");
        assert_eq!(text(&knobs, "advisor_mode"), "none");
        assert!(knobs.running().unwrap());
        knobs.restore(&saved).unwrap();
        assert_eq!(knobs.save().unwrap(), saved);
        assert_eq!(text(&knobs, "advisor_mode"), "scan-time");
        assert_eq!(text(&knobs, "run"), "0");
    }

    #[test]
    fn an_old_kernel_has_fewer_knobs() {
        let (directory, knobs) = fake(&[("run", "0"), ("pages_to_scan", "100"), ("sleep_millisecs", "20")]);
        let saved = knobs.save().unwrap();
        knobs.apply(&KsmSettings::fast()).unwrap();
        knobs.restore(&saved).unwrap();
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 3);
    }
}
