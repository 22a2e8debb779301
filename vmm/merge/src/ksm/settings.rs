//! The knobs under `/sys/kernel/mm/ksm`: read, set, put back.
//!
//! Source: the kernel's Documentation/admin-guide/mm/ksm.rst and mm/ksm.c. Knobs that a kernel does
//! not have are left out. `max_page_sharing` and `merge_across_nodes` are never touched: the kernel
//! only lets them change while nothing is merged.

use std::fmt;
use std::fs;
use std::io;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::EngineError;

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

/// The values of knobs at one time.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Saved {
    /// Name and text of each knob.
    pub knobs: Vec<(String, String)>,
}

impl Saved {
    fn get(&self, name: &str) -> Option<&str> {
        self.knobs.iter().find(|(knob, _)| knob == name).map(|(_, value)| value.as_str())
    }
}

/// A knob that was not put back, because it holds what an operator wrote meanwhile.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Kept {
    /// Its name.
    pub knob: String,
    /// What it was before merging began.
    pub before: String,
    /// What was written for merging.
    pub written: String,
    /// What it is now.
    pub now: String,
}

impl fmt::Display for Kept {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { knob, before, written, now } = self;
        write!(
            f,
            "KSM's {knob} was changed to {now} while the fleet merged (with {written}), and is left so; it was {before} before"
        )
    }
}

