//! A plan: what is measured, in which dimensions. `resources/docs/reference/experiments.md` has the
//! keys.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::ExperimentError;
use super::trial::Point;
use crate::contender::Contender;
use fleet::spec::{FillSpec, resolve};
use machine::MAX_VCPUS;
use memory::layout::{MAX_RAM_BYTES, MIN_RAM_BYTES};
use memory::size::parse_size;
use os::named_file;

/// Most guests of one trial, and values of one dimension.
const MAX_GUESTS: u32 = 512;
pub const MAX_REPEAT: u32 = 1000;
/// Longest that any part of a trial may take: an hour.
const MAX_SECONDS: f64 = 3600.0;
/// Most pages a second that a guest may write.
const MAX_RATE: u64 = 1_000_000;
/// The smallest file.
const MIN_FILE_BYTES: u64 = 1 << 20;
/// Most windows in which writes are timed.
const MAX_WINDOWS: u32 = 10_000;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// What is shared and saved once merging has settled, against the number of guests.
    IdenticalVms,
    /// How much of the ideal is reached over time, and how long sharing lasts while pages change.
    Ideal,
    /// Whether a guest can tell by its own write times which of its pages are merged.
    SideChannel,
    /// How soon the pages of a file that two Linux guests have read are shared.
    PageCache,
    /// What an engine saves in a fixed time, its processor time for that, and how long guests wait.
    ScannerPareto,
    /// How fast memory is reclaimed by a balloon, and how fast the guest has it again.
    InflateDeflate,
    /// What clones of one guest cost, against their number.
    CloneFanout,
    /// What discards, merges and broken shares cost in TLB flushes and interrupts, against the
    /// vCPUs that run.
    Shootdown,
    /// How far the TLB reaches in small and in huge pages, against what merging saves.
    HugePages,
    /// What guests of several workloads and kernels have in common.
    Mixed,
    /// How much work guests get done under growing overcommit.
    Thrashing,
}

/// A guest; all guests of a plan are alike.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, expecting = "a table [guest]")]
pub struct GuestPlan {
    /// Its RAM with its unit.
    pub memory: String,
    #[serde(default = "one")]
    pub cpus: u8,
    /// The contents of its memory.
    pub fill: FillSpec,
    /// A Linux kernel; None is the built-in guest.
    #[serde(default)]
    pub kernel: Option<PathBuf>,
    #[serde(default)]
    pub initrd: Option<PathBuf>,
    /// Its command line; None is the usual one.
    #[serde(default)]
    pub cmdline: Option<String>,
    /// How long it may take until it is ready.
    #[serde(default)]
    pub ready_seconds: Option<u32>,
    /// What is different if it is Linux.
    #[serde(default)]
    pub linux: Option<LinuxPlan>,
}

/// What Linux guests need that built-in ones do not.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, expecting = "a table [linux]")]
pub struct LinuxPlan {
    /// RAM with its unit: the kernel alone has some 60 MiB.
    pub memory: String,
    /// How many pages are filled: few, where the kernel's own pages are measured.
    #[serde(default)]
    pub fill_pages: Option<u64>,
    /// How long it may take until it is ready.
    #[serde(default)]
    pub ready_seconds: Option<u32>,
}

fn one() -> u8 {
    1
}

/// A difference between the guests of a point and those of others.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, expecting = "a table [[variant]]")]
pub struct Variant {
    pub name: String,
    /// Huge pages of the host are requested, or forbidden; None: the host's own setting.
    pub huge_pages: Option<bool>,
    /// More words for the kernel's command line. Only Linux guests have one: without a kernel the
    /// variant is left out.
    pub cmdline: Option<String>,
    /// Delay of the second guest's read; for [`Kind::PageCache`].
    pub offset_seconds: Option<f64>,
    /// How many vCPUs run besides the one that does a guest's work; for [`Kind::Shootdown`].
    pub running: Option<u8>,
    /// How many frames a guest may take in a second; for [`Kind::Thrashing`].
    pub throttle: Option<u64>,
    /// Whether the kernel's own decompressor runs in the guest, and with it address randomization.
    /// Only Linux guests have that: without a kernel the variant is left out, and a plan that has
    /// no other one has none.
    pub kaslr: Option<bool>,
}

/// Pages that guests go on writing.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, expecting = "a table [churn]")]
pub struct ChurnPlan {
    /// In each guest.
    pub pages_per_second: u64,
    pub seconds: f64,
}

/// Writes that a guest times.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, expecting = "a table [timing]")]
pub struct TimingPlan {
    /// How often each kind of page is timed.
    pub windows: u32,
    /// Writes in each window.
    pub writes: u32,
    pub pages_per_second: u64,
}

