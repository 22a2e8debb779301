//! Reading the memory of another process: `process_vm_readv`.
//!
//! Read only, by copy: what is read is a private buffer that nobody else writes. Needs what ptrace reading
//! needs: the same user, or CAP_SYS_PTRACE.

#![expect(unsafe_code, reason = "process_vm_readv is a system call on raw addresses")]

use std::io;

use thiserror::Error;

/// Ranges the kernel takes in one call (UIO_MAXIOV).
pub const MAX_RANGES: usize = 1024;

/// What can go wrong while reading another process.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum RemoteError {
    /// There is no such process any more.
    #[error("process {pid} has exited")]
    Exited {
        /// Whom we tried to read.
        pid: u32,
    },
    /// We may not.
    #[error("process {pid} may not be read: it must belong to the same user, or run Samepage as root")]
    Denied {
        /// Whom we tried to read.
        pid: u32,
    },
    /// Nothing is mapped there any more.
    #[error("address {hva:#x} of process {pid} is not mapped any more")]
    Unmapped {
        /// Whom we tried to read.
        pid: u32,
        /// The first byte that could not be read, at most a page off.
        hva: u64,
    },
    /// The system call failed otherwise.
    #[error("process_vm_readv from process {pid} failed")]
    Read {
        /// Whom we tried to read.
        pid: u32,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// A range of another process's addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RemoteRange {
    /// Its first byte.
    pub hva: u64,
    /// Its length in bytes.
    pub bytes: usize,
}

/// Reads `ranges` of process `pid`, one after the other, into the start of `buffer`; returns how many bytes
/// that was, which is the sum of the ranges. More than [`MAX_RANGES`] ranges take several system calls.
///
/// # Panics
/// If `buffer` is shorter than the sum of the ranges: the caller's own arithmetic.
pub fn read(pid: u32, ranges: &[RemoteRange], buffer: &mut [u8]) -> Result<usize, RemoteError> {
    let mut filled = 0;
    for batch in ranges.chunks(MAX_RANGES) {
        let bytes = batch.iter().map(|range| range.bytes).sum::<usize>();
        read_batch(pid, batch, &mut buffer[filled..filled + bytes])?;
        filled += bytes;
    }
    Ok(filled)
}

fn read_batch(pid: u32, ranges: &[RemoteRange], buffer: &mut [u8]) -> Result<(), RemoteError> {
    let mut remote = [libc::iovec {
        iov_base: std::ptr::null_mut(),
        iov_len: 0,
    }; MAX_RANGES];
    for (slot, range) in remote.iter_mut().zip(ranges) {
        *slot = libc::iovec {
            iov_base: range.hva as *mut libc::c_void,
            iov_len: range.bytes,
        };
    }
    let local = libc::iovec {
        iov_base: buffer.as_mut_ptr().cast(),
        iov_len: buffer.len(),
    };
    // SAFETY: the kernel writes at most `local.iov_len` bytes to `local`, which is `buffer`, exclusively
    // ours for the call. The remote addresses are only interpreted in the other process, which may race;
    // an address that is not mapped there is an error, not a fault here.
    let got = unsafe {
        libc::process_vm_readv(
            pid as libc::pid_t,
            &local,
            1,
            remote.as_ptr(),
            ranges.len() as libc::c_ulong,
            0,
        )
    };
    let Ok(got) = usize::try_from(got) else {
        let source = io::Error::last_os_error();
        return Err(match source.raw_os_error() {
            Some(libc::ESRCH) => RemoteError::Exited { pid },
            Some(libc::EPERM) => RemoteError::Denied { pid },
            Some(libc::EFAULT) => RemoteError::Unmapped {
                pid,
                hva: address_after(ranges, 0),
            },
            _ => RemoteError::Read { pid, source },
        });
    };
    if got < buffer.len() {
        return Err(RemoteError::Unmapped {
            pid,
            hva: address_after(ranges, got),
        });
    }
    Ok(())
}

/// The address that byte `offset` of the concatenated ranges comes from.
fn address_after(ranges: &[RemoteRange], mut offset: usize) -> u64 {
    for range in ranges {
        if offset < range.bytes {
            return range.hva + offset as u64;
        }
        offset -= range.bytes;
    }
    0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn our_own_memory_is_read_in_pieces() {
        let data: Vec<u8> = (0..=255).cycle().take(10_000).collect();
        let base = data.as_ptr() as u64;
        let ranges = [
            RemoteRange {
                hva: base + 5_000,
                bytes: 100,
            },
            RemoteRange { hva: base, bytes: 50 },
        ];
        let mut buffer = vec![0; 200];
        assert_eq!(read(std::process::id(), &ranges, &mut buffer).unwrap(), 150);
        assert_eq!(&buffer[..100], &data[5_000..5_100]);
        assert_eq!(&buffer[100..150], &data[..50]);
    }

    #[test]
    fn more_ranges_than_one_call_takes() {
        let data: Vec<u8> = (0..3_000u32).map(|byte| byte as u8).collect();
        let ranges: Vec<_> = (0..3_000)
            .map(|at| RemoteRange {
                hva: data.as_ptr() as u64 + at,
                bytes: 1,
            })
            .collect();
        let mut buffer = vec![0; 3_000];
        read(std::process::id(), &ranges, &mut buffer).unwrap();
        assert_eq!(buffer, data);
    }

    #[test]
    fn an_unmapped_address_and_a_dead_process_are_told_apart() {
        let mut buffer = [0; 16];
        let nowhere = [RemoteRange { hva: 4096, bytes: 16 }];
        let error = read(std::process::id(), &nowhere, &mut buffer).unwrap_err();
        assert!(
            matches!(error, RemoteError::Unmapped { hva: 4096, .. }),
            "{error}"
        );
        let error = read(i32::MAX as u32, &nowhere, &mut buffer).unwrap_err();
        assert!(matches!(error, RemoteError::Exited { .. }), "{error}");
    }
}
