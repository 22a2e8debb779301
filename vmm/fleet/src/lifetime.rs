//! How VM processes live: how long, and how they stand with the out-of-memory killer.

/// How much sooner the kernel's out-of-memory killer takes a guest's VM than other processes of its size.
pub(crate) const OOM_SCORE_ADJ: i16 = 300;

/// What keeps VM processes alive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lifetime {
    /// They end when this process does, however it ends.
    WithUs,
    /// They run on; a later daemon takes them over.
    TheirOwn,
}
