//! How memory is scanned.

use kernel_view::meminfo::Meminfo;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// Threads that read and hash.
    pub threads: usize,
    /// Memory that the index may take, in bytes.
    pub index_limit_bytes: u64,
    /// Contents to remember for a closer look.
    pub sample_contents: usize,
    /// Pages to look at a second time, of memory that is written meanwhile.
    pub second_look_pages: u64,
}

impl Default for Options {
    /// As many threads as processors, a quarter of the memory that is available for the index, no
    /// samples.
    fn default() -> Self {
        Self {
            threads: std::thread::available_parallelism().map_or(1, usize::from),
            index_limit_bytes: available_bytes() / 4,
            sample_contents: 0,
            second_look_pages: 0,
        }
    }
}

/// Memory available without swapping, as the kernel estimates it; 1 GiB where it does not say.
fn available_bytes() -> u64 {
    Meminfo::read().ok().and_then(|meminfo| meminfo.bytes("MemAvailable")).unwrap_or(1 << 30)
}
