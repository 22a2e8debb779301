//! Guests of a fleet file that go on from where another guest of it is once that has filled its memory: `from`.

use std::collections::{BTreeMap, BTreeSet};

use super::error::SpecError;
use super::guest::GuestSpec;
use super::interface::NetSpec;
use super::keys::GuestKeys;
use super::net::{self, taps};
use machine::{Drive, Interface, Overlay, VmConfig};

/// An error if a table says more than that it is a clone and which interfaces it has: in all else a clone is as its origin was.
pub fn check_keys(name: &str, keys: &GuestKeys) -> Result<(), SpecError> {
    let (from, net) = (keys.from.clone(), keys.net.clone());
    let only = GuestKeys { count: keys.count, from, net, ..GuestKeys::default() };
    let said = |keys: &GuestKeys| serde_json::to_value(keys).unwrap_or_default();
    let (said, only) = (said(keys), said(&only));
    let more =
        |(key, value): (&String, &serde_json::Value)| (only.get(key) != Some(value)).then(|| key.clone());
    match said.as_object().and_then(|keys| keys.iter().find_map(more)) {
        Some(key) => Err(SpecError::FromKey { guest: name.into(), key }),
        None => Ok(()),
    }
}

/// What the table of a clone says.
pub struct From {
    /// The guest that it goes on from.
    pub origin: String,
    /// Which interfaces it is to have, too.
    pub has_net: bool,
}

/// Makes each guest whose name `from` has a clone of the guest that `from` says.
pub fn resolve(
    guests: &mut [GuestSpec],
    from: &BTreeMap<String, From>,
    fleet: &str,
) -> Result<(), SpecError> {
    let booted: BTreeMap<String, GuestSpec> = guests
        .iter()
        .filter(|guest| !from.contains_key(&guest.name))
        .map(|guest| (guest.name.clone(), guest.clone()))
        .collect();
    let names_taps = |guest: &&GuestSpec| from.get(&guest.name).is_none_or(|from| from.has_net);
    let mut taken = taps(guests.iter().filter(names_taps));
    for guest in guests {
        let Some(From { origin, has_net }) = from.get(&guest.name) else { continue };
        let wrong = |why| SpecError::From { guest: guest.name.clone(), from: origin.clone(), why };
        let Some(of) = booted.get(origin) else {
            return Err(wrong(match from.contains_key(origin) {
                true => "which is a clone itself",
                false => "which is no guest of this file",
            }));
        };
        if of.vm.drives.iter().any(Drive::is_written) {
            return Err(wrong("which has a drive that it may write: two guests would write the same file"));
        }
        if of.vm.pmem.iter().any(|pmem| !pmem.read_only) {
            return Err(wrong(
                "which has persistent memory that it may write: two guests would write the same file",
            ));
        }
        *guest = match has_net {
            // Its number is that in its own `count`.
            true => {
                let net = net::of_clone(of, &guest.name, &guest.net)?;
                of.as_clone(guest.name.clone(), net, std::mem::take(&mut guest.vm.net))
            }
            false => of.cloned(guest.name.clone(), fleet, &[], &mut taken)?,
        };
    }
    Ok(())
}

impl GuestSpec {
    /// One that goes on from where this one was, under another name, in a fleet called `fleet`: with interfaces as `other` says, if it
    /// does. Its TAPs are none of those `taken`, and are taken from now on.
    pub fn cloned(
        &self,
        name: String,
        fleet: &str,
        other: &[NetSpec],
        taken: &mut BTreeSet<String>,
    ) -> Result<Self, SpecError> {
        let net = net::of_clone(self, &name, other)?;
        let interfaces = net::next(&name, fleet, &net, taken)?;
        let clone = self.as_clone(name, net, interfaces);
        taken.extend(taps([&clone]));
        Ok(clone)
    }

    fn as_clone(&self, name: String, net: Vec<NetSpec>, interfaces: Vec<Interface>) -> Self {
        // What its origin's overlay is kept in is its origin's.
        let ends = |drive: &Drive| {
            let overlay = drive.overlay.as_ref().map(|_| Overlay::Temporary);
            Drive { overlay, ..drive.clone() }
        };
        let drives = self.vm.drives.iter().map(ends).collect();
        let vm = VmConfig { name: name.clone(), net: interfaces, drives, ..self.vm.clone() };
        Self { name, vm, net, clone_of: Some(self.name.clone()), ..self.clone() }
    }
}
