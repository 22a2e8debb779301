//! Network interfaces: TAPs of the host's that a guest is on. Taken, or made, before the guest
//! runs.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::str::FromStr;

use devices::rate_limiter::{Limiter, Limits};
use devices::virtio::net::{self, Limiters, Mac, MacError, Offload};
use mmds::Detour;
use os::print::errln;
use os::tap::{self, Tap, TapError};
use serde::{Deserialize, Serialize};
use thiserror::Error;

/// The most interfaces of one VM.
pub const MAX_INTERFACES: usize = 4;
/// What stands for a TAP that is made for the VM, instead of a name.
pub const AUTO: &str = "auto";
/// The least MTU: IPv4's.
pub const MIN_MTU: u16 = 68;

/// An interface of a guest's, `eth0` and so on in the order given.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Interface {
    /// The TAP's name on the host; None: one is made, and is gone with the VM.
    #[serde(default)]
    pub tap: Option<String>,
    /// The bridge that a TAP is put on that is made.
    #[serde(default)]
    pub bridge: Option<String>,
    /// Its address; None: any that is administered locally.
    #[serde(default)]
    pub mac: Option<Mac>,
    /// The longest packet that the guest may send; None: 1500, if the guest does not decide
    /// otherwise.
    #[serde(default)]
    pub mtu: Option<u16>,
    /// What may be sent to it.
    #[serde(default, skip_serializing_if = "Limits::is_none")]
    pub rx_rate_limiter: Limits,
    /// What it may send.
    #[serde(default, skip_serializing_if = "Limits::is_none")]
    pub tx_rate_limiter: Limits,
}

/// Why a guest cannot have an interface.
#[derive(Debug, Error)]
pub enum InterfaceError {
    /// There are too many.
    #[error("{asked} network interfaces are not possible: expected at most {MAX_INTERFACES}")]
    TooMany { asked: usize },
    /// Its TAP is not to be had.
    #[error(transparent)]
    Tap(#[from] TapError),
    /// Its address is none.
    #[error(transparent)]
    Mac(#[from] MacError),
    /// Its MTU is none.
    #[error("an MTU of {0:?} is not possible: expected a number from {MIN_MTU} to {max}", max = u16::MAX)]
    Mtu(String),
    /// An option that there is not.
    #[error(
        "{0:?} is no option of a network interface: expected mac=ADDRESS, mtu=BYTES or, after auto, bridge=NAME"
    )]
    Option(String),
    /// A bridge is for TAPs that are made.
    #[error(
        "the TAP {0} is there already, so put it on a bridge yourself (`ip link set {0} master BRIDGE`): bridge= is for auto"
    )]
    Bridge(String),
    /// Its metadata service is not to be had.
    #[error("the metadata service cannot be made")]
    Mmds(#[source] io::Error),
    /// No random number for an address.
    #[error("no MAC address can be made up: {0}")]
    Random(String),
}

impl Interface {
    /// Whether it could be one, as far as can be said without the host's network.
    ///
    /// # Errors
    /// It could not.
    pub fn check(&self) -> Result<(), InterfaceError> {
        match (&self.tap, &self.bridge) {
            (Some(tap), Some(_)) => return Err(InterfaceError::Bridge(tap.clone())),
            (Some(name), None) | (None, Some(name)) => tap::check_name(name)?,
            (None, None) => {}
        }
        match self.mtu {
            Some(mtu) if mtu < MIN_MTU => Err(InterfaceError::Mtu(mtu.to_string())),
            _ => Ok(()),
        }
    }

    /// As [`Self::check`], and whether its TAP or its bridge is there now.
    ///
    /// # Errors
    /// It is not.
    pub fn look(&self) -> Result<(), InterfaceError> {
        self.check()?;
        self.tap.iter().chain(&self.bridge).try_for_each(|name| Ok(tap::look(name)?))
    }

    /// Takes or makes its TAP.
    fn open(&self) -> Result<(net::Config, Tap), InterfaceError> {
        self.check()?;
        let tap = match &self.tap {
            Some(name) => Tap::open(name)?,
            None => Tap::make(self.mtu, self.bridge.as_deref())?,
        };
        if !tap.is_up() {
            errln!("note: the TAP {0} is down, so nothing passes: `ip link set {0} up`", tap.name());
        }
        let mac = self.mac.map_or_else(any_mac, Ok)?;
        Ok((net::Config { mac, mtu: self.mtu }, tap))
    }
}

fn any_mac() -> Result<Mac, InterfaceError> {
    let mut bytes = [0; 6];
    getrandom::fill(&mut bytes).map_err(|error| InterfaceError::Random(error.to_string()))?;
    Ok(Mac::local(bytes))
}

/// Reads what `samepage run --net` takes: the name of a TAP, or `auto`, and behind commas `mac=`,
/// `mtu=`, `bridge=`.
impl FromStr for Interface {
    type Err = InterfaceError;

