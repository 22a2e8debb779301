//! The host's memory in the blocks that it can take offline.
//!
//! Source: the kernel's Documentation/admin-guide/mm/memory-hotplug.rst.

use std::fs;
use std::io;
use std::path::Path;

const BLOCKS: &str = "/sys/devices/system/memory";

/// Blocks of one size.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MemoryBlocks {
    /// Size of each in bytes.
    pub bytes: u64,
    /// How many are online.
    pub online: u64,
}

impl MemoryBlocks {
    /// As they are now. An error where the kernel has no memory hotplug (`CONFIG_MEMORY_HOTPLUG`).
    pub fn read() -> io::Result<Self> {
        Self::read_in(Path::new(BLOCKS))
    }

    fn read_in(dir: &Path) -> io::Result<Self> {
        let size = fs::read_to_string(dir.join("block_size_bytes"))?;
        let bytes = u64::from_str_radix(size.trim(), 16).map_err(io::Error::other)?;
        let is_online = |name: &str| {
            let number = name.strip_prefix("memory")?.parse::<u32>().ok()?;
            let state = fs::read_to_string(dir.join(format!("memory{number}/state"))).ok()?;
            (state.trim() == "online").then_some(())
        };
        let online = fs::read_dir(dir)?.flatten().filter_map(|entry| is_online(entry.file_name().to_str()?));
        Ok(Self { bytes, online: online.count() as u64 })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_that_are_offline_do_not_count() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("block_size_bytes"), "8000000\n").unwrap();
        for (block, state) in
            [("memory0", "online"), ("memory1", "offline"), ("memory32", "online"), ("memoryx", "online")]
        {
            fs::create_dir(dir.path().join(block)).unwrap();
            fs::write(dir.path().join(block).join("state"), format!("{state}\n")).unwrap();
        }
        let blocks = MemoryBlocks::read_in(dir.path()).unwrap();
        assert_eq!(blocks, MemoryBlocks { bytes: 128 << 20, online: 2 });
        assert!(MemoryBlocks::read_in(&dir.path().join("none")).is_err());
    }
}
