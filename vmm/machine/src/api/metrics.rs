//! Metrics: one line of JSON each time they are flushed.

use std::fs::File;
use std::io::{self, Write};
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};

use super::model::Spec;
use kernel_view::own_pages::OwnPages;
use memory::PAGE_BYTES;
use os::named_file;

/// Where metrics go.
#[derive(Debug)]
pub struct MetricsFile(File);

impl MetricsFile {
    /// Opens a file, made if it is not there, or a FIFO, whose reader may come later.
    pub fn open(path: &Path) -> io::Result<Self> {
        named_file::append(path, 0o600).map(Self)
    }

    /// Appends one line.
    pub fn append(&mut self, sample: &Value) -> io::Result<()> {
        self.0.write_all(format!("{sample}\n").as_bytes())
    }
}

/// The metrics of this moment.
pub fn sample(id: &str, state: &str, uptime: Duration, spec: &Spec, balloon: Option<Value>) -> Value {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    json!({
        "utc_timestamp_ms": u64::try_from(now.as_millis()).unwrap_or(u64::MAX),
        "id": id,
        "pid": std::process::id(),
        "state": state,
        "uptime_ms": u64::try_from(uptime.as_millis()).unwrap_or(u64::MAX),
        "vcpus": spec.machine_config.vcpu_count,
        "memory_bytes": spec.machine_config.mem_size_mib << 20,
        "resident_bytes": resident_bytes(),
        "balloon": balloon,
    })
}

/// What of this process, guest RAM included, is in memory; None where /proc does not say.
fn resident_bytes() -> Option<u64> {
    OwnPages::open().ok()?.resident().ok()?.checked_mul(PAGE_BYTES)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::{self, OpenOptions};
    use std::io::Read;
    use std::os::unix::fs::OpenOptionsExt;

    #[test]
    fn samples_are_lines_at_the_end_of_a_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("metrics");
        fs::write(&path, "before\n").unwrap();
        let mut file = MetricsFile::open(&path).unwrap();
        for ms in [1, 2] {
            let spec = Spec::default();
            let sample = sample("a\"b", "Running", Duration::from_millis(ms), &spec, None);
            file.append(&sample).unwrap();
        }
        let text = fs::read_to_string(&path).unwrap();
        let lines: Vec<_> = text.lines().collect();
        assert_eq!((lines.len(), lines[0]), (3, "before"));
        let last: Value = serde_json::from_str(lines[2]).unwrap();
        assert_eq!(
            (&last["uptime_ms"], &last["id"], &last["balloon"]),
            (&json!(2), &json!("a\"b"), &json!(null))
        );
        assert!(last["resident_bytes"].as_u64().unwrap() > 1 << 20, "{last}");
    }

    #[test]
    fn what_cannot_be_opened_is_said_at_once_and_a_fifo_may_be_read_later() {
        let dir = tempfile::tempdir().unwrap();
        assert!(MetricsFile::open(dir.path()).is_err());
        let fifo = dir.path().join("fifo");
        rustix::fs::mknodat(rustix::fs::CWD, &fifo, rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
        let mut metrics = MetricsFile::open(&fifo).unwrap();
        metrics.append(&json!({"a": 1})).unwrap();
        // The reader comes later, as with firectl.
        let mut reader = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(&fifo).unwrap();
        let mut read = [0; 8];
        reader.read_exact(&mut read).unwrap();
        assert_eq!(&read, b"{\"a\":1}\n");
        for _ in 0..100 {
            let line = json!("x".repeat(4000));
            if metrics.append(&line).is_err_and(|e| e.kind() == io::ErrorKind::WouldBlock) {
                return;
            }
        }
        panic!("a full FIFO takes more and more");
    }
}
