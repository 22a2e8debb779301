//! Limits of this process, and errors that they cause.

use std::io;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// The most descriptors that are asked for where there is no limit: 1024 guests with some hundred
/// slabs each.
const MOST_DESCRIPTORS: u64 = 1 << 20;

/// Raises this process's limit on descriptors to the most it may have: guests, clients and slabs
/// take some each. The usual limit (1024) is for programs that use select(2).
pub fn allow_descriptors() {
    let now = getrlimit(Resource::Nofile);
    let hard = now.maximum.unwrap_or(MOST_DESCRIPTORS);
    let wanted = hard.min(MOST_DESCRIPTORS);
    if now.current.is_some_and(|soft| soft < wanted) {
        // Where it cannot be raised, fewer are possible, and errors say so.
        let _ = setrlimit(Resource::Nofile, Rlimit { current: Some(wanted), maximum: now.maximum });
    }
}

/// The limit on this process's descriptors.
pub fn descriptors() -> u64 {
    getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX)
}

/// Whether an error means that no descriptors are left, here or on the host: trying again changes
/// nothing.
pub fn is_shortage(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EMFILE | libc::ENFILE))
}

/// The same error with advice, where a limit caused it.
pub fn explained(error: io::Error) -> io::Error {
    match advice(&error) {
        Some(advice) => io::Error::new(error.kind(), format!("{error}; {advice}")),
        None => error,
    }
}

/// What to do about an error that a limit caused.
pub fn advice(error: &io::Error) -> Option<String> {
    match error.raw_os_error()? {
        libc::EMFILE => Some(format!(
            "this process has all {} descriptors that it may have: raise the limit (`ulimit -Hn`, or LimitNOFILE= of its service)",
            descriptors()
        )),
        libc::ENFILE => Some("the host has no descriptors left: raise the sysctl fs.file-max".into()),
        libc::EFBIG => Some(
            "the file may not grow further: raise the limit (`ulimit -f`, or LimitFSIZE= of its service)"
                .into(),
        ),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_soft_limit_is_the_hard_one() {
        allow_descriptors();
        let now = getrlimit(Resource::Nofile);
        assert!(
            now.current
                .is_none_or(|soft| soft >= now.maximum.unwrap_or(MOST_DESCRIPTORS).min(MOST_DESCRIPTORS))
        );
        let advice = advice(&io::Error::from_raw_os_error(libc::EMFILE)).unwrap();
        assert!(advice.contains(&descriptors().to_string()), "{advice}");
    }
}
