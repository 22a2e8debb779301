//! The program of this process, as it was started: its path may have another file by now.

use std::fs::File;
use std::hash::Hasher;
use std::io::{self, Read};
use std::os::unix::process::CommandExt;
use std::process::Command;

use twox_hash::XxHash3_64;

/// The program of this process, whatever is at its path now: an upgrade replaces it while we run.
const PATH: &str = "/proc/self/exe";
/// The name that lists of processes show.
const NAME: &str = "samepage";

/// A command that starts this program again: the same build, also where its file was replaced or
/// removed.
pub fn command() -> Command {
    let mut command = Command::new(PATH);
    // Lists of processes show the name of this process.
    command.arg0(std::env::args_os().next().unwrap_or_else(|| NAME.into()));
    command
}

/// Names this process for `ps`, `pgrep` and the kernel's messages, which otherwise show "exe" for
/// one that [`command`] started.
pub(super) fn name_this_process() {
    if let Ok(name) = std::ffi::CString::new(NAME) {
        let _ = rustix::thread::set_name(&name);
    }
}

/// Which build of the program this is: its version, and a hash of all of its bytes.
///
/// # Errors
/// /proc is not there.
pub fn build() -> io::Result<String> {
    let mut file = File::open(PATH)?;
    let (mut hasher, mut buffer) = (XxHash3_64::with_seed(0), vec![0; 1 << 20]);
    loop {
        match file.read(&mut buffer) {
            Ok(0) => break,
            Ok(count) => hasher.write(&buffer[..count]),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(format!("{}-{:016x}", env!("CARGO_PKG_VERSION"), hasher.finish()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_build_is_the_same_twice() {
        let build = build().unwrap();
        assert_eq!(build, super::build().unwrap());
        assert!(build.starts_with(concat!(env!("CARGO_PKG_VERSION"), "-")), "{build}");
    }
}
