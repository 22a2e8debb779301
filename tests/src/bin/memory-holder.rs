//! A process with memory in the shapes in which VMMs have it, for tests of what is taken for a
//! guest's.
//!
//! Each argument is a mapping, `KIND:MIB:TOUCHED[:PATH]`: its size, and the part of it that is
//! written, page after page, each with a number that no other page of the process has. Kinds:
//! `anon`; `memfd`, shared; `again`, the memfd before mapped once more; `shared` and `private`, of
//! the file PATH, which is made; `code`, anonymous and executable. When all is there it prints a
//! line for each with its addresses, and `ready`; and ends with its standard input.

use std::fs::File;
use std::io::{Read, Write};

use anyhow::{Context, Result, bail};
use rustix::fd::{AsFd, OwnedFd};
use rustix::fs::MemfdFlags;
use rustix::mm::{MapFlags, ProtFlags, mmap, mmap_anonymous};

const MIB: usize = 1 << 20;
const PAGE: usize = 4096;
/// Addresses before and behind each mapping that are nothing.
const APART: usize = 4 * MIB;

#[expect(unsafe_code, reason = "mapping memory, and writing where it was mapped")]
fn main() -> Result<()> {
    let (mut number, mut last): (u64, Option<OwnedFd>) = (1, None);
    let mut lines = String::new();
    for argument in std::env::args().skip(1) {
        let mut fields = argument.split(':');
        let mut next = || fields.next().with_context(|| format!("KIND:MIB:TOUCHED[:PATH], not {argument}"));
        let (kind, bytes) = (next()?.to_owned(), next()?.parse::<usize>()? * MIB);
        let touched = next()?.parse::<usize>()? * MIB;
        let file = match kind.as_str() {
            "memfd" => {
                let file = rustix::fs::memfd_create("ram", MemfdFlags::CLOEXEC)?;
                rustix::fs::ftruncate(&file, bytes as u64)?;
                Some(file)
            }
            "again" => Some(last.take().context("again needs a memfd before it")?),
            "shared" | "private" => {
                let file =
                    File::options().read(true).write(true).create(true).truncate(false).open(next()?)?;
                file.set_len(bytes as u64)?;
                Some(file.into())
            }
            "anon" | "code" => None,
            other => bail!("{other} is no kind of memory"),
        };
        let protection = match kind.as_str() {
            "code" => ProtFlags::READ | ProtFlags::WRITE | ProtFlags::EXEC,
            _ => ProtFlags::READ | ProtFlags::WRITE,
        };
        let flags = match kind.as_str() {
            "memfd" | "again" | "shared" => MapFlags::SHARED,
            _ => MapFlags::PRIVATE,
        };
        let flags = flags | MapFlags::NORESERVE | MapFlags::FIXED;
        // Apart from each other: the kernel joins neighbours of one kind.
        // SAFETY: a new mapping, away from all others.
        let start = unsafe {
            let hole = mmap_anonymous(
                std::ptr::null_mut(),
                bytes + 2 * APART,
                ProtFlags::empty(),
                MapFlags::PRIVATE,
            )?;
            hole.byte_add(APART)
        };
        // SAFETY: inside the mapping that was just made, which nothing else uses.
        let start = unsafe {
            match &file {
                Some(file) => mmap(start, bytes, protection, flags, file.as_fd(), 0)?,
                None => mmap_anonymous(start, bytes, protection, flags)?,
            }
        };
        for at in (0..touched).step_by(PAGE) {
            // SAFETY: inside the mapping, which only this thread knows.
            unsafe { start.byte_add(at).cast::<u64>().write_volatile(number) };
            number += 1;
        }
        let start = start.addr();
        lines.push_str(&format!("{kind} {start:x}-{:x}\n", start + bytes));
        last = file;
    }
    println!("{lines}ready");
    std::io::stdout().flush()?;
    // The parent has gone, or closed the pipe.
    let _ = std::io::stdin().read(&mut [0]);
    Ok(())
}