/// A file that guests read.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, expecting = "a table [file]")]
pub struct FilePlan {
    /// Its size with its unit; at most half of a guest's memory.
    pub size: String,
    /// How often it is read and forgotten again, each time with other contents.
    pub rounds: u32,
    /// How long it is watched after it was dropped.
    pub evict_seconds: f64,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, expecting = "the keys of a plan")]
pub struct Plan {
    pub name: String,
    #[serde(default)]
    pub about: String,
    /// The publication that has it first.
    #[serde(default)]
    pub source: String,
    /// What was published, for comparison.
    #[serde(default)]
    pub published: String,
    pub kind: Kind,
    /// The seed of the contents of pages.
    pub seed: u64,
    /// How often each point is measured.
    pub repeat: u32,
    /// Dimension: how many guests.
    pub guests: Vec<u32>,
    /// Dimension: what merges.
    pub engines: Vec<Contender>,
    /// Dimension: other differences. Empty unless set.
    #[serde(default)]
    pub variant: Vec<Variant>,
    pub guest: GuestPlan,
    /// The longest time for merging to settle; for [`Kind::ScannerPareto`] the time it is given.
    pub merge_seconds: f64,
    /// Interval between looks, where something is followed over time.
    #[serde(default = "look_seconds")]
    pub look_seconds: f64,
    /// Writes while sharing is watched; for [`Kind::Ideal`].
    #[serde(default = "churn")]
    pub churn: ChurnPlan,
    /// Timed writes; for [`Kind::SideChannel`] and [`Kind::ScannerPareto`].
    #[serde(default = "timing")]
    pub timing: TimingPlan,
    /// The file that is read; for [`Kind::PageCache`].
    #[serde(default = "file")]
    pub file: FilePlan,
}

fn look_seconds() -> f64 {
    0.25
}

fn churn() -> ChurnPlan {
    ChurnPlan { pages_per_second: 200, seconds: 10.0 }
}

fn timing() -> TimingPlan {
    TimingPlan { windows: 40, writes: 50, pages_per_second: 1000 }
}

fn file() -> FilePlan {
    FilePlan { size: "64M".into(), rounds: 3, evict_seconds: 5.0 }
}

impl Plan {
    /// Reads and checks a plan. Relative paths in it are relative to it.
    ///
    /// # Errors
    /// It cannot be read, or a value is not possible.
    pub fn read(path: &Path) -> Result<Self, ExperimentError> {
        let text = named_file::read_text(path)
            .map_err(|source| ExperimentError::Read { path: path.into(), source })?;
        Self::parse(&text, path.parent().unwrap_or(Path::new(".")))
            .map_err(|source| ExperimentError::File { path: path.into(), source: Box::new(source) })
    }

    /// As [`Self::read`], for text whose relative paths begin at `dir`.
    ///
    /// # Errors
    /// A value is not possible.
    pub fn parse(text: &str, dir: &Path) -> Result<Self, ExperimentError> {
        let mut plan: Self = toml::from_str(text)?;
        for path in [&mut plan.guest.kernel, &mut plan.guest.initrd].into_iter().flatten() {
            *path = resolve(path, dir);
        }
        plan.settle_guest();
        plan.check()?;
        Ok(plan)
    }

    /// The same with Linux guests, as far as the plan gives what they need.
    pub fn set_linux(&mut self, kernel: &Path, initrd: Option<&Path>) {
        self.guest.kernel = Some(kernel.into());
        self.guest.initrd = initrd.map(Into::into);
        self.settle_guest();
    }

    /// A guest that is Linux has what only such a guest has.
    fn settle_guest(&mut self) {
        if self.guest.kernel.is_some()
            && let Some(linux) = self.guest.linux.take()
        {
            self.guest.memory = linux.memory;
            self.guest.fill.pages = linux.fill_pages.or(self.guest.fill.pages);
            self.guest.ready_seconds = linux.ready_seconds.or(self.guest.ready_seconds);
        }
    }

