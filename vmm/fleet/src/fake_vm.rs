//! For tests: what answers at a control socket as a VM would.

use std::os::unix::net::UnixListener;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use super::spec::Reservation;
use super::vm_handle::VmHandle;
use wire::Lines;

/// What one says of itself that is paused.
pub const STATUS: &str = r#"{"status":{"name":"a","pid":1,"paused":true,"vcpus":1,"memory_bytes":4096,"backend":"","extents":[]}}"#;
/// The same of one that runs.
pub const RUNS: &str = r#"{"status":{"name":"a","pid":1,"paused":false,"vcpus":1,"memory_bytes":4096,"backend":"","extents":[]}}"#;

/// The handle of a guest whose socket is in `dir`, and whose process is `pid`.
pub fn handle(dir: &Path, guest: &str, pid: u32) -> VmHandle {
    let reservation = Reservation { shares: 1, min_bytes: 0, max_bytes: 4096, priority: 0 };
    VmHandle { guest: guest.into(), pid, socket: dir.join(guest), memory_bytes: 4096, reservation }
}

/// Answers the clients of `listener`, with what `answer` has for the operation that is asked for.
pub fn serve(listener: UnixListener, answer: impl Fn(&str) -> String + Send + 'static) {
    thread::spawn(move || {
        while let Ok((stream, _)) = listener.accept() {
            let (mut client, until) = (Lines::new(stream, 4096), Instant::now() + Duration::from_secs(60));
            let Ok(line) = client.receive(until) else { continue };
            let request: serde_json::Value = serde_json::from_slice(&line).unwrap();
            let _ = client.send(answer(request["op"].as_str().unwrap()).into_bytes(), until);
        }
    });
}

/// A guest of this process whose VM answers so.
pub fn vm(dir: &Path, guest: &str, answer: impl Fn(&str) -> String + Send + 'static) -> VmHandle {
    let handle = handle(dir, guest, std::process::id());
    serve(UnixListener::bind(&handle.socket).unwrap(), answer);
    handle
}
