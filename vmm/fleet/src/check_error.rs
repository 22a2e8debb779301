//! Why a guest's pages could not be checked from the host.

use kernel_view::pagemap::PagemapError;
use memory::remote::RemoteError;
use thiserror::Error;

/// Why a guest's pages could not be read.
#[derive(Debug, Error)]
pub enum CheckError {
    /// Its page table could not.
    #[error(transparent)]
    Pagemap(#[from] PagemapError),
    /// Its memory could not.
    #[error(transparent)]
    Memory(#[from] RemoteError),
}
