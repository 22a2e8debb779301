//! What this kernel uses its frames for: `/proc/kpageflags`, as runs of frames of one type.

use guest::page_type::PageType;
use guest::protocol::{Done, ErrorCode, FrameRuns, Frames, Reply, Text};

use crate::sys::{Access, ENOENT, Errno, Fd};

/// Frames looked at for one reply: 1 GiB, some tens of milliseconds.
const MAX_FRAMES: u64 = 1 << 18;

/// Bytes of an entry.
const ENTRY: usize = 8;

/// Fills a reply with runs of frames.
pub(crate) fn obey(from: u64) -> Reply {
    let (code, message) = match read(from) {
        Ok(frames) => return Reply::Ok(Done::Frames(frames)),
        Err(ENOENT) => (
            ErrorCode::Unsupported,
            Text::of("no /proc/kpageflags: this kernel is built without CONFIG_PROC_PAGE_MONITOR"),
        ),
        Err(error) => (ErrorCode::Failed, Text::of(format_args!("/proc/kpageflags: {error}"))),
    };
    Reply::Err { code, message }
}

fn read(from: u64) -> Result<Frames, Errno> {
    let file = Fd::open(c"/proc/kpageflags", Access::Read)?;
    let frames = read_runs(file, from);
    file.close();
    frames
}

fn read_runs(file: Fd, from: u64) -> Result<Frames, Errno> {
    let mut frames = Frames { next: from, runs: FrameRuns::new() };
    let mut buffer = [0; 512 * ENTRY];
    while frames.next - from < MAX_FRAMES {
        let len = file.read_at(&mut buffer, frames.next.saturating_mul(ENTRY as u64))?;
        let (entries, _) = buffer[..len].as_chunks::<ENTRY>();
        for entry in entries {
            if !frames.runs.push(PageType::from_flags(u64::from_ne_bytes(*entry))) {
                return Ok(frames);
            }
            frames.next += 1;
        }
        if entries.is_empty() {
            break;
        }
    }
    Ok(frames)
}
