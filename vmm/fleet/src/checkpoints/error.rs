//! What can go wrong with checkpoints.

use std::io;
use std::path::PathBuf;

use store::StoreError;
use thiserror::Error;

/// Why a checkpoint was not saved, read or used. The guest that was captured runs on; what was there before is there still.
#[derive(Debug, Error)]
pub enum CheckpointError {
    /// The store.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// There is no place for stores.
    #[error("there is no directory for checkpoints: set SAMEPAGE_STORE_DIR, XDG_DATA_HOME or HOME")]
    NoDirectory,
    /// The directory of stores cannot be used.
    #[error("cannot {what} {path}", path = path.display())]
    Directory {
        /// What was being done.
        what: &'static str,
        /// Which.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// What was written to overlays is not kept.
    #[error(
        "{name:?} is not saved: its guest has drives with overlays, and what it wrote there would not be in the checkpoint; expected \
         read_only drives, or none (in memory, without --disk, it can be captured)"
    )]
    Overlays {
        /// What was to be saved.
        name: String,
    },
    /// It is in no store.
    #[error("there is no checkpoint {name:?}; there is: {known}")]
    Missing {
        /// Which was meant.
        name: String,
        /// Which there are.
        known: String,
    },
    /// It is in several.
    #[error("there is a checkpoint {name:?} in the domains {domains}: say which with --domain")]
    WhichDomain {
        /// Which was meant.
        name: String,
        /// Where it is.
        domains: String,
    },
    /// What it says of itself cannot be read.
    #[error("what checkpoint {name:?} says of itself cannot be used: {why}")]
    Description {
        /// Which.
        name: String,
        /// What is wrong with it.
        why: String,
    },
    /// It is not possible.
    #[error("checkpoint {name:?} cannot be used: {why}")]
    Unfit {
        /// Which.
        name: String,
        /// What is wrong with it.
        why: String,
    },
    /// A drive is not the file that it was.
    #[error(
        "checkpoint {name:?} has the drive {path}, which is not the file that it was: {why}; a guest would find other data than it has read",
        path = path.display()
    )]
    Drive {
        /// Which.
        name: String,
        /// The drive.
        path: PathBuf,
        /// In what it differs.
        why: String,
    },
    /// Memory or state of an image cannot be read or made.
    #[error("the memory of {name:?} cannot be {what}")]
    Memory {
        /// The checkpoint.
        name: String,
        /// What was being done with it.
        what: &'static str,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// A fleet of other domains has one engine for all.
    #[error(
        "checkpoint {name:?} is of domain {domain}, and engine \"ksm\" cannot keep it apart from the guests of this fleet: use engine \"slab\" or \"off\""
    )]
    Domain {
        /// Which.
        name: String,
        /// Its domain.
        domain: String,
    },
    /// The file says otherwise.
    #[error(
        "guest {guest} was saved by `fleet down --save`, and the fleet file says otherwise: {differences}. Put the file back as it was; or \
         `samepage snapshot rm {checkpoint}`, and it boots anew"
    )]
    Changed {
        /// Whose.
        guest: String,
        /// In what.
        differences: String,
        /// What it would go on from.
        checkpoint: String,
    },
}
