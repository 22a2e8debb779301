//! VMs that another program started and that join by themselves, through the merge socket: their identity comes from the kernel, and from the
//! fleet's file their domain.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::{Fleet, pledge_of};
use crate::guest::Guest;
use crate::spec::{GuestSpec, MAX_GUESTS, check_name};
use machine::VmConfig;
use machine::api::{API_SOCKET, CONTROL_SUFFIX};
use machine::control::Request;
use memory::PAGE_BYTES;
use memory::layout::{MAX_RAM_BYTES, MIN_RAM_BYTES};
use merge::slab::{Applicant, ErrorKind, Refusal};
use os::Process;

/// How many refusals are remembered.
const MAX_REFUSED: usize = 1024;

impl Fleet {
    /// Registers the VMs that have applied since the last time, and removes those that have ended. True if there were any.
    pub(crate) fn let_join(&mut self) -> bool {
        if self.spec.open.is_none() {
            return false;
        }
        let mut changed = self.see_off();
        for applicant in self.engine.applicants() {
            let (serial, pid, uid) = (applicant.serial, applicant.process.pid(), applicant.uid);
            match self.join(applicant) {
                Ok(()) => changed = true,
                Err(refusal) => {
                    let why = &refusal.text;
                    if self.refused.len() >= MAX_REFUSED {
                        self.refused.clear();
                    }
                    if self.refused.insert(pid, why.clone()).as_ref() != Some(why) {
                        tracing::warn!("process {pid} of user {uid} is refused: {why}");
                    }
                    self.engine.refuse(serial, refusal);
                }
            }
        }
        if changed && let Err(error) = pledge_of(self) {
            tracing::warn!("{error}");
        }
        changed
    }

    /// Resumes suspended guests that outlive the fleet.
    pub(crate) fn resume_joined(&mut self, suspended: impl Fn(&str) -> bool) {
        for guest in self.guests.iter().filter(|guest| guest.has_joined() && suspended(&guest.spec.name)) {
            if let Err(error) = guest.control(&Request::Resume) {
                tracing::warn!("guest {} stays suspended: {error}", guest.spec.name);
            }
        }
    }

    /// Removes guests that have ended; they are not started again, as the file does not name them.
    fn see_off(&mut self) -> bool {
        let mut gone = Vec::new();
        for guest in self.guests.iter_mut().filter(|guest| guest.has_joined()) {
            if guest.ended().is_some() {
                tracing::info!("guest {} has ended, and left", guest.spec.name);
                gone.push(guest.spec.name.clone());
            }
        }
        for name in &gone {
            self.engine.remove(name);
            self.guests.retain(|guest| guest.spec.name != *name);
            self.spec.guests.retain(|guest| guest.name != *name);
        }
        !gone.is_empty()
    }

    /// Registers one. It runs and has its memory already, so there is no admission, and its memory counts.
    ///
    /// # Errors
    /// Why it is refused.
    fn join(&mut self, applicant: Applicant) -> Result<(), Refusal> {
        let Applicant { uid, process, pages, .. } = applicant;
        let (pid, cgroup, arguments) = (process.pid(), cgroup(&process), process.arguments());
        let open = self.spec.open.clone().unwrap_or_default();
        let domain = open.domain(&self.spec.name, uid, &cgroup).ok_or_else(|| {
            let fleet = &self.spec.name;
            Refusal::new(
                ErrorKind::NoDomain,
                format!(
                    "user {uid}, control group {cgroup}, belongs to no domain of fleet {fleet}: the table [open] of its file says which VMs do"
                ),
            )
        })?;
        let control = control(pid, &arguments).ok_or_else(|| {
            Refusal::new(
                ErrorKind::NoControl,
                "it has no control socket, by which its memory is measured and managed: start it with --control PATH",
            )
        })?;
        let memory_bytes =
            pages.checked_mul(PAGE_BYTES).filter(|b| (MIN_RAM_BYTES..=MAX_RAM_BYTES).contains(b));
        let memory_bytes = memory_bytes.ok_or_else(|| {
            Refusal::new(ErrorKind::MemorySize, format!("it says that it has {pages} pages"))
        })?;
        if self.guests.len() >= MAX_GUESTS {
            let full = format!("fleet {} has {MAX_GUESTS} guests, the most there may be", self.spec.name);
            return Err(Refusal::new(ErrorKind::FleetFull, full));
        }
        // What ended meanwhile was another's file that we looked at.
        if process.has_ended() {
            return Err(Refusal::new(ErrorKind::Ended, "it has ended"));
        }
        let name = self.free_name(pid, &arguments);
        let vm = VmConfig { memory_bytes, control: Some(control.clone()), ..VmConfig::default() };
        let spec = GuestSpec::new(name.clone(), domain.into(), vm);
        tracing::info!("guest {name} joins: process {pid} of user {uid}, domain {domain}");
        let number = self.guests.iter().map(|guest| guest.number + 1).max().unwrap_or(0);
        let guest = Guest::join(spec.clone(), number, &self.dir, process, control);
        self.spec.guests.push(spec);
        self.register(guest);
        Ok(())
    }

