//! A process that fills a VM's memory by userfaultfd, as Firecracker's users write them: `SOCKET
//! MEMORY_FILE HOW`.
//!
//! It listens on SOCKET, prints `listening`, takes one VM, and prints the list of regions that it
//! was told. HOW: `serve`, it fills each page that is asked for from the file, or with zeros if it
//! was given back, and prints `removed N` with every N more pages that were; `die:N`, it ends when
//! it has filled N pages; `deaf`, it answers nothing.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixListener;

use anyhow::{Context, Result, bail, ensure};
use rustix::event::{PollFd, PollFlags, poll};
use serde_json::Value;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

const PAGE: u64 = 4096;
/// `UFFDIO_COPY`, and the kernel's structures: include/uapi/linux/userfaultfd.h.
const COPY: libc::c_ulong = 0xc028_aa03;
const EVENT_PAGEFAULT: u8 = 0x12;
const EVENT_REMOVE: u8 = 0x15;

#[repr(C)]
struct Copied {
    to: u64,
    from: u64,
    bytes: u64,
    mode: u64,
    copied: i64,
}

/// A part of the VM's memory: its address there, its length, its place in the file.
struct Region(u64, u64, u64);

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [socket, memory, how] = &arguments[..] else { bail!("SOCKET MEMORY_FILE HOW") };
    let (listener, memory) = (UnixListener::bind(socket)?, File::open(memory)?);
    say("listening")?;
    let (stream, _) = listener.accept()?;
    let mut buffer = [0; 4096];
    let (bytes, descriptor) = stream.recv_with_fd(&mut buffer)?;
    let text = std::str::from_utf8(&buffer[..bytes])?;
    let mut descriptor = descriptor.context("no descriptor")?;
    say(text)?;
    let regions: Vec<Value> = serde_json::from_str(text)?;
    let number = |region: &Value, key| region[key].as_u64().with_context(|| format!("no {key}"));
    let regions = regions.iter().map(|region| {
        ensure!(region["page_size"] == PAGE && region["page_size_kib"] == PAGE, "another size of pages");
        Ok(Region(number(region, "base_host_virt_addr")?, number(region, "size")?, number(region, "offset")?))
    });
    let regions = regions.collect::<Result<Vec<_>>>()?;
    if how == "deaf" {
        // Until the VM is gone.
        let _ = (&stream).read(&mut [0]);
        return Ok(());
    }
    let most: u64 = match how.strip_prefix("die:") {
        Some(pages) => pages.parse()?,
        None => u64::MAX,
    };
    let (mut removed, mut filled, mut told) = (BTreeSet::new(), 0, 0);
    while filled < most {
        let mut wanted = [PollFd::new(&descriptor, PollFlags::IN), PollFd::new(&stream, PollFlags::IN)];
        poll(&mut wanted, None)?;
        if !wanted[1].revents().is_empty() {
            return Ok(());
        }
        let mut message = [0; 32];
        match descriptor.read(&mut message) {
            Ok(32) => {}
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => continue,
            other => bail!("no message: {other:?}"),
        }
        let word = |at: usize| u64::from_le_bytes(message[at..at + 8].try_into().unwrap_or_default());
        match message[0] {
            EVENT_PAGEFAULT => {
                let page = word(16) & !(PAGE - 1);
                let region = regions.iter().find(|region| (region.0..region.0 + region.1).contains(&page));
                let region = region.context("an address of no region")?;
                let mut bytes = vec![0; PAGE as usize];
                if !removed.contains(&page) {
                    memory.read_exact_at(&mut bytes, region.2 + (page - region.0))?;
                }
                copy(&descriptor, page, &bytes)?;
                filled += 1;
            }
            EVENT_REMOVE => {
                removed.extend((word(8)..word(16)).step_by(PAGE as usize));
                if removed.len() >= told + 256 {
                    told = removed.len();
                    say(&format!("removed {told}"))?;
                }
            }
            other => bail!("event {other:#x}"),
        }
    }
    Ok(())
}

#[expect(unsafe_code, reason = "userfaultfd is reached by ioctls")]
fn copy(descriptor: &impl AsFd, to: u64, bytes: &[u8]) -> Result<()> {
    loop {
        let from = bytes.as_ptr().expose_provenance() as u64;
        let mut copied = Copied { to, from, bytes: PAGE, mode: 0, copied: 0 };
        // SAFETY: the kernel reads a page at `from`, which has that many bytes, and writes to
        // another process.
        let done = unsafe { libc::ioctl(descriptor.as_fd().as_raw_fd(), COPY, &mut copied) };
        match std::io::Error::last_os_error().raw_os_error() {
            _ if done == 0 => return Ok(()),
            // Two threads touched it.
            Some(libc::EEXIST) => return Ok(()),
            // Something is being given back: that message comes first, and the page is asked for
            // again.
            Some(libc::EAGAIN) => std::thread::yield_now(),
            _ => bail!("UFFDIO_COPY: {}", std::io::Error::last_os_error()),
        }
        // The event is in the queue; a thread that waits for this page asks again once it is woken.
        if copied.copied == -i64::from(libc::EAGAIN) {
            return wake(descriptor, to);
        }
    }
}

#[expect(unsafe_code, reason = "userfaultfd is reached by ioctls")]
fn wake(descriptor: &impl AsFd, page: u64) -> Result<()> {
    const WAKE: libc::c_ulong = 0x8010_aa02;
    let mut range = [page, PAGE];
    // SAFETY: the kernel reads two words.
    match unsafe { libc::ioctl(descriptor.as_fd().as_raw_fd(), WAKE, &mut range) } {
        0 => Ok(()),
        _ => bail!("UFFDIO_WAKE: {}", std::io::Error::last_os_error()),
    }
}

fn say(line: &str) -> Result<()> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{line}")?;
    Ok(out.flush()?)
}
