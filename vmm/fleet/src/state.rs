//! What is kept beside a guest, whole: which process it is, what it was started with, what it said and was filled with.
//!
//! A later daemon takes a guest over by this and by nothing else, and says in what it differs from the fleet file.

use std::fs;

use guest::protocol::{Command, Fill, Ready, Reply};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::HostError;
use super::difference::Difference;
use super::runtime::FleetDir;
use super::spec::{EngineName, GuestSpec};
use os::Identity;

/// What this build writes. One that is not known is not guessed at.
const VERSION: u32 = 2;
/// Keys that may change under a running VM: what the daemon carries out by itself, and what a note is enough for ([`Started::note`]). Of
/// `net` what the VM has is in `vm`.
const LIVE_KEYS: [&str; 4] = ["standing", "ready_seconds", "working_set_seconds", "net"];

/// What a VM was started with.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Started {
    /// The guest.
    pub guest: GuestSpec,
    /// What merges it.
    pub engine: EngineName,
    /// How long pages are watched to estimate its working set; None: none are.
    pub working_set_seconds: Option<f64>,
}

/// What is known of a guest.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Saved {
    version: u32,
    /// What it was started with.
    pub started: Started,
    /// Its process; None until there is one.
    pub process: Option<Identity>,
    ready: Option<String>,
    fill: Option<String>,
}

impl Saved {
    /// Of a guest that has come so far.
    pub fn new(
        started: Started,
        process: Option<Identity>,
        ready: Option<Ready>,
        fill: Option<Fill>,
    ) -> Self {
        let ready = ready.map(|ready| Reply::Ready(ready).to_string());
        Self { version: VERSION, started, process, ready, fill: fill.map(|f| Command::Fill(f).to_string()) }
    }

    /// What an earlier daemon wrote of `guest`; None if it wrote nothing, or something that this build does not understand.
    pub fn read(dir: &FleetDir, guest: &str) -> Option<Self> {
        let saved: Self = serde_json::from_slice(&fs::read(dir.state(guest)).ok()?).ok()?;
        (saved.version == VERSION).then_some(saved)
    }

    /// Writes it down, as a whole or not at all.
    pub fn write(&self, dir: &FleetDir) -> Result<(), HostError> {
        let path = dir.state(&self.started.guest.name);
        let failed = |source| HostError::Runtime { what: "write", path: path.clone(), source };
        let bytes = serde_json::to_vec(self).map_err(|e| failed(e.into()))?;
        let new = path.with_extension("json.new");
        fs::write(&new, bytes).and_then(|()| fs::rename(&new, &path)).map_err(|source| {
            let _ = fs::remove_file(&new);
            failed(source)
        })
    }

    /// What the guest said when it was ready, if it has been.
    pub fn ready(&self) -> Option<Ready> {
        match Reply::parse(self.ready.as_deref()?) {
            Ok(Reply::Ready(ready)) => Some(ready),
            _ => None,
        }
    }

    /// What it was filled with, if it has been.
    pub fn fill(&self) -> Option<Fill> {
        match Command::parse(self.fill.as_deref()?) {
            Ok(Command::Fill(fill)) => Some(fill),
            _ => None,
        }
    }

    /// Whether its daemon got as far with it as it was to: ready, and filled.
    pub fn is_whole(&self) -> bool {
        self.process.is_some()
            && self.ready().is_some()
            && (self.started.guest.fill.is_none() || self.fill().is_some())
    }
}

impl Started {
    /// In what a VM that was started so differs from what `file` wants of it.
    pub fn differences(&self, file: &Self) -> Vec<Difference> {
        let (own, wanted) = (self.keys(), file.keys());
        let keys = own.keys().chain(wanted.keys().filter(|key| !own.contains_key(*key)));
        keys.filter(|key| !LIVE_KEYS.contains(&key.as_str()))
            .filter_map(|key| {
                let (runs_with, file) = (own.get(key), wanted.get(key));
                (runs_with != file).then(|| Difference::Key {
                    guest: self.guest.name.clone(),
                    key: file_key(key).into(),
                    runs_with: shown(key, runs_with),
                    file: shown(key, file),
                })
            })
            .collect()
    }

    /// What cannot be changed under a running VM and is no reason to end it: how its working set is sampled.
    pub fn note(&self, wanted_seconds: Option<f64>) -> Option<String> {
        let said = |seconds: Option<f64>| seconds.map_or("not at all".into(), |s| format!("every {s} s"));
        (self.working_set_seconds != wanted_seconds).then(|| {
            format!(
                "guest {}: its working set is sampled as it was when its VM was started, {}, and not as the fleet file says, {}",
                self.guest.name,
                said(self.working_set_seconds),
                said(wanted_seconds)
            )
        })
    }

