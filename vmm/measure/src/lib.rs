//! Measuring memory from outside: what could be shared, which pages map which frame, and the
//! reports of both.
//!
//! It works on any process whose guest memory is known, and on files. It must not stop or change
//! what it measures, unless asked to ([`freeze`]): reading by pinning would undo what KSM has
//! shared. The numbers of a running guest are those of a moment that lasts as long as the reading.
//!
//! Begin with [`scan`] (every page read once, known by its tag from then on), then [`frames`] (each
//! page in one class by its frame), [`source`] (what can be read, and which memory of a process is
//! a guest's) and [`report`]. `resources/docs/internals/measuring.md` says why tags suffice.

pub mod audit;
pub mod beyond;
pub mod by_kind;
pub mod content;
mod delta;
mod error;
pub mod findings;
pub mod frames;
pub mod freeze;
pub mod html;
mod index;
mod limits;
mod marks;
mod numbering;
mod options;
mod ordered_queue;
pub mod page_types;
mod reducer;
pub mod report;
pub mod rolling;
pub mod runs;
pub mod sample;
pub mod scan;
mod sets;
mod slab_runs;
pub mod source;
mod space;
pub mod tag;
pub mod volatile;
mod walks;
pub mod watch;

pub use error::MeasureError;
pub use limits::MAX_SPACES;
pub use memory::{Extent, PAGE};
pub use space::Space;
pub(crate) use space::check;
