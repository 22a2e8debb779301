//! Which fleets and guests live: found among this user's processes, not by what lies in a directory.

use std::collections::BTreeSet;
use std::io;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use super::HostError;
use super::claim;
use super::runtime::{FleetDir, directories, resolved, root};
use os::{Peer, Process, process};

/// A VM process of a fleet.
#[derive(Debug)]
pub struct LivingVm {
    /// The guest's name.
    pub guest: String,
    /// Its process.
    pub process: Process,
    /// The number of the daemon that started it.
    pub daemon: Option<u32>,
}

impl LivingVm {
    /// If `process` is a VM of a fleet: it, and the fleet's directory.
    fn of(process: Process) -> Option<(Self, PathBuf)> {
        let arguments = process.arguments();
        let after = |option| {
            let at = arguments.iter().position(|argument| argument == option)?;
            arguments.get(at + 1)
        };
        if arguments.get(1).is_none_or(|command| command != "run") || !process.is_this_program() {
            return None;
        }
        let control = Path::new(after("--control")?);
        let guest = control.file_name()?.to_str()?.strip_suffix(".ctl")?.to_owned();
        let daemon = after("--daemon").and_then(|pid| pid.parse().ok());
        Some((Self { guest, process, daemon }, control.parent()?.into()))
    }
}

/// The VMs of the fleet in `dir` that live, by name.
pub fn vms(dir: &FleetDir) -> Vec<LivingVm> {
    let place = resolved(dir.path());
    let mut found: Vec<LivingVm> = process::of_this_user()
        .filter_map(LivingVm::of)
        .filter_map(|(vm, dir)| (resolved(&dir) == place).then_some(vm))
        .collect();
    found.sort_by(|a, b| a.guest.cmp(&b.guest));
    found
}

/// Which guests have which processes, for messages.
pub fn pids<'a>(vms: impl IntoIterator<Item = &'a LivingVm>) -> String {
    let each = vms.into_iter().map(|vm| format!("{} (process {})", vm.guest, vm.process.pid()));
    each.collect::<Vec<_>>().join(", ")
}

/// The fleets that have a VM that lives.
fn fleets_with_vms() -> BTreeSet<String> {
    let place = resolved(&root().join("fleets"));
    process::of_this_user()
        .filter_map(LivingVm::of)
        .filter(|(_, dir)| dir.parent().is_some_and(|parent| resolved(parent) == place))
        .filter_map(|(_, dir)| dir.file_name()?.to_str().map(str::to_owned))
        .collect()
}

/// The fleets there are, by what is left of them.
#[derive(Default)]
struct Fleets {
    /// A daemon answers for them.
    up: Vec<String>,
    /// They have guests, but no daemon.
    orphaned: Vec<String>,
    /// Another process has them for itself: a demo.
    held: Vec<String>,
    /// There is nothing left but files.
    dead: Vec<String>,
}

impl Fleets {
    fn find() -> Result<Self, HostError> {
        let with_vms = fleets_with_vms();
        let names: BTreeSet<String> = directories()?.into_iter().chain(with_vms.iter().cloned()).collect();
        let mut found = Self::default();
        for name in names {
            let kind = match claim::connect(&name).and_then(Peer::process) {
                Ok(holder) if is_daemon(&holder) => &mut found.up,
                Ok(_) => &mut found.held,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => &mut found.held,
                Err(_) if with_vms.contains(&name) => &mut found.orphaned,
                Err(_) => &mut found.dead,
            };
            kind.push(name);
        }
        Ok(found)
    }

    fn all(&self) -> impl Iterator<Item = &String> {
        [&self.up, &self.orphaned, &self.held, &self.dead].into_iter().flatten()
    }

    fn known(&self) -> String {
        let all: Vec<&str> = self.all().map(String::as_str).collect();
        match all.is_empty() {
            true => ": none is".into(),
            false => format!("; these are: {}", all.join(", ")),
        }
    }
}

/// The process that has claimed the name of a fleet.
pub fn holder(fleet: &str) -> Option<Process> {
    Peer::process(claim::connect(fleet).ok()?).ok()
}

/// The daemon of a fleet, connected to, wherever its directory is by now.
pub(super) fn daemon(fleet: &str) -> Option<UnixStream> {
    let stream = claim::connect(fleet).ok()?;
    Peer::process(&stream).is_ok_and(|holder| is_daemon(&holder)).then_some(stream)
}

/// Whether it can be asked, as `samepage host` can.
fn is_daemon(process: &Process) -> bool {
    process.arguments().get(1).is_some_and(|command| command == "host")
}

/// Whether there is any fleet but those of which only files are left.
pub fn is_any() -> bool {
    Fleets::find().is_ok_and(|fleets| fleets.all().count() > fleets.dead.len())
}

/// The fleet of a command: the one named, or the only one there is. Fleets of which only files are left do not count.
pub fn choose(name: Option<String>) -> Result<String, HostError> {
    let fleets = Fleets::find()?;
    if let Some(fleet) = name {
        return named(fleet, &fleets);
    }
    match (&fleets.up[..], &fleets.orphaned[..], &fleets.held[..]) {
        ([only], ..) | ([], [only], _) | ([], [], [only]) => Ok(only.clone()),
        ([], [], []) => Err(HostError::WhichFleet { known: none(&fleets.dead) }),
        _ => Err(which(fleets.up.iter().chain(&fleets.orphaned).chain(&fleets.held))),
    }
}

/// The fleet that is to be ended. One that nothing is left of but files is meant if there is no other.
pub fn choose_to_end(name: Option<String>) -> Result<String, HostError> {
    let fleets = Fleets::find()?;
    if let Some(fleet) = name {
        return named(fleet, &fleets);
    }
    let living: Vec<&String> = fleets.up.iter().chain(&fleets.orphaned).collect();
    match (&living[..], &fleets.dead[..]) {
        ([only], _) => Ok((*only).clone()),
        ([], [only]) => Ok(only.clone()),
        ([], dead) => Err(HostError::WhichFleet { known: none(dead) }),
        _ => Err(which(living)),
    }
}

fn named(fleet: String, fleets: &Fleets) -> Result<String, HostError> {
    match fleets.all().any(|known| *known == fleet) {
        true => Ok(fleet),
        false => Err(HostError::NotUp { fleet, known: fleets.known() }),
    }
}

fn which<'a>(many: impl IntoIterator<Item = &'a String>) -> HostError {
    let many: Vec<&str> = many.into_iter().map(String::as_str).collect();
    HostError::WhichFleet { known: format!("say --name with one of: {}", many.join(", ")) }
}

fn none(dead: &[String]) -> String {
    let start = "none is up: `samepage fleet up FILE.toml` starts one";
    match dead {
        [] => start.into(),
        dead => format!(
            "{start}. Of these only files are left, which `samepage fleet down --name NAME` removes: {}",
            dead.join(", ")
        ),
    }
}
