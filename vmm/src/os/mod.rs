//! What belongs to the kernel and is held by a descriptor, so that it cannot become another's meanwhile: processes, the peers of
//! sockets, the files of sockets.

mod peer;
pub mod process;
pub mod socket_file;

pub use peer::Peer;
pub use process::{Identity, Process};
pub use socket_file::{BindError, SocketFile};