    /// What it calls itself, if that is a name, and with its process's number if another is called so.
    fn free_name(&self, pid: u32, arguments: &[String]) -> String {
        let own = after(arguments, "--id").or_else(|| after(arguments, "--name"));
        let own = own.filter(|name| check_name(name).is_ok());
        let is_free = |name: &String| !self.spec.guests.iter().any(|guest| guest.name == *name);
        own.map(str::to_owned).filter(is_free).unwrap_or_else(|| format!("vm-{pid}"))
    }
}

/// The value of an option.
fn after<'a>(arguments: &'a [String], option: &str) -> Option<&'a str> {
    arguments.iter().enumerate().find_map(|(n, argument)| match argument.strip_prefix(option)? {
        "" => arguments.get(n + 1).map(String::as_str),
        value => value.strip_prefix('='),
    })
}

/// Its control socket, wherever the process was started, and whatever it sees as the root.
fn control(pid: u32, arguments: &[String]) -> Option<PathBuf> {
    let path = match (after(arguments, "--control"), after(arguments, "--api-sock")) {
        (Some(path), _) => PathBuf::from(path),
        (None, Some(api)) => PathBuf::from(format!("{api}{CONTROL_SUFFIX}")),
        (None, None) if is_firecracker(arguments) && !arguments.iter().any(|a| a == "--no-api") => {
            PathBuf::from(format!("{API_SOCKET}{CONTROL_SUFFIX}"))
        }
        (None, None) => return None,
    };
    let path = fs::read_link(format!("/proc/{pid}/cwd")).unwrap_or_default().join(path);
    let place = |root: &str| fs::metadata(root).map(|it| (it.dev(), it.ino()));
    let is_jailed = match (place(&format!("/proc/{pid}/root/")), place("/")) {
        (Ok(its), Ok(ours)) => its != ours,
        _ => false,
    };
    match path.strip_prefix("/") {
        Ok(below) if is_jailed => Some(Path::new(&format!("/proc/{pid}/root")).join(below)),
        Ok(_) => Some(path),
        Err(_) => None,
    }
}

/// Whether it was started by Firecracker's name.
fn is_firecracker(arguments: &[String]) -> bool {
    let is_it = |argument: &String| Path::new(argument).file_name().is_some_and(|name| name == "firecracker");
    arguments.iter().take(2).any(is_it)
}

/// Its control group, in version 2's tree.
fn cgroup(process: &Process) -> String {
    let text = fs::read_to_string(format!("/proc/{}/cgroup", process.pid())).unwrap_or_default();
    text.lines().find_map(|line| line.strip_prefix("0::")).unwrap_or("/").replace(char::is_control, "?")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_found_in_both_forms() {
        let arguments = ["samepage", "run", "--control=/a", "--name", "x", "--id"].map(String::from);
        assert_eq!(after(&arguments, "--control"), Some("/a"));
        assert_eq!(after(&arguments, "--name"), Some("x"));
        assert_eq!((after(&arguments, "--id"), after(&arguments, "--com2")), (None, None));
        let pid = std::process::id();
        assert_eq!(control(pid, &arguments), Some("/a".into()));
        let relative = ["run", "--control", "a.sock"].map(String::from);
        assert_eq!(control(pid, &relative), Some(std::env::current_dir().unwrap().join("a.sock")));
        let by_name = ["/opt/firecracker", "--api-sock", "/b", "--", "x"].map(String::from);
        assert_eq!(control(pid, &by_name), Some("/b.control".into()));
        assert_eq!(control(pid, &by_name[..1]), Some("/run/firecracker.socket.control".into()));
        assert_eq!(control(pid, &["samepage", "run"].map(String::from)), None);
        assert_eq!(control(pid, &["firecracker", "--no-api"].map(String::from)), None);
        assert!(cgroup(&Process::open(pid).unwrap()).starts_with('/'));
    }
}
