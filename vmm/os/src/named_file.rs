//! Files that users name. Opening one never waits: a FIFO or a serial line would, for another end
//! that may never come, and where signals have handlers nothing ends a wait in open(2).

use std::fs::{File, FileType, Metadata, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::io::Errno;

/// The longest text that is read: far more than any file of ours.
const MAX_TEXT_BYTES: u64 = 64 << 20;
/// Neither wait nor get a controlling terminal.
const FLAGS: i32 = libc::O_NONBLOCK | libc::O_NOCTTY;

/// Opens a file of any kind for reading.
///
/// # Errors
///
/// It cannot be opened.
pub fn any(path: &Path) -> io::Result<(File, Metadata)> {
    let file = OpenOptions::new().read(true).custom_flags(FLAGS).open(path)?;
    let meta = file.metadata()?;
    Ok((file, meta))
}

/// Opens a regular file for reading.
///
/// # Errors
/// It cannot be opened, or is a directory, a FIFO, a device, a socket.
pub fn regular(path: &Path) -> io::Result<(File, Metadata)> {
    let (file, meta) = any(path)?;
    match meta.is_file() {
        true => Ok((file, meta)),
        false => Err(not_regular(meta.file_type())),
    }
}

/// The bytes of a regular file.
///
/// # Errors
/// As [`regular`], or it cannot be read.
pub fn read(path: &Path) -> io::Result<Vec<u8>> {
    let (mut file, _) = regular(path)?;
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// The text in a regular file that is read more than once.
///
/// # Errors
///
/// As [`read`], or it is not UTF-8.
pub fn read_regular_text(path: &Path) -> io::Result<String> {
    String::from_utf8(read(path)?).map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e.utf8_error()))
}

/// Opens a file for reading, or a pipe, so that `<(command)` and /dev/stdin can be given. For a
/// FIFO it waits until another process writes, as reading then does: a signal without a handler
/// ends that. So this is for files that are read before handlers are installed.
///
/// # Errors
/// It cannot be opened, or is a directory.
pub fn stream(path: &Path) -> io::Result<File> {
    let file = OpenOptions::new().read(true).custom_flags(FLAGS).open(path)?;
    if file.metadata()?.is_dir() {
        return Err(not_regular(file.metadata()?.file_type()));
    }
    // A FIFO opened this way is at its end until a process writes to it.
    while !is_regular(&file) && poll(&mut [PollFd::new(&file, PollFlags::IN)], None) == Err(Errno::INTR) {}
    wait_from_now_on(&file)?;
    Ok(file)
}

/// The text in what [`stream`] opens.
///
/// # Errors
/// As there, or it is not UTF-8, or longer than any text of ours.
pub fn read_text(path: &Path) -> io::Result<String> {
    let mut text = String::new();
    stream(path)?.take(MAX_TEXT_BYTES + 1).read_to_string(&mut text)?;
    match text.len() as u64 > MAX_TEXT_BYTES {
        true => Err(io::Error::new(
            io::ErrorKind::FileTooLarge,
            format!("it is longer than {MAX_TEXT_BYTES} bytes"),
        )),
        false => Ok(text),
    }
}

/// Opens a file to write at its end, made with this mode (less the umask) if it is not there. A
/// FIFO is opened for reading as well, as in Firecracker: so opening succeeds though no process
/// reads yet, and writing goes on when one has gone. Writing never waits: `WouldBlock` where a FIFO
/// or a terminal has no room.
///
/// # Errors
/// It cannot be opened.
pub fn append(path: &Path, mode: u32) -> io::Result<File> {
    let mut how = OpenOptions::new();
    how.create(true).append(true).mode(mode).custom_flags(FLAGS);
    match how.open(path) {
        Ok(file) if !file.metadata()?.file_type().is_fifo() => Ok(file),
        Ok(_) => how.read(true).open(path),
        Err(e) if e.raw_os_error() == Some(libc::ENXIO) => how.read(true).open(path),
        Err(e) => Err(e),
    }
}

/// Opens a regular file that is read and then written at its end, made if it is not there.
///
/// # Errors
/// As [`regular`].
pub fn journal(path: &Path) -> io::Result<File> {
    let file = OpenOptions::new().read(true).append(true).create(true).custom_flags(FLAGS).open(path)?;
    let kind = file.metadata()?.file_type();
    if kind.is_file() { Ok(file) } else { Err(not_regular(kind)) }
}

