//! Filters of system calls, one for each kind of thread.

mod request;
pub mod table;
mod violation;

use std::collections::BTreeMap;
use std::fmt;

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    TargetArch, apply_filter,
};
use serde::{Deserialize, Serialize};
use syscalls::Sysno;

use self::table::{Allowed, Check};
use super::JailError;

pub use violation::EXIT_BAD_SYSCALL;

/// What becomes of a system call that is not on a thread's list.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// There are no filters.
    Off,
    /// It is made, and the kernel logs it.
    Log,
    /// It fails with EPERM.
    Errno,
    /// The process ends with [`EXIT_BAD_SYSCALL`] and names the call.
    #[default]
    Kill,
}

impl Mode {
    fn action(self) -> SeccompAction {
        match self {
            Self::Off => SeccompAction::Allow,
            Self::Log => SeccompAction::Log,
            Self::Errno => SeccompAction::Errno(libc::EPERM as u32),
            Self::Kill => SeccompAction::Trap,
        }
    }
}

/// The kinds of threads in a VM's process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Thread {
    /// Runs a vCPU, and what devices do when their registers are accessed.
    Vcpu,
    /// The main thread: sockets, timers, queues of devices, requests.
    EventLoop,
    /// Reads requests of the API and sends answers.
    Api,
    /// The agent of merging.
    Merge,
    /// Samples the working set.
    Sample,
    /// Serves a drive's requests.
    Disk,
    /// Writes the console to what may block.
    Console,
    /// Watches the process that fills guest memory.
    Handler,
}

impl Thread {
    pub const ALL: [Self; 8] = [
        Self::Vcpu,
        Self::EventLoop,
        Self::Api,
        Self::Merge,
        Self::Sample,
        Self::Disk,
        Self::Console,
        Self::Handler,
    ];
}

impl fmt::Display for Thread {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Vcpu => "vCPU",
            Self::EventLoop => "event loop",
            Self::Api => "API",
            Self::Merge => "merge",
            Self::Sample => "sample",
            Self::Disk => "disk",
            Self::Console => "console",
            Self::Handler => "handler",
        })
    }
}

/// Whether this kernel has filters.
pub fn is_available() -> bool {
    rustix::thread::secure_computing_mode().is_ok()
}

/// Readies this process for filters.
pub(super) fn prepare(name: &str) -> Result<(), JailError> {
    violation::catch(name).map_err(JailError::Handler)
}

/// Filters the calling thread's system calls from now on, and those of the threads that it starts.
pub(super) fn install(thread: Thread, mode: Mode) -> Result<(), JailError> {
    if mode == Mode::Off {
        return Ok(());
    }
    let program = compile(thread, mode.action()).map_err(|source| JailError::Compile { thread, source })?;
    violation::this_is(thread);
    let failed = |source| JailError::Install { thread, source };
    // Of two filters the stricter answer counts. As on a kernel without clone3, threads are made by clone.
    if is_listed(thread, Sysno::clone3) {
        let clone3 = BTreeMap::from([(i64::from(Sysno::clone3.id()), Vec::new())]);
        let no_clone3 = SeccompAction::Errno(libc::ENOSYS as u32);
        let without = SeccompFilter::new(clone3, SeccompAction::Allow, no_clone3, TargetArch::x86_64)
            .and_then(BpfProgram::try_from)
            .map_err(|source| JailError::Compile { thread, source })?;
        apply_filter(&without).map_err(failed)?;
    }
    apply_filter(&program).map_err(failed)
}

/// The filter of a thread in this process: what the table does not list comes to `action`.
fn compile(thread: Thread, action: SeccompAction) -> Result<BpfProgram, seccompiler::BackendError> {
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = BTreeMap::new();
    // A call that is listed without a check needs no other rule.
    let mut always = Vec::new();
    for allowed in table::of(thread) {
        let number = i64::from(allowed.call.id());
        let its = rules.entry(number).or_default();
        match allowed.checks {
            [] => always.push(number),
            checks => its.extend(rules_of(checks)?),
        }
    }
    for number in always {
        rules.insert(number, Vec::new());
    }
    SeccompFilter::new(rules, action, SeccompAction::Allow, TargetArch::x86_64)?.try_into()
}

/// The rules of which one must hold for all `checks` to hold.
fn rules_of(checks: &[Check]) -> Result<Vec<SeccompRule>, seccompiler::BackendError> {
    let mut all: Vec<Vec<SeccompCondition>> = vec![Vec::new()];
    for check in checks {
        // The kernel takes what is checked as 32 bits, whatever is above them.
        let condition =
            |argument, op, value| SeccompCondition::new(argument, SeccompCmpArgLen::Dword, op, value);
        let one_of = match *check {
            Check::Is(argument, values) => values
                .iter()
                .map(|value| condition(argument, SeccompCmpOp::Eq, *value))
                .collect::<Result<Vec<_>, _>>()?,
            Check::With(argument, bits) => {
                vec![condition(argument, SeccompCmpOp::MaskedEq(bits), bits)?]
            }
            Check::Without(argument, bits) => {
                vec![condition(argument, SeccompCmpOp::MaskedEq(bits), 0)?]
            }
            Check::Null(argument) => {
                vec![SeccompCondition::new(argument, SeccompCmpArgLen::Qword, SeccompCmpOp::Eq, 0)?]
            }
            Check::ThisProcess(argument) => {
                vec![condition(argument, SeccompCmpOp::Eq, std::process::id().into())?]
            }
        };
        all = all
            .iter()
            .flat_map(|begun| one_of.iter().map(|one| [begun.as_slice(), std::slice::from_ref(one)].concat()))
            .collect();
    }
    all.into_iter().map(SeccompRule::new).collect()
}

/// Whether a thread's list has this call, whatever its arguments.
pub fn is_listed(thread: Thread, call: Sysno) -> bool {
    table::of(thread).any(|Allowed { call: listed, .. }| *listed == call)
}
