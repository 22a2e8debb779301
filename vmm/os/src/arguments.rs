//! The arguments that lists of processes show of this one.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;

/// In `/proc/PID/stat`, counted from 1: where the arguments begin, and where they end.
const ARGUMENTS_BEGIN: usize = 48;
const ARGUMENTS_END: usize = 49;

/// Has `/proc/PID/cmdline` show `arguments` behind the program's name, where those are that this process
/// was started with; what is left of their room is zeros. This process's own view of its arguments is
/// not to be relied on afterwards.
///
/// # Errors
/// There is no room for them, or no `/proc`.
pub fn show(arguments: &[OsString]) -> io::Result<()> {
    let stat = fs::read_to_string("/proc/self/stat")?;
    let (begin, end) = room(&stat).ok_or(io::ErrorKind::InvalidData)?;
    let program = std::env::args_os().next().unwrap_or_default();
    let text = text(&program, arguments, end.saturating_sub(begin))?;
    File::options().write(true).open("/proc/self/mem")?.write_all_at(&text, begin)
}

fn room(stat: &str) -> Option<(u64, u64)> {
    // The name before it may hold anything but the last parenthesis; the state after it is field 3.
    let (_, rest) = stat.rsplit_once(')')?;
    let field = |number: usize| rest.split_whitespace().nth(number - 3)?.parse().ok();
    Some((field(ARGUMENTS_BEGIN)?, field(ARGUMENTS_END)?))
}

fn text(program: &OsStr, arguments: &[OsString], room: u64) -> io::Result<Vec<u8>> {
    let mut text = Vec::new();
    for argument in std::iter::once(program).chain(arguments.iter().map(OsString::as_os_str)) {
        text.extend(argument.as_bytes());
        text.push(0);
    }
    if text.len() as u64 > room {
        let why = format!("the arguments have {} bytes, and there is room for {room}", text.len());
        return Err(io::Error::new(io::ErrorKind::InvalidInput, why));
    }
    text.resize(usize::try_from(room).map_err(io::Error::other)?, 0);
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_says_where_the_arguments_are() {
        let stat = fs::read_to_string("/proc/self/stat").unwrap();
        let (begin, end) = room(&stat).unwrap();
        let shown = fs::read("/proc/self/cmdline").unwrap();
        assert_eq!(end - begin, shown.len() as u64);
        let mut there = vec![0; shown.len()];
        File::open("/proc/self/mem").unwrap().read_exact_at(&mut there, begin).unwrap();
        assert_eq!(there, shown);
    }

    #[test]
    fn what_does_not_fit_is_not_shown_in_part() {
        let arguments = ["run", "--name", "a"].map(OsString::from);
        assert_eq!(text(OsStr::new("p"), &arguments, 18).unwrap(), b"p\0run\0--name\0a\0\0\0\0");
        let error = text(OsStr::new("p"), &arguments, 14).unwrap_err().to_string();
        assert_eq!(error, "the arguments have 15 bytes, and there is room for 14");
    }
}