const ADVISOR: &str = "advisor_mode";
const SCAN_TIME: &str = "scan-time";
const PAGES: &str = "pages_to_scan";
const RUN: &str = "run";
/// Every knob this module may change, and so saves, in the order in which they are written: the
/// advisor refuses changes of `pages_to_scan`, so it is off while they are made, and `run` comes
/// last.
const KNOBS: [&str; 6] = ["sleep_millisecs", "use_zero_pages", "smart_scan", PAGES, ADVISOR, RUN];

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

    /// Why nothing is scanned, if nothing is.
    pub fn stalled(&self) -> Option<String> {
        let value = |name| self.get(name).ok().flatten();
        let run = value(RUN)?;
        if run != "1" {
            let path = self.path(RUN);
            return Some(format!("KSM is stopped ({} is {run}): nothing merges any more", path.display()));
        }
        // Zero may be the advisor's own, which changes it again.
        let pages =
            value(PAGES).filter(|pages| pages == "0" && value(ADVISOR).as_deref() != Some(SCAN_TIME))?;
        Some(format!(
            "KSM scans no page ({} is {pages}): nothing merges any more",
            self.path(PAGES).display()
        ))
    }

    /// What `settings` make of the knobs that are in `saved`, in the order in which they are
    /// written. What the advisor is to choose is not among them.
    pub fn wanted(&self, settings: &KsmSettings, saved: &Saved) -> Saved {
        let flag = |on: bool| u64::from(on).to_string();
        let value = |name: &str| match name {
            "sleep_millisecs" => Some(settings.sleep_ms.to_string()),
            "use_zero_pages" => Some(flag(settings.use_zero_pages)),
            "smart_scan" => Some(flag(settings.smart_scan)),
            PAGES => settings.pages_to_scan.map(|pages| pages.to_string()),
            ADVISOR => Some(if settings.pages_to_scan.is_some() { "none" } else { SCAN_TIME }.to_owned()),
            RUN => Some("1".to_owned()),
            _ => None,
        };
        let known = KNOBS.into_iter().filter(|name| saved.get(name).is_some());
        Saved { knobs: known.filter_map(|name| Some((name.to_owned(), value(name)?))).collect() }
    }

    /// Writes what [`Self::wanted`] says, and so starts scanning.
    pub fn apply(&self, wanted: &Saved) -> Result<(), EngineError> {
        if wanted.get(ADVISOR).is_some() {
            self.put(ADVISOR, "none")?;
        }
        wanted.knobs.iter().try_for_each(|(name, value)| self.put(name, value))
    }

    /// Puts back what still holds what was `written`, and says what does not: an operator has
    /// changed that meanwhile; one that has stopped KSM wants it stopped. Goes on after an error,
    /// so that one knob does not cost the others; returns the first. A `run` of 0 stops scanning
    /// and keeps what is merged (2 would unmerge it).
    pub fn restore(&self, saved: &Saved, written: &Saved) -> Result<Vec<Kept>, EngineError> {
        let now = self.save()?;
        let mut first = None;
        let mut put = |name: &str, value: &str| {
            if let Err(error) = self.put(name, value) {
                first.get_or_insert(error);
            }
        };
        if self.is_ours(&now, written, ADVISOR) && now.get(ADVISOR) == Some(SCAN_TIME) {
            put(ADVISOR, "none");
        }
        let mut kept = Vec::new();
        for name in KNOBS {
            let (Some(before), Some(value)) = (saved.get(name), now.get(name)) else { continue };
            if self.is_ours(&now, written, name) {
                if before != value || name == ADVISOR {
                    put(name, before);
                }
            } else if let Some(written) = written.get(name)
                && before != value
                && !(name == PAGES && now.get(ADVISOR) == Some(SCAN_TIME))
            {
                let [knob, before, written, now] = [name, before, written, value].map(str::to_owned);
                kept.push(Kept { knob, before, written, now });
            }
        }
        first.map_or(Ok(kept), Err)
    }

    /// What would have to be written to put back `saved`, by name, in order: of what still holds
    /// what was `written`.
    pub fn left(&self, saved: &Saved, written: &Saved) -> Result<Vec<(&'static str, String)>, EngineError> {
        let now = self.save()?;
        let left = KNOBS.into_iter().filter_map(|name| {
            let before = saved.get(name)?;
            let is_left = self.is_ours(&now, written, name) && now.get(name) != Some(before);
            is_left.then(|| (name, before.to_owned()))
        });
        Ok(left.collect())
    }

    /// Whether a knob holds what was written. What the advisor chooses is ours if the advisor is.
    fn is_ours(&self, now: &Saved, written: &Saved, name: &str) -> bool {
        match (now.get(name), written.get(name)) {
            (Some(now), Some(written)) => now == written,
            (Some(_), None) if name == PAGES => {
                written.get(ADVISOR) == Some(SCAN_TIME) && now.get(ADVISOR) == Some(SCAN_TIME)
            }
            _ => false,
        }
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

    fn put(&self, name: &str, value: &str) -> Result<(), EngineError> {
        let path = self.path(name);
        fs::write(&path, value).map_err(|source| EngineError::Write { path, value: value.to_owned(), source })
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

    const KERNEL: [(&str, &str); 6] = [
        ("run", "0\n"),
        ("pages_to_scan", "100\n"),
        ("sleep_millisecs", "20\n"),
        ("use_zero_pages", "0\n"),
        ("smart_scan", "1\n"),
        ("advisor_mode", "none [scan-time]\n"),
    ];

    /// Knobs that `settings` were applied to; what they were, and what was written.
    fn applied(settings: &KsmSettings, knobs: &[(&str, &str)]) -> (tempfile::TempDir, Knobs, Saved, Saved) {
        let (directory, knobs) = fake(knobs);
        let saved = knobs.save().unwrap();
        let wanted = knobs.wanted(settings, &saved);
        knobs.apply(&wanted).unwrap();
        (directory, knobs, saved, wanted)
    }

    #[test]
    fn what_was_changed_is_put_back() {
        let (_directory, knobs, saved, written) = applied(&KsmSettings::fast(), &KERNEL);
        assert_eq!(text(&knobs, "pages_to_scan"), "20000");
        assert_eq!(text(&knobs, "advisor_mode"), "none");
        assert!(knobs.running().unwrap());
        assert_eq!(knobs.left(&saved, &written).unwrap().len(), 6);
        assert_eq!(knobs.restore(&saved, &written).unwrap(), []);
        assert_eq!(knobs.save().unwrap(), saved);
        assert_eq!(text(&knobs, "advisor_mode"), "scan-time");
        assert_eq!(text(&knobs, "run"), "0");
        assert_eq!(knobs.left(&saved, &written).unwrap(), []);
    }

    #[test]
    fn what_an_operator_has_set_meanwhile_stays() {
        let running = KERNEL.map(|(name, value)| (name, if name == "run" { "1" } else { value }));
        let (_directory, knobs, saved, written) = applied(&KsmSettings::fast(), &running);
        // Stopped in an emergency, and slower if it is started again.
        knobs.put("run", "0").unwrap();
        knobs.put("sleep_millisecs", "500").unwrap();
        let kept = knobs.restore(&saved, &written).unwrap();
        let kept: Vec<_> = kept.iter().map(|kept| (kept.knob.as_str(), kept.now.as_str())).collect();
        assert_eq!(kept, [("sleep_millisecs", "500"), ("run", "0")]);
        assert_eq!(["run", "sleep_millisecs"].map(|name| text(&knobs, name)), ["0", "500"]);
        assert_eq!(["pages_to_scan", "advisor_mode"].map(|name| text(&knobs, name)), ["100", "scan-time"]);
        // Unmerged is stopped, too; and what is as it was before needs no restoring.
        let (_directory, knobs, saved, written) = applied(&KsmSettings::fast(), &running);
        knobs.put("run", "2").unwrap();
        knobs.put("smart_scan", "1").unwrap();
        let kept = knobs.restore(&saved, &written).unwrap();
        assert!(kept.len() == 1 && kept[0].to_string().contains("run was changed to 2"), "{kept:?}");
        assert_eq!(text(&knobs, "run"), "2");
    }

    #[test]
    fn what_the_advisor_chose_is_not_an_operators_doing() {
        let off = KERNEL
            .map(|(name, value)| (name, if name == "advisor_mode" { "[none] scan-time" } else { value }));
        let (_directory, knobs, saved, written) = applied(&KsmSettings::advisor(), &off);
        assert_eq!(text(&knobs, "advisor_mode"), "scan-time");
        knobs.put("pages_to_scan", "4711").unwrap();
        assert_eq!(knobs.restore(&saved, &written).unwrap(), []);
        assert_eq!(knobs.save().unwrap(), saved);
        // An operator has turned it on meanwhile: then the pages are its own.
        let (_directory, knobs, saved, written) = applied(&KsmSettings::fast(), &off);
        knobs.put("advisor_mode", "scan-time").unwrap();
        knobs.put("pages_to_scan", "4711").unwrap();
        let kept = knobs.restore(&saved, &written).unwrap();
        assert_eq!(kept.iter().map(|kept| kept.knob.as_str()).collect::<Vec<_>>(), ["advisor_mode"]);
        assert_eq!(text(&knobs, "pages_to_scan"), "4711");
    }

    #[test]
    fn what_scans_nothing_is_stalled() {
        let (_directory, knobs, ..) = applied(&KsmSettings::fast(), &KERNEL);
        assert_eq!(knobs.stalled(), None);
        for (name, value) in [("pages_to_scan", "0"), ("run", "0"), ("run", "2")] {
            knobs.put(name, value).unwrap();
            let why = knobs.stalled().unwrap();
            assert!(why.contains(name) && why.contains("nothing merges"), "{why}");
        }
    }

    #[test]
    fn an_old_kernel_has_fewer_knobs() {
        let few = [("run", "0"), ("pages_to_scan", "100"), ("sleep_millisecs", "20")];
        let (directory, knobs, saved, written) = applied(&KsmSettings::fast(), &few);
        assert_eq!(knobs.restore(&saved, &written).unwrap(), []);
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 3);
    }
}
