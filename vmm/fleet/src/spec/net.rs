//! The network interfaces of a guest in a fleet file.

use std::collections::{BTreeMap, BTreeSet};

use devices::virtio::net::Mac;
use twox_hash::XxHash3_64;

use super::error::SpecError;
use super::guest::GuestSpec;
use super::interface::NetSpec;
use super::paths::NUMBER;
use machine::{AUTO, Interface, InterfaceError, MAX_INTERFACES};

/// The TAPs of guests.
pub(crate) fn taps<'a>(guests: impl IntoIterator<Item = &'a GuestSpec>) -> BTreeSet<String> {
    guests.into_iter().flat_map(|guest| &guest.vm.net).filter_map(|interface| interface.tap.clone()).collect()
}

/// How the interfaces of a clone of `origin` are given: as its own, but with addresses of their own, or as `other` says, one for each.
pub(super) fn of_clone(
    origin: &GuestSpec,
    clone: &str,
    other: &[NetSpec],
) -> Result<Vec<NetSpec>, SpecError> {
    let (asked, expected) = (other.len(), origin.vm.net.len());
    if asked == 0 && origin.net.len() == expected {
        return Ok(origin.net.iter().map(|net| NetSpec { mac: None, ..net.clone() }).collect());
    }
    if asked == 0 {
        return Ok(origin.vm.net.iter().map(NetSpec::like).collect());
    }
    if asked != expected {
        return Err(SpecError::CloneInterfaces { guest: clone.into(), asked, expected });
    }
    // The driver was told of the MTU when it was started, or of none.
    let same = |(other, own): (&NetSpec, &Interface)| NetSpec { mtu: own.mtu, ..other.clone() };
    Ok(other.iter().zip(&origin.vm.net).map(same).collect())
}

/// The interfaces of a clone whose TAPs are none of those `taken`: `{n}` is the least number for which they are not.
pub(super) fn next(
    clone: &str,
    fleet: &str,
    net: &[NetSpec],
    taken: &BTreeSet<String>,
) -> Result<Vec<Interface>, SpecError> {
    let taken_of = |interfaces: &[Interface]| {
        interfaces.iter().filter_map(|interface| interface.tap.clone()).find(|tap| taken.contains(tap))
    };
    let mut n = 0;
    loop {
        let interfaces = of(clone, n, fleet, net)?;
        let Some(tap) = taken_of(&interfaces) else { return Ok(interfaces) };
        // Each number that is not possible is so by another TAP.
        if n > taken.len() || !net.iter().any(|net| net.tap.contains(NUMBER)) {
            return Err(SpecError::CloneTap { guest: clone.into(), tap });
        }
        n += 1;
    }
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
pub(crate) fn check_owners<'a>(guests: impl IntoIterator<Item = &'a GuestSpec>) -> Result<(), SpecError> {
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
    fn origin(net: &str) -> GuestSpec {
        let text = format!("name = 'f'\n[[guest]]\nname = 'web'\nnet = {net}\n");
        super::super::FleetSpec::parse(&text, std::path::Path::new("/")).unwrap().guests.remove(0)
    }

    #[test]
    fn clones_have_addresses_and_taps_of_their_own() {
        let web = origin(
            "[{ tap = 't{n}', mac = '02:00:00:00:00:01', mtu = 1400 }, { tap = 'auto', bridge = 'br0' }]",
        );
        let (mut taken, mut all) = (taps([&web]), vec![web.clone()]);
        for n in 1..4 {
            let clone = web.cloned(format!("c-{n}"), "f", &[], &mut taken).unwrap();
            let [first, second] = &clone.vm.net[..] else { panic!("{clone:?}") };
            assert_eq!((first.tap.clone(), first.mtu), (Some(format!("t{n}")), Some(1400)));
            assert_eq!((second.tap.as_deref(), second.bridge.as_deref()), (None, Some("br0")));
            assert_eq!(first.mac, Some(mac_of("f", &clone.name, 0)));
            all.push(clone);
        }
        check_owners(&all).unwrap();
        // A clone of a clone; and one that is to be on others.
        let again = all[2].cloned("d".into(), "f", &[], &mut taken).unwrap();
        assert_eq!(again.vm.net[0].tap.as_deref(), Some("t4"));
        let other = ["v{n},mac=02:00:00:00:00:09", "auto"].map(|text| text.parse::<NetSpec>().unwrap());
        let other = web.cloned("e".into(), "f", &other, &mut taken).unwrap();
        let [first, second] = &other.vm.net[..] else { panic!("{other:?}") };
        assert_eq!((first.tap.as_deref(), first.mtu, second.bridge.clone()), (Some("v0"), Some(1400), None));
        assert_eq!(first.mac.map(|mac| mac.to_string()).as_deref(), Some("02:00:00:00:00:09"));
    }

    #[test]
    fn a_tap_that_is_one_guests_is_no_clones() {
        let web = origin("[{ tap = 'tap0' }]");
        let mut taken = taps([&web]);
        let error = web.cloned("c".into(), "f", &[], &mut taken).unwrap_err().to_string();
        assert!(error.contains("guest c: the TAP tap0 is another guest's"), "{error}");
        let two = ["auto", "auto"].map(|text| text.parse::<NetSpec>().unwrap());
        let error = web.cloned("c".into(), "f", &two, &mut taken).unwrap_err().to_string();
        assert!(error.contains("2 network interfaces are given, and its origin has 1"), "{error}");
        // Of one that no file described.
        let plain = GuestSpec { net: Vec::new(), ..origin("[{ tap = 'auto', mtu = 1300 }]") };
        let clone = plain.cloned("c".into(), "f", &[], &mut taken).unwrap();
        assert_eq!((clone.vm.net[0].mtu, &clone.vm.net[0].tap), (Some(1300), &None));
        assert_ne!(clone.vm.net[0].mac, plain.vm.net[0].mac);
    }
}
