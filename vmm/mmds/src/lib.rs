//! The metadata service of one VM (Firecracker's MMDS): JSON that the host puts there, and that
//! programs in the guest read by HTTP at a link-local address, through the VM's own network
//! interface.
//!
//! It knows frames and a TAP ([`devices::virtio::net::Tap`]); no KVM, no API. Begin with
//! [`detour`], which takes the frames for the service out of those that the guest sends; behind it
//! are `stack` (TCP/IP by smoltcp), `service` (what is answered), [`store`] and `token`.
//!
//! Everything that comes from the guest is bounded: connections, bytes of a request, frames that
//! wait, and how long a connection may take.

pub mod detour;
mod format;
mod service;
mod stack;
pub mod store;
mod token;

use std::net::Ipv4Addr;

use serde::{Deserialize, Serialize};

pub use detour::Detour;
pub use store::{Store, StoreError};

/// Where the service is unless something else is said.
pub const ADDRESS: Ipv4Addr = Ipv4Addr::new(169, 254, 169, 254);
/// The most bytes of JSON in a store, unless something else is said.
pub const SIZE_LIMIT: usize = 51_200;

/// How the guest has to ask.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Version {
    /// By `GET`.
    #[default]
    V1,
    /// By `GET` with a token, which it gets by `PUT /latest/api/token`.
    V2,
}

/// What the service is to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Config {
    pub version: Version,
    /// A link-local one: see [`is_possible`].
    pub address: Ipv4Addr,
    /// Answer as EC2's service does, whatever `Accept` says.
    pub imds_compat: bool,
}

/// Whether the service can be at this address: one for hosts in 169.254.0.0/16 (RFC 3927, section 2.1).
pub fn is_possible(address: Ipv4Addr) -> bool {
    address.is_link_local() && !matches!(address.octets()[2], 0 | 255)
}