/// Opens a file that is to be written later, made if it is not there, and left as it is.
///
/// # Errors
/// It cannot be written, or is a FIFO that nothing reads.
pub fn writable(path: &Path) -> io::Result<File> {
    OpenOptions::new().create(true).append(true).custom_flags(FLAGS).open(path).map_err(no_reader)
}

/// Makes a file, or empties it.
///
/// # Errors
/// As [`writable`].
pub fn create(path: &Path) -> io::Result<File> {
    let file = OpenOptions::new().create(true).write(true).truncate(true).custom_flags(FLAGS).open(path);
    let file = file.map_err(no_reader)?;
    wait_from_now_on(&file)?;
    Ok(file)
}

/// Writes a file anew.
///
/// # Errors
/// As [`create`], or it cannot be written.
pub fn write(path: &Path, bytes: &[u8]) -> io::Result<()> {
    create(path)?.write_all(bytes)
}

fn is_regular(file: &File) -> bool {
    file.metadata().is_ok_and(|meta| meta.is_file())
}

/// Reading and writing may wait: a signal ends that.
fn wait_from_now_on(file: &File) -> io::Result<()> {
    let flags = fcntl_getfl(file)?;
    Ok(fcntl_setfl(file, flags - OFlags::NONBLOCK)?)
}

fn no_reader(error: io::Error) -> io::Error {
    match error.raw_os_error() {
        Some(libc::ENXIO) => {
            io::Error::new(error.kind(), "it is a FIFO that no process reads; start its reader first")
        }
        _ => error,
    }
}

fn not_regular(kind: FileType) -> io::Error {
    let what = match () {
        () if kind.is_dir() => "a directory",
        () if kind.is_fifo() => "a FIFO",
        () if kind.is_char_device() || kind.is_block_device() => "a device",
        () if kind.is_socket() => "a socket",
        () => "something else",
    };
    io::Error::new(io::ErrorKind::InvalidInput, format!("it is {what}: expected a regular file"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::{CWD, mknodat};
    use std::path::PathBuf;
    use std::thread;

    fn fifo(dir: &tempfile::TempDir) -> PathBuf {
        let path = dir.path().join("fifo");
        mknodat(CWD, &path, rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
        path
    }

    #[test]
    fn what_is_no_regular_file_is_named_and_not_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        for (path, what) in
            [(fifo(&dir), "a FIFO"), (dir.path().into(), "a directory"), ("/dev/null".into(), "a device")]
        {
            let error = regular(&path).unwrap_err().to_string();
            assert!(error.contains(what), "{error}");
        }
        let path = dir.path().join("file");
        std::fs::write(&path, "text").unwrap();
        assert_eq!((regular(&path).unwrap().1.len(), read_text(&path).unwrap()), (4, "text".into()));
        assert_eq!(read(&path).unwrap(), b"text");
    }

    #[test]
    fn a_text_comes_through_a_pipe_as_well() {
        let dir = tempfile::tempdir().unwrap();
        let path = fifo(&dir);
        let its = path.clone();
        let writing = thread::spawn(move || std::fs::write(its, "long ".repeat(100_000)).unwrap());
        assert_eq!(read_text(&path).unwrap().len(), 500_000);
        writing.join().unwrap();
        assert!(read_text(Path::new("/dev/zero")).is_err());
    }

    #[test]
    fn a_log_is_written_whether_its_fifo_is_read_or_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = fifo(&dir);
        let error = writable(&path).unwrap_err().to_string();
        assert!(error.contains("no process reads"), "{error}");
        let mut log = append(&path, 0o600).unwrap();
        log.write_all(b"before\n").unwrap();
        let mut reader = OpenOptions::new().read(true).open(&path).unwrap();
        let mut line = [0; 7];
        reader.read_exact(&mut line).unwrap();
        assert_eq!(&line, b"before\n");
        drop(reader);
        log.write_all(b"nobody\n").unwrap();
        let full = (0..100_000).find_map(|_| log.write_all(&[b'x'; 4096]).err()).unwrap();
        assert_eq!(full.kind(), io::ErrorKind::WouldBlock);
    }
}