    /// Checks that it can be run.
    ///
    /// # Errors
    ///
    /// The first value that is not possible.
    pub fn check(&self) -> Result<(), ExperimentError> {
        if self.guests.is_empty() {
            return Err(ExperimentError::Empty("guests"));
        }
        if self.engines.is_empty() {
            return Err(ExperimentError::Empty("engines"));
        }
        if self.kind == Kind::SideChannel && self.guests != [3] {
            return Err(ExperimentError::ThreeGuests(self.name.clone()));
        }
        if self.kind == Kind::PageCache {
            if self.guests != [2] {
                return Err(ExperimentError::TwoGuests(self.name.clone()));
            }
            self.file_bytes()?;
        }
        if matches!(self.kind, Kind::InflateDeflate | Kind::Shootdown) && self.guest.fill.pages.is_none() {
            return Err(ExperimentError::Kept(self.name.clone()));
        }
        let ranges = [
            ("repeat", f64::from(self.repeat), 1.0, f64::from(MAX_REPEAT)),
            ("guest: cpus", self.guest.cpus.into(), 1.0, MAX_VCPUS.into()),
            ("merge_seconds", self.merge_seconds, 0.1, MAX_SECONDS),
            ("look_seconds", self.look_seconds, 0.05, MAX_SECONDS),
            ("churn: pages_per_second", self.churn.pages_per_second as f64, 1.0, MAX_RATE as f64),
            ("churn: seconds", self.churn.seconds, 0.1, MAX_SECONDS),
            ("timing: windows", self.timing.windows.into(), 1.0, MAX_WINDOWS.into()),
            ("timing: writes", self.timing.writes.into(), 1.0, MAX_RATE as f64),
            ("file: rounds", self.file.rounds.into(), 1.0, MAX_REPEAT.into()),
            ("file: evict_seconds", self.file.evict_seconds, 0.0, MAX_SECONDS),
            ("timing: pages_per_second", self.timing.pages_per_second as f64, 1.0, MAX_RATE as f64),
        ];
        let offsets = self.variant.iter().filter_map(|variant| variant.offset_seconds);
        let offsets = offsets.map(|seconds| ("variant: offset_seconds", seconds, 0.0, MAX_SECONDS));
        let running = self.variant.iter().filter_map(|variant| variant.running);
        let running = running.map(|n| ("variant: running", f64::from(n), 1.0, f64::from(MAX_VCPUS - 1)));
        let guests = self.guests.iter().map(|n| ("guests", f64::from(*n), 1.0, f64::from(MAX_GUESTS)));
        let throttles = self.variant.iter().filter_map(|variant| variant.throttle);
        let throttles = throttles.map(|rate| ("variant: throttle", rate as f64, 1.0, MAX_RATE as f64));
        for (key, value, least, most) in
            ranges.into_iter().chain(guests).chain(offsets).chain(running).chain(throttles)
        {
            if !(least..=most).contains(&value) {
                return Err(ExperimentError::Range { key, value, least, most });
            }
        }
        self.memory_bytes()?;
        match self.guest.fill.sum() {
            100 => {}
            sum => return Err(ExperimentError::Mix(sum)),
        }
        match (&self.guest.kernel, &self.guest.initrd) {
            (None, Some(_)) => Err(ExperimentError::InitrdWithoutKernel),
            _ => Ok(()),
        }
    }

    /// RAM of each guest.
    ///
    /// # Errors
    /// It is no size, or none that a guest can have.
    pub fn memory_bytes(&self) -> Result<u64, ExperimentError> {
        parse_size(&self.guest.memory, MIN_RAM_BYTES, MAX_RAM_BYTES).map_err(ExperimentError::Memory)
    }

    /// Size of the file that guests read.
    ///
    /// # Errors
    /// It is no size, or too large for a guest to have all of it in memory at once.
    pub fn file_bytes(&self) -> Result<u64, ExperimentError> {
        parse_size(&self.file.size, MIN_FILE_BYTES, self.memory_bytes()? / 2)
            .map_err(ExperimentError::FileSize)
    }

    /// Every combination of the dimensions, those of one variant and engine together.
    pub fn points(&self) -> Vec<Point> {
        let mut variants = self.variant.clone();
        // To the built-in guest they say nothing.
        variants.retain(|variant| self.guest.kernel.is_some() || variant.kaslr.is_none());
        if variants.is_empty() {
            variants.push(Variant::default());
        }
        let mut points = Vec::new();
        for variant in &variants {
            for engine in &self.engines {
                points.extend(self.guests.iter().map(|guests| Point {
                    variant: variant.name.clone(),
                    engine: *engine,
                    guests: *guests,
                }));
            }
        }
        points
    }

    /// The variant of a point.
    pub(super) fn variant_of(&self, point: &Point) -> Variant {
        self.variant.iter().find(|variant| variant.name == point.variant).cloned().unwrap_or_default()
    }

