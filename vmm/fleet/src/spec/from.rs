//! Guests of a fleet file that go on from where another guest of it is once that has filled its memory: `from`.

use std::collections::BTreeMap;

use super::error::SpecError;
use super::guest::GuestSpec;
use super::keys::GuestKeys;

/// An error if a table says more than that it is a clone, of which it can say no more: in all else a clone is as its origin was.
pub fn check_keys(name: &str, keys: &GuestKeys) -> Result<(), SpecError> {
    let only = GuestKeys { count: keys.count, from: keys.from.clone(), ..GuestKeys::default() };
    let said = |keys: &GuestKeys| serde_json::to_value(keys).unwrap_or_default();
    let (said, only) = (said(keys), said(&only));
    let more =
        |(key, value): (&String, &serde_json::Value)| (only.get(key) != Some(value)).then(|| key.clone());
    match said.as_object().and_then(|keys| keys.iter().find_map(more)) {
        Some(key) => Err(SpecError::FromKey { guest: name.into(), key }),
        None => Ok(()),
    }
}

/// Makes each guest whose name `from` has a clone of the guest that `from` says.
pub fn resolve(guests: &mut [GuestSpec], from: &BTreeMap<String, String>) -> Result<(), SpecError> {
    let booted: BTreeMap<String, GuestSpec> = guests
        .iter()
        .filter(|guest| !from.contains_key(&guest.name))
        .map(|guest| (guest.name.clone(), guest.clone()))
        .collect();
    for guest in guests {
        let Some(origin) = from.get(&guest.name) else { continue };
        let wrong = |why| SpecError::From { guest: guest.name.clone(), from: origin.clone(), why };
        let Some(of) = booted.get(origin) else {
            return Err(wrong(match from.contains_key(origin) {
                true => "which is a clone itself",
                false => "which is no guest of this file",
            }));
        };
        if of.vm.drives.iter().any(|drive| !drive.read_only) {
            return Err(wrong("which has a drive that it may write: two guests would write the same file"));
        }
        if of.vm.pmem.iter().any(|pmem| !pmem.read_only) {
            return Err(wrong(
                "which has persistent memory that it may write: two guests would write the same file",
            ));
        }
        *guest = of.cloned(guest.name.clone());
    }
    Ok(())
}
