//! Reading the memory of another process, through /proc/PID/mem; pages that are not shared, faster:
//! see `remote/pinned.rs`.
//!
//! Not all by process_vm_readv: it pins the pages it reads, and for a page that is shared by
//! samepage merging the kernel breaks the sharing before it pins it (measured on 6.18: reading a
//! merged guest so unmerged all but its zero pages). A read through /proc/PID/mem takes plain
//! references and leaves sharing alone.
//!
//! Read only, by copy: what is read is a private buffer that has no other writer. Needs what ptrace
//! reading needs: the same user, or CAP_SYS_PTRACE.

use std::fs::{self, File};
use std::io::ErrorKind;
use std::os::unix::fs::FileExt;

use super::Hva;

mod error;
mod pinned;

pub use error::RemoteError;

/// A range of another process's addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RemoteRange {
    /// Its first byte.
    pub hva: Hva,
    /// Its length in bytes.
    pub bytes: usize,
}

/// Another process's memory, open for reading.
#[derive(Debug)]
pub struct RemoteMemory {
    pid: u32,
    file: File,
    /// process_vm_readv is not known to be refused.
    may_pin: bool,
}

impl RemoteMemory {
    /// Opens the memory of process `pid`.
    pub fn open(pid: u32) -> Result<Self, RemoteError> {
        let file = File::open(format!("/proc/{pid}/mem")).map_err(|source| match source.kind() {
            ErrorKind::NotFound => RemoteError::Exited { pid },
            ErrorKind::PermissionDenied => RemoteError::Denied { pid },
            _ => RemoteError::Read { pid, source },
        })?;
        Ok(Self { pid, file, may_pin: proc_is_ours() })
    }

    /// Reads `ranges`, one after the other, into the start of `buffer`; returns how many bytes that
    /// was, which is the sum of the ranges.
    ///
    /// # Panics
    /// If `buffer` is shorter than the sum of the ranges: the caller's own arithmetic.
    pub fn read(&self, ranges: &[RemoteRange], buffer: &mut [u8]) -> Result<usize, RemoteError> {
        let mut filled = 0;
        for range in ranges {
            self.read_range(range.hva, &mut buffer[filled..filled + range.bytes])?;
            filled += range.bytes;
        }
        Ok(filled)
    }

    fn read_range(&self, hva: Hva, buffer: &mut [u8]) -> Result<(), RemoteError> {
        let pid = self.pid;
        let mut done = 0;
        while done < buffer.len() {
            let at = hva + done as u64;
            match self.file.read_at(&mut buffer[done..], at.0) {
                // The address space is gone with its process.
                Ok(0) => return Err(RemoteError::Exited { pid }),
                Ok(n) => done += n,
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) if e.raw_os_error() == Some(libc::EIO) => {
                    return Err(RemoteError::Unmapped { pid, hva: at });
                }
                Err(source) => return Err(RemoteError::Read { pid, source }),
            }
        }
        Ok(())
    }
}

/// Whether numbers in /proc are those that system calls take: not so if it is another pid
/// namespace's.
fn proc_is_ours() -> bool {
    fs::read_link("/proc/self").is_ok_and(|link| link.to_str() == Some(&std::process::id().to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ourselves() -> RemoteMemory {
        RemoteMemory::open(std::process::id()).unwrap()
    }

    #[test]
    fn our_own_memory_is_read_in_pieces() {
        let data: Vec<u8> = (0..=255).cycle().take(10_000).collect();
        let base = Hva::of(data.as_ptr());
        let ranges = [RemoteRange { hva: base + 5_000, bytes: 100 }, RemoteRange { hva: base, bytes: 50 }];
        let mut buffer = vec![0; 200];
        assert_eq!(ourselves().read(&ranges, &mut buffer).unwrap(), 150);
        assert_eq!(&buffer[..100], &data[5_000..5_100]);
        assert_eq!(&buffer[100..150], &data[..50]);
    }

    #[test]
    fn an_unmapped_address_and_a_dead_process_are_told_apart() {
        let mut buffer = [0; 16];
        let nowhere = [RemoteRange { hva: Hva(4096), bytes: 16 }];
        let error = ourselves().read(&nowhere, &mut buffer).unwrap_err();
        assert!(matches!(error, RemoteError::Unmapped { hva: Hva(4096), .. }), "{error}");
        let error = RemoteMemory::open(i32::MAX as u32).unwrap_err();
        assert!(matches!(error, RemoteError::Exited { .. }), "{error}");
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let memory = RemoteMemory::open(child.id()).unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
        let error = memory.read(&nowhere, &mut buffer).unwrap_err();
        assert!(matches!(error, RemoteError::Exited { .. }), "{error}");
    }
}
