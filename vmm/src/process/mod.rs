//! This process and the world it was started in: its signals, limits and standard streams, its own program, and files that users name.
//!
//! It imports nothing of ours; every other module may import it.

pub mod executable;
pub mod interrupt;
pub mod limits;
pub mod named_file;
pub mod print;
pub mod signals;
pub mod terminal;

/// What must hold before anything else is done, in every process of ours.
pub fn prepare() {
    signals::ignore_file_size();
    limits::allow_descriptors();
    executable::name_this_process();
}
