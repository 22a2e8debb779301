//! The network interfaces of a guest in a fleet file.

use std::collections::BTreeMap;

use devices::rate_limiter::Limits;
use devices::virtio::net::Mac;
use serde::{Deserialize, Serialize};
use twox_hash::XxHash3_64;

use super::error::SpecError;
use super::guest::GuestSpec;
use machine::{AUTO, Interface, InterfaceError, MAX_INTERFACES};

/// What stands for a guest's number among those of one `count`.
pub(super) const NUMBER: &str = "{n}";

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

/// The interfaces of `guest`, which is number `n` of its `count`, in a fleet called `fleet`.
pub(super) fn of(guest: &str, n: usize, fleet: &str, net: &[NetSpec]) -> Result<Vec<Interface>, SpecError> {
    let wrong = |source| SpecError::Net { guest: guest.into(), source };
    if net.len() > MAX_INTERFACES {
        return Err(wrong(InterfaceError::TooMany { asked: net.len() }));
    }
    let interface = |(number, spec): (usize, &NetSpec)| {
        let mac = match &spec.mac {
            Some(mac) => mac.parse().map_err(InterfaceError::Mac)?,
            None => mac_of(fleet, guest, number),
        };
        let tap = (spec.tap != AUTO).then(|| spec.tap.replace(NUMBER, &n.to_string()));
        let interface = Interface {
            tap,
            bridge: spec.bridge.clone(),
            mac: Some(mac),
            mtu: spec.mtu,
            rx_rate_limiter: spec.rx_rate_limiter,
            tx_rate_limiter: spec.tx_rate_limiter,
        };
        interface.check().map(|()| interface)
    };
    net.iter().enumerate().map(interface).collect::<Result<_, _>>().map_err(wrong)
}

/// The same each time, and as good as never that of another guest.
fn mac_of(fleet: &str, guest: &str, number: usize) -> Mac {
    let hash = XxHash3_64::oneshot(format!("{fleet}/{guest}/{number}").as_bytes());
    let [a, b, c, d, e, g, ..] = hash.to_le_bytes();
    Mac::local([a, b, c, d, e, g])
}

/// Two guests with one address take each other's frames, and a TAP is one guest's.
pub(super) fn check_owners(guests: &[GuestSpec]) -> Result<(), SpecError> {
    let mut users: BTreeMap<String, &str> = BTreeMap::new();
    for guest in guests {
        for interface in &guest.vm.net {
            let mac = interface.mac.map(|mac| format!("MAC address {mac}"));
            let tap = interface.tap.as_ref().map(|tap| format!("TAP {tap}"));
            for what in mac.into_iter().chain(tap) {
                if let Some(first) = users.insert(what.clone(), &guest.name) {
                    let (first, second) = (first.to_owned(), guest.name.clone());
                    return Err(SpecError::NetOwners { what, first, second });
                }
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_the_same_each_time_and_differ() {
        let macs: Vec<Mac> =
            ["a", "b"].into_iter().flat_map(|guest| [0, 1].map(|n| mac_of("f", guest, n))).collect();
        assert!((0..4).all(|n| !macs[..n].contains(&macs[n])), "{macs:?}");
        assert_eq!(macs[0], mac_of("f", "a", 0));
        assert!(macs.iter().all(|mac| mac.to_string().parse() == Ok(*mac)));
    }
}
