//! The initramfs of an image: the agent as /init, the modules it loads, and what it mounts on.

use std::fs::File;
use std::io::{self, BufWriter};
use std::path::Path;

use super::cpio::Cpio;
use super::error::ImageError;
use super::modules::Module;

/// Directories that the agent mounts on, or that the kernel expects.
const DIRECTORIES: [&str; 7] = ["dev", "modules", "mnt", "proc", "run", "sys", "tmp"];
/// Major and minor number of /dev/console, which the kernel opens for /init before anything is
/// mounted.
const CONSOLE: (u32, u32) = (5, 1);

/// Writes the archive to `path`; returns its length in bytes.
///
/// `/modules/order` names the files in `/modules`, one per line, in the order of loading; `/modules/order.pmem` those that follow in a guest
/// with persistent memory.
pub(super) fn write(
    path: &Path,
    agent: &[u8],
    (at_boot, for_pmem): (&[Module], &[Module]),
) -> Result<u64, ImageError> {
    let write = || -> io::Result<u64> {
        let mut cpio = Cpio::new(BufWriter::new(File::create(path)?));
        for directory in DIRECTORIES {
            cpio.directory(directory, 0o755)?;
        }
        cpio.character("dev/console", 0o600, CONSOLE)?;
        cpio.file("init", 0o755, agent)?;
        for (list, modules) in [("modules/order", at_boot), ("modules/order.pmem", for_pmem)] {
            let mut order = String::new();
            for module in modules {
                let file = format!("{}.ko", module.name);
                cpio.file(&format!("modules/{file}"), 0o644, &module.bytes)?;
                order += &file;
                order.push('\n');
            }
            cpio.file(list, 0o644, order.as_bytes())?;
        }
        cpio.finish()
    };
    write().map_err(ImageError::file("write", path))
}
