//! Powering off and restarting: by the kernel if the agent is process 1, else through process 1.

use core::ffi::CStr;

use guest::protocol::{Done, ErrorCode, Reply, Text};
use guest::service::Power;

use crate::init::log;
use crate::sys::{self, ENOENT, Errno, Exit, RETRY_MILLIS};

/// Where distributions keep the programs that ask process 1 to restart or power off.
const POWEROFF: [&CStr; 4] =
    [c"/sbin/poweroff", c"/usr/sbin/poweroff", c"/bin/poweroff", c"/usr/bin/poweroff"];
/// See [`POWEROFF`].
const REBOOT: [&CStr; 4] = [c"/sbin/reboot", c"/usr/sbin/reboot", c"/bin/reboot", c"/usr/bin/reboot"];
/// Time within which such a program reports a refusal. One that succeeds may wait for the end of
/// the machine.
const REFUSAL_MILLIS: usize = 5000;
const LOOK_MILLIS: usize = 20;

/// Ends the machine, as process 1.
pub(crate) fn end(power: Power) -> ! {
    let how = match power {
        Power::Off => sys::Reboot::PowerOff,
        Power::Reset => sys::Reboot::Restart,
    };
    loop {
        let error = sys::reboot(how);
        log(format_args!("the kernel does not end: {error}"));
        sys::sleep_millis(RETRY_MILLIS);
    }
}

/// Has process 1 shut the machine down: services first, then disks. Data written so far is synced
/// before.
pub(crate) fn ask(power: Power) -> Reply {
    let (programs, done) = match power {
        Power::Off => (POWEROFF, Done::Poweroff),
        Power::Reset => (REBOOT, Done::Reboot),
    };
    sys::sync();
    let refused = |message| Reply::Err { code: ErrorCode::Failed, message };
    match first(&programs) {
        Ok((program, pid)) => match outcome(pid) {
            Some(exit) => refused(Text::of(format_args!("{program:?}: {exit}"))),
            None => Reply::Ok(done),
        },
        Err(ENOENT) => refused(Text::of(format_args!("{:?} is not there, nor elsewhere", programs[0]))),
        Err(error) => refused(Text::of(format_args!("{:?} cannot be started: {error}", programs[0]))),
    }
}

/// Starts the first program that exists. Returns its process.
fn first(programs: &[&'static CStr]) -> Result<(&'static CStr, usize), Errno> {
    let mut failed = ENOENT;
    for program in programs {
        match sys::spawn(program) {
            Ok(pid) => return Ok((program, pid)),
            Err(ENOENT) => {}
            Err(error) => failed = error,
        }
    }
    Err(failed)
}

/// How the program failed, if it does soon.
fn outcome(pid: usize) -> Option<Exit> {
    for _ in 0..REFUSAL_MILLIS / LOOK_MILLIS {
        if let Some(exit) = sys::ended(pid) {
            return (!exit.is_success()).then_some(exit);
        }
        sys::sleep_millis(LOOK_MILLIS);
    }
    None
}