    fn from_str(text: &str) -> Result<Self, InterfaceError> {
        let mut parts = text.split(',');
        let name = parts.next().unwrap_or_default();
        let mut interface = Self { tap: (name != AUTO).then(|| name.to_owned()), ..Self::default() };
        for part in parts {
            match part.split_once('=') {
                Some(("mac", mac)) => interface.mac = Some(mac.parse()?),
                Some(("mtu", mtu)) => {
                    interface.mtu = Some(mtu.parse().map_err(|_| InterfaceError::Mtu(mtu.into()))?)
                }
                Some(("bridge", bridge)) => interface.bridge = Some(bridge.into()),
                _ => return Err(InterfaceError::Option(part.into())),
            }
        }
        interface.check()?;
        Ok(interface)
    }
}

/// A metadata service.
#[derive(Clone, Debug)]
pub struct Mmds {
    pub config: mmds::Config,
    pub store: mmds::Store,
    /// The numbers of the interfaces that it is on.
    pub interfaces: Vec<usize>,
}

/// The same service: what is in its store is not compared.
impl PartialEq for Mmds {
    fn eq(&self, other: &Self) -> bool {
        (self.config, &self.interfaces) == (other.config, &other.interfaces)
    }
}

/// A TAP as a device sees it.
struct Segment(Tap);

impl net::Tap for Segment {
    fn send(&mut self, frame: &[u8]) -> io::Result<()> {
        self.0.send(frame)
    }

    fn receive(&mut self, frame: &mut [u8]) -> io::Result<usize> {
        self.0.receive(frame)
    }

    fn set_offload(&mut self, offload: Offload) -> io::Result<()> {
        let flags = [
            (offload.checksum, libc::TUN_F_CSUM),
            (offload.tso4, libc::TUN_F_TSO4),
            (offload.tso6, libc::TUN_F_TSO6),
            (offload.ecn, libc::TUN_F_TSO_ECN),
        ];
        self.0.set_offload(flags.iter().filter(|(on, _)| *on).fold(0, |all, (_, flag)| all | flag))
    }

    fn readable(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// The devices of all of a VM's interfaces, in order.
pub(super) fn open_all(
    interfaces: &[Interface],
    mmds: Option<&Mmds>,
) -> Result<Vec<(net::Net, Limiters)>, InterfaceError> {
    if interfaces.len() > MAX_INTERFACES {
        return Err(InterfaceError::TooMany { asked: interfaces.len() });
    }
    let device = |(number, interface): (usize, &Interface)| {
        let (config, tap) = interface.open()?;
        if interface.tap.is_none() {
            errln!("note: the TAP {} was made for this VM, whose address is {}", tap.name(), config.mac);
        }
        let receive = Limiter::new(interface.rx_rate_limiter);
        let limiters = Limiters { receive, transmit: Limiter::new(interface.tx_rate_limiter) };
        let tap: Box<dyn net::Tap> = match mmds.filter(|mmds| mmds.interfaces.contains(&number)) {
            Some(mmds) => {
                let detour = Detour::new(Box::new(Segment(tap)), mmds.config, mmds.store.clone());
                Box::new(detour.map_err(InterfaceError::Mmds)?)
            }
            None => Box::new(Segment(tap)),
        };
        Ok((net::Net::limited(config, tap, limiters.clone()), limiters))
    };
    interfaces.iter().enumerate().map(device).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_command_line_says() {
        let all: Interface = "tap0,mac=02:00:00:00:00:01,mtu=1280".parse().unwrap();
        let mac = Some(Mac([2, 0, 0, 0, 0, 1]));
        let expected = Interface { tap: Some("tap0".into()), mac, mtu: Some(1280), ..Interface::default() };
        assert_eq!(all, expected);
        let made: Interface = "auto,bridge=br0".parse().unwrap();
        assert_eq!(made, Interface { bridge: Some("br0".into()), ..Interface::default() });
        for (text, said) in [
            ("", "cannot be the name of an interface"),
            ("tap/0", "\"tap/0\" cannot be the name"),
            ("tap0,mac=1", "\"1\" is no MAC address"),
            ("tap0,mtu=67", "an MTU of \"67\" is not possible: expected a number from 68 to 65535"),
            ("tap0,mtu=65536", "an MTU of \"65536\""),
            ("tap0,ip=1", "\"ip=1\" is no option of a network interface"),
            ("tap0,bridge=br0", "ip link set tap0 master BRIDGE"),
            ("auto,bridge=a b", "\"a b\" cannot be the name"),
        ] {
            let error = text.parse::<Interface>().unwrap_err().to_string();
            assert!(error.contains(said), "{text}: {error}");
        }
    }

    #[test]
    fn addresses_that_are_made_up_are_local_and_differ() {
        let macs = [any_mac().unwrap(), any_mac().unwrap()];
        assert!(macs.iter().all(|mac| mac.0[0] & 3 == 2) && macs[0] != macs[1]);
    }
}