    /// Whether results of both may be compared: they differ in their texts and repetitions only.
    pub fn measures_the_same(&self, other: &Self) -> bool {
        let bare = |plan: &Self| Self {
            repeat: 1,
            about: String::new(),
            source: String::new(),
            published: String::new(),
            ..plan.clone()
        };
        bare(self) == bare(other)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLAN: &str = "name = 'p'\nkind = 'identical-vms'\nseed = 1\nrepeat = 2\nguests = [1, 2]\nengines = ['slab', 'off']\n\
                        merge_seconds = 5\n[guest]\nmemory = '64M'\nfill = { zero = 10, common = 40, duplicate = 10, unique = 40 }\n";

    fn parse(text: &str) -> Result<Plan, String> {
        Plan::parse(text, Path::new("/d")).map_err(|e| os::one_line(&e))
    }

    #[test]
    fn dimensions_make_points() {
        let plan =
            parse(&format!("{PLAN}[[variant]]\nname = 'a'\n[[variant]]\nname = 'b'\nhuge_pages = true"))
                .unwrap();
        let points = plan.points();
        assert_eq!(points.len(), 8);
        assert_eq!(points[5], Point { variant: "b".into(), engine: Contender::Slab, guests: 2 });
        assert_eq!(plan.variant_of(&points[5]).huge_pages, Some(true));
        let linux = parse(&format!("{PLAN}kernel = 'k'")).unwrap();
        assert_eq!(linux.guest.kernel, Some("/d/k".into()));
    }

    #[test]
    fn only_linux_guests_have_kaslr_and_what_such_guests_need() {
        let text = format!(
            "{PLAN}linux = {{ memory = '192M', fill_pages = 9 }}\n[[variant]]\nname = 'on'\nkaslr = true\n[[variant]]\nname = 'off'\nkaslr = false"
        );
        let names = |plan: &Plan| {
            let mut names: Vec<_> = plan.points().into_iter().map(|point| point.variant).collect();
            names.dedup();
            names
        };
        let mut plan = parse(&text).unwrap();
        assert_eq!(names(&plan), [""]);
        assert_eq!((plan.memory_bytes().unwrap(), plan.guest.fill.pages), (64 << 20, None));
        plan.set_linux(Path::new("k"), None);
        assert_eq!(names(&plan), ["on", "off"]);
        assert_eq!((plan.memory_bytes().unwrap(), plan.guest.fill.pages), (192 << 20, Some(9)));
        let other = parse(&format!("{text}\n[[variant]]\nname = 'huge'\nhuge_pages = true")).unwrap();
        assert_eq!(names(&other), ["huge"]);
    }

    #[test]
    fn other_words_and_more_repetitions_measure_the_same() {
        let plan = parse(PLAN).unwrap();
        assert!(plan.measures_the_same(&Plan { repeat: 9, about: "x".into(), ..plan.clone() }));
        assert!(!plan.measures_the_same(&Plan { seed: 2, ..plan.clone() }));
        assert!(!plan.measures_the_same(&Plan { guests: vec![1], ..plan.clone() }));
    }

    #[test]
    fn every_mistake_is_named() {
        for (from, to, expected) in [
            ("[1, 2]", "[]", "guests is empty"),
            ("[1, 2]", "[0]", "guests = 0 is not possible: expected 1 to 512"),
            ("['slab', 'off']", "[]", "engines is empty"),
            ("'off'", "'on'", "unknown variant `on`"),
            ("repeat = 2", "repeat = 0", "repeat = 0 is not possible: expected 1 to 1000"),
            ("merge_seconds = 5", "merge_seconds = nan", "merge_seconds = NaN"),
            ("'64M'", "'64'", "guest: memory: \"64\" has no unit"),
            ("zero = 10", "zero = 11", "make 101: expected 100"),
            ("seed = 1", "sead = 1", "unknown field `sead`"),
            ("'identical-vms'", "'side-channel'", "always run with three guests"),
            (
                "'identical-vms'\nseed = 1\nrepeat = 2\nguests = [1, 2]",
                "'page-cache'\nseed = 1\nrepeat = 2\nguests = [3]",
                "always run with two guests",
            ),
            (
                "'identical-vms'\nseed = 1\nrepeat = 2\nguests = [1, 2]",
                "'page-cache'\nseed = 1\nrepeat = 2\nguests = [2]",
                "file: size",
            ),
            ("memory = ", "initrd = 'i'\nmemory = ", "an initrd needs a kernel"),
            ("'identical-vms'", "'inflate-deflate'", "its fill must say how many"),
        ] {
            let error = parse(&PLAN.replacen(from, to, 1)).unwrap_err();
            assert!(error.contains(expected), "{to} gave {error}");
        }
    }
}
