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
/// `/modules/order` names the files in `/modules`, one per line, in the order of loading.
pub(super) fn write(path: &Path, agent: &[u8], modules: &[Module]) -> Result<u64, ImageError> {
    let write = || -> io::Result<u64> {
        let mut cpio = Cpio::new(BufWriter::new(File::create(path)?));
        for directory in DIRECTORIES {
            cpio.directory(directory, 0o755)?;
        }
        cpio.character("dev/console", 0o600, CONSOLE)?;
        cpio.file("init", 0o755, agent)?;
        let mut order = String::new();
        for module in modules {
            let file = format!("{}.ko", module.name);
            cpio.file(&format!("modules/{file}"), 0o644, &module.bytes)?;
            order += &file;
            order.push('\n');
        }
        cpio.file("modules/order", 0o644, order.as_bytes())?;
        cpio.finish()
    };
    write().map_err(ImageError::file("write", path))
}
