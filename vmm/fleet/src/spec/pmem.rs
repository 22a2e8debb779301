//! The files that a guest in a fleet file has as memory.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::error::SpecError;
use super::guest::GuestSpec;
use super::paths::numbered;
use machine::{MAX_PMEM, Pmem};

/// A file that a guest has as memory: `/dev/pmem0` is the first.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(
    deny_unknown_fields,
    expecting = "{ path = \"base.img\" }, with read_only = true for one that many guests have in common"
)]
pub struct PmemSpec {
    /// A raw image or a block device; `{n}` in it is the guest's number.
    pub path: PathBuf,
    /// Whether the guest may only read it.
    #[serde(default)]
    pub read_only: bool,
}

/// Those of `guest`, which is number `n` of its `count`, as a file in `dir` gives them.
pub(super) fn of(guest: &str, n: usize, pmem: &[PmemSpec], dir: &Path) -> Result<Vec<Pmem>, SpecError> {
    if pmem.len() > MAX_PMEM {
        return Err(SpecError::Pmem { guest: guest.into(), asked: pmem.len() });
    }
    let one = |(number, pmem): (usize, &PmemSpec)| Pmem {
        id: format!("pmem{number}"),
        path: numbered(&pmem.path, n, dir),
        read_only: pmem.read_only,
    };
    Ok(pmem.iter().enumerate().map(one).collect())
}

/// Guests of one file have its pages in common, which those of different trust domains must not.
pub(super) fn check_domains(guests: &[GuestSpec]) -> Result<(), SpecError> {
    let mut users: BTreeMap<&Path, &GuestSpec> = BTreeMap::new();
    for guest in guests {
        for pmem in &guest.vm.pmem {
            let first = *users.entry(&pmem.path).or_insert(guest);
            if first.domain != guest.domain {
                return Err(SpecError::PmemDomains {
                    path: pmem.path.clone(),
                    first: first.name.clone(),
                    second: guest.name.clone(),
                });
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use crate::spec::FleetSpec;
    use std::path::Path;

    fn parse(guests: &str) -> Result<FleetSpec, String> {
        let text = format!("name = 'f'\n{guests}");
        FleetSpec::parse(&text, Path::new("/fleets")).map_err(|error| error.to_string())
    }

    #[test]
    fn guests_of_a_domain_have_a_file_in_common() {
        let fleet = parse(
            "[defaults]\npmem = [{ path = 'a', read_only = true }, { path = 'w{n}' }]\n[[guest]]\nname = 'a'\ncount = 2",
        );
        let paths: Vec<Vec<_>> = (fleet.unwrap().guests.iter())
            .map(|guest| guest.vm.pmem.iter().map(|p| (p.path.display().to_string(), p.read_only)).collect())
            .collect();
        let of = |own: &str| vec![("/fleets/a".to_owned(), true), (own.to_owned(), false)];
        assert_eq!(paths, [of("/fleets/w0"), of("/fleets/w1")]);
    }

    #[test]
    fn what_cannot_be_is_refused() {
        for (guests, said) in [
            (
                "[defaults]\npmem = [{ path = 'a', read_only = true }]\n[[guest]]\nname = 'a'\n[[guest]]\nname = 'b'\ndomain = 'd'",
                "guests a and b have the persistent memory /fleets/a in common, and are of two domains",
            ),
            ("[[guest]]\nname = 'a'\ncount = 2\npmem = [{ path = 'a' }]", "guests a-0 and a-1 both have"),
            (
                "[[guest]]\nname = 'a'\npmem = [{ path = 'a' }]\ndrives = [{ path = 'a', read_only = true }]",
                "guests a and a both have",
            ),
            (
                "[[guest]]\nname = 'a'\npmem = [{path='1'},{path='2'},{path='3'},{path='4'},{path='5'}]",
                "5 files as memory are not possible: expected at most 4",
            ),
            ("[[guest]]\nname = 'a'\npmem = [{ file = 'a' }]", "unknown field `file`"),
        ] {
            let error = parse(guests).unwrap_err();
            assert!(error.contains(said), "{error}");
        }
    }
}
