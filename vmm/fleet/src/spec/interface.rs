//! A network interface as a fleet file gives it.

use std::str::FromStr;

use devices::rate_limiter::Limits;
use serde::{Deserialize, Serialize};

use machine::{AUTO, Interface, InterfaceError};

/// An interface of a guest: `eth0` is the first.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(
    deny_unknown_fields,
    expecting = "{ tap = \"tap0\" } or { tap = \"auto\" }, with mac, mtu, bridge, rx_rate_limiter, tx_rate_limiter"
)]
pub struct NetSpec {
    /// A TAP's name, in which `{n}` is the guest's number, or `auto`.
    pub tap: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bridge: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mac: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtu: Option<u16>,
    #[serde(default, skip_serializing_if = "Limits::is_none")]
    pub rx_rate_limiter: Limits,
    #[serde(default, skip_serializing_if = "Limits::is_none")]
    pub tx_rate_limiter: Limits,
}

impl NetSpec {
    /// One that is as `interface` is, but for its address.
    pub(super) fn like(interface: &Interface) -> Self {
        Self {
            tap: interface.tap.clone().unwrap_or_else(|| AUTO.into()),
            bridge: interface.bridge.clone(),
            mac: None,
            mtu: interface.mtu,
            rx_rate_limiter: interface.rx_rate_limiter,
            tx_rate_limiter: interface.tx_rate_limiter,
        }
    }
}

/// Reads what `samepage run --net` takes; `{n}` in a TAP's name is a number.
impl FromStr for NetSpec {
    type Err = InterfaceError;

    fn from_str(text: &str) -> Result<Self, InterfaceError> {
        let interface: Interface = text.parse()?;
        Ok(Self { mac: interface.mac.map(|mac| mac.to_string()), ..Self::like(&interface) })
    }
}
