//! This process and the world it was started in: its signals, limits and standard streams, its own
//! program, files that users name; and what a descriptor holds, so that its name or number cannot
//! become another's meanwhile: processes, the peers of sockets, the files of sockets.
//!
//! It imports nothing of ours; every other crate may import it, and it must not know what any of
//! them is for: no VM, no fleet, no page. Begin with [`prepare`], then [`process`] (a process by
//! its pidfd, never by its number alone) and [`print`] (printing that does not panic).

pub mod arguments;
mod calendar;
pub mod causes;
pub mod executable;
pub mod handed;
pub mod interrupt;
pub mod lease;
pub mod limits;
pub mod named_file;
mod peer;
pub mod print;
pub mod process;
pub mod replacement;
pub mod signals;
pub mod socket_file;
pub mod sync;
pub mod tap;
pub mod terminal;

pub use calendar::Moment;
pub use causes::one_line;
pub use peer::Peer;
pub use process::{Identity, Process};
pub use socket_file::{BindError, SocketFile};
pub use sync::{lock, try_lock, unpoisoned};

/// Sets what must hold before anything else is done, in every process of ours.
pub fn prepare() {
    signals::ignore_file_size();
    limits::allow_descriptors();
    executable::name_this_process();
}