    /// All of it, by key: a new key is compared without a change here.
    fn keys(&self) -> serde_json::Map<String, Value> {
        let Ok(Value::Object(mut keys)) = serde_json::to_value(self) else { return serde_json::Map::new() };
        for part in ["guest", "vm"] {
            if let Some(Value::Object(more)) = keys.remove(part) {
                keys.extend(more);
            }
        }
        keys
    }
}

/// A key as fleet files have it.
fn file_key(key: &str) -> &str {
    match key {
        "memory_bytes" => "memory",
        "unpack" => "kernel_decompress",
        key => key,
    }
}

fn shown(key: &str, value: Option<&Value>) -> String {
    match (key, value) {
        ("memory_bytes", Some(Value::Number(bytes))) => match bytes.as_u64() {
            Some(bytes) if bytes % (1 << 20) == 0 => format!("{}M", bytes >> 20),
            Some(bytes) => format!("{}K", bytes >> 10),
            None => bytes.to_string(),
        },
        (_, None | Some(Value::Null)) => "nothing".into(),
        (_, Some(Value::Array(list))) if list.is_empty() => "none".into(),
        (_, Some(value)) => value.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::super::spec::FleetSpec;
    use super::*;

    fn started(text: &str) -> Started {
        let text = format!("name = \"f\"\n[[guest]]\nname = \"a\"\n{text}");
        let spec = FleetSpec::parse(&text, Path::new("/dir")).unwrap();
        Started { guest: spec.guests[0].clone(), engine: spec.engine, working_set_seconds: None }
    }

    fn said(was: &str, is: &str) -> Vec<String> {
        started(was).differences(&started(is)).iter().map(ToString::to_string).collect()
    }

    #[test]
    fn each_difference_is_named_with_both_values() {
        assert!(said("memory = \"64M\"", "memory = \"65536K\"").is_empty());
        let two = said("memory = \"64M\"\ndomain = \"x\"", "memory = \"1G\"\ndomain = \"y\"\ncpus = 2");
        let text = two.join("\n");
        assert_eq!(two.len(), 3, "{text}");
        for part in ["guest a: memory: it runs with 64M, the file says 1024M", "\"x\"", "\"y\"", "cpus"] {
            assert!(text.contains(part), "{part} is not in {text}");
        }
        let drives = said("", "drives = [{ path = \"disk\" }]\nkernel = \"k\"");
        assert!(drives.len() == 2 && drives.concat().contains("/dir/disk"), "{drives:?}");
        assert!(drives.concat().contains("nothing") && drives.concat().contains("none"), "{drives:?}");
        // What the daemon alone does may change.
        assert!(said("min = \"32M\"", "min = \"16M\"\nready_seconds = 7\nshares = 3").is_empty());
        let sampled = Started { working_set_seconds: Some(10.0), ..started("") };
        assert!(started("").differences(&sampled).is_empty() && sampled.note(Some(10.0)).is_none());
        assert!(
            sampled.note(None).unwrap().contains("every 10 s, and not as the fleet file says, not at all")
        );
    }

    #[test]
    fn a_guest_is_whole_when_it_is_ready_and_filled() {
        let ready = Ready { kind: guest::protocol::Kind::Builtin, pages: 5, base: 4096, mem_pages: 9 };
        let process = Some(Identity { pid: 7, start_ticks: 8 });
        let of = |spec: &str, process, ready| Saved::new(started(spec), process, ready, None);
        assert!(of("", process, Some(ready)).is_whole());
        assert!(!of("", None, Some(ready)).is_whole() && !of("", process, None).is_whole());
        assert!(!of("fill = { unique = 100 }", process, Some(ready)).is_whole());
        let root = tempfile::tempdir().unwrap();
        // What is written is read again, and another version is not guessed at.
        let dir = FleetDir::at(root.path().into());
        let saved = of("drives = [{ path = \"d\" }]", process, Some(ready));
        saved.write(&dir).unwrap();
        assert_eq!(Saved::read(&dir, "a"), Some(saved.clone()));
        Saved { version: VERSION + 1, ..saved }.write(&dir).unwrap();
        assert_eq!(Saved::read(&dir, "a"), None);
        fs::write(dir.state("a"), "{\"ready\":null,\"fill\":null}").unwrap();
        assert_eq!(Saved::read(&dir, "a"), None);
    }
}
