//! The program called as `jailer`. One function to call, [`main`]; what it is to do is not here yet.

use std::ffi::OsString;
use std::process::ExitCode;

use os::print::errln;

/// Firecracker's jailer ends so, whatever is wrong.
const EXIT_FAILURE: u8 = 1;

/// Carries out `arguments`, of which the first is the program's name.
pub(super) fn main(_arguments: Vec<OsString>) -> ExitCode {
    errln!(
        "error: Samepage has no jailer yet: start the link called `firecracker` itself, in a user, namespaces and a control group that the \
         caller makes"
    );
    ExitCode::from(EXIT_FAILURE)
}
