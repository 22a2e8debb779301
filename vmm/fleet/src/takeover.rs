//! What an earlier daemon has left of a fleet, held against the fleet file before anything is touched.

use std::io;
use std::thread;
use std::time::{Duration, Instant};

use super::HostError;
use super::client::control_within;
use super::difference::{Difference, Differences};
use super::guest::Guest;
use super::living::{LivingVm, vms};
use super::runtime::FleetDir;
use super::shutdown::{self, Shutdown};
use super::spec::FleetSpec;
use super::state::{Saved, Started};
use machine::control::Request;
use os::Process;
use os::one_line;
use wire::LineError;

/// How long a VM may take to say that it is there.
const ANSWER_LIMIT: Duration = Duration::from_secs(5);
/// How long its socket may take to come back after its directory was removed.
const SOCKET_LIMIT: Duration = Duration::from_secs(3);
/// How long a VM whose socket fails may take to end.
const ENDING_LIMIT: Duration = Duration::from_secs(1);
/// How often it is looked for.
const POLL: Duration = Duration::from_millis(50);

/// What runs of a fleet that is to come up.
#[derive(Default)]
pub struct Left {
    /// What is as the fleet file wants it.
    whole: Vec<(usize, Saved, Process)>,
    /// Clones, which no fleet file names.
    clones: Vec<(Saved, Process)>,
    /// What is to end first: what no daemon got as far as filling, and what is to be replaced.
    ends: Vec<LivingVm>,
}

impl Left {
    /// What runs of the fleet of `spec`, which was claimed. What differs from it is an error, unless it is to be replaced.
    pub fn find(spec: &FleetSpec, dir: &FleetDir, replace: bool) -> Result<Self, HostError> {
        let mut left = Self::default();
        let mut differences = Vec::new();
        for vm in vms(dir) {
            match judge(&vm, spec, dir) {
                Judged::Whole(Some(number), saved) => left.whole.push((number, *saved, vm.process)),
                Judged::Whole(None, saved) => left.clones.push((*saved, vm.process)),
                Judged::Unfinished => left.ends.push(vm),
                Judged::Differs(found) => {
                    differences.extend(found);
                    left.ends.push(vm);
                }
            }
        }
        match differences.is_empty() || replace {
            true => Ok(left),
            false => {
                Err(HostError::Differs { fleet: spec.name.clone(), differences: Differences(differences) })
            }
        }
    }

    /// An error if anything runs: for a fleet that takes nothing over.
    pub fn none(spec: &FleetSpec, dir: &FleetDir) -> Result<Self, HostError> {
        let unknown = |vm: LivingVm| Difference::Unknown { guest: vm.guest, pid: vm.process.pid() };
        let found: Vec<Difference> = vms(dir).into_iter().map(unknown).collect();
        match found.is_empty() {
            true => Ok(Self::default()),
            false => Err(HostError::Differs { fleet: spec.name.clone(), differences: Differences(found) }),
        }
    }

    /// Whether a guest runs, and is taken over.
    pub fn runs(&self, guest: &str) -> bool {
        let whole = self.whole.iter().map(|(_, saved, _)| saved);
        whole.chain(self.clones.iter().map(|(saved, _)| saved)).any(|saved| saved.started.guest.name == guest)
    }

    /// Takes the guests over that are as they should be. Clones are guests of `spec` from now on.
    pub fn adopt(&mut self, spec: &mut FleetSpec, dir: &FleetDir) -> Result<Vec<Guest>, HostError> {
        for (saved, vm) in std::mem::take(&mut self.clones) {
            self.whole.push((spec.guests.len(), saved.clone(), vm));
            spec.guests.push(saved.started.guest);
        }
        let whole = std::mem::take(&mut self.whole).into_iter();
        whole.map(|(number, saved, vm)| Guest::adopt(&spec.guests[number], number, dir, &saved, vm)).collect()
    }

    /// Ends what is to end, all at the same time.
    pub fn end(self, dir: &FleetDir) {
        end_all(&self.ends, dir);
    }
}

/// Ends VMs, all at the same time.
pub fn end_all(vms: &[LivingVm], dir: &FleetDir) {
    thread::scope(|scope| {
        for vm in vms {
            scope.spawn(|| vm.process.end(|| ask(vm, dir, &Request::Stop).is_ok()));
        }
    });
}

/// Asks VMs to have their guests power off, all at the same time.
pub(super) fn shut_down_each(vms: &[LivingVm], dir: &FleetDir, shutdown: &Shutdown) {
    thread::scope(|scope| {
        for vm in vms {
            scope.spawn(|| {
                // At the pace of one that is held back it could not. One that does not answer is ended when time is up.
                let _ = ask(vm, dir, &Request::Throttle { pages_per_second: None });
                let _ = ask(vm, dir, &shutdown::request(shutdown.vm_limit()));
            });
        }
    });
}

enum Judged {
    /// As it should be: its number in the file, or none of a clone.
    Whole(Option<usize>, Box<Saved>),
    Unfinished,
    Differs(Vec<Difference>),
}

fn judge(vm: &LivingVm, spec: &FleetSpec, dir: &FleetDir) -> Judged {
    let (guest, pid) = (vm.guest.clone(), vm.process.pid());
    let Some(saved) = Saved::read(dir, &guest) else {
        return Judged::Differs(vec![Difference::Unknown { guest, pid }]);
    };
    if saved.process.is_some_and(|process| process != vm.process.identity()) {
        return Judged::Differs(vec![Difference::Unknown { guest, pid }]);
    }
    if !saved.is_whole() {
        // What the guest was asked, or still does, is not known: a new one is as good.
        return Judged::Unfinished;
    }
    let number = spec.guests.iter().position(|wanted| wanted.name == guest);
    let is_clone = saved.started.guest.clone_of.is_some();
    let wanted = match number {
        Some(number) => spec.guests[number].clone(),
        // It is as its origin was.
        None if is_clone => saved.started.guest.clone(),
        None => return Judged::Differs(vec![Difference::NotInFile { guest, pid }]),
    };
    let wanted = Started {
        guest: wanted,
        engine: spec.engine,
        working_set_seconds: spec.overcommit.sampling_seconds(),
    };
    let differences = saved.started.differences(&wanted);
    if !differences.is_empty() {
        return Judged::Differs(differences);
    }
    match ask(vm, dir, &Request::Status) {
        Ok(()) => Judged::Whole(number, Box::new(saved)),
        // One that ends meanwhile is not there. Its sockets are closed before it has ended.
        Err(_) if vm.process.ends_within(ENDING_LIMIT) => Judged::Unfinished,
        Err(error) => Judged::Differs(vec![Difference::Silent { guest, pid, why: one_line(&error) }]),
    }
}

/// Asks the VM; nothing else is asked that may be where its socket was.
fn ask(vm: &LivingVm, dir: &FleetDir, request: &Request) -> Result<(), HostError> {
    let socket = dir.control(&vm.guest)?;
    let until = Instant::now() + SOCKET_LIMIT;
    loop {
        let asked = control_within(&vm.guest, &socket, Some(vm.process.pid()), request, ANSWER_LIMIT);
        match asked {
            Err(HostError::Socket { source: LineError::Io(source), .. })
                if source.kind() == io::ErrorKind::NotFound
                    && Instant::now() < until
                    && !vm.process.has_ended() =>
            {
                thread::sleep(POLL);
            }
            asked => return asked.map(drop),
        }
    }
}
