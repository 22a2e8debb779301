//! Where the memory of a fleet's guests lies, asked from outside, to measure it.

use std::time::Duration;

use super::HostError;
use super::client::{ANSWER_LIMIT, control_within};
use super::daemon_client::{request, unexpected};
use super::runtime::FleetDir;
use super::status::{Reply, Request};
use machine::control as vm;
use measure::Space;

/// How long the daemon may take to say which guests there are.
const LIMIT: Duration = Duration::from_secs(120);

/// The guests of `fleet` that live, or those of them that are called so, each with its trust
/// domain.
///
/// # Errors
/// The daemon or a guest does not answer, or there is no guest of a name.
pub fn spaces(fleet: &str, names: &[String]) -> Result<Vec<(Space, String)>, HostError> {
    let ask = Request::Status { kvm: false, content: false, audit: false, settle_seconds: None };
    let status = match request(fleet, &ask, LIMIT)? {
        Reply::Status(status) => status,
        other => return Err(unexpected(&other)),
    };
    if let Some(unknown) = names.iter().find(|name| status.guests.iter().all(|guest| guest.name != **name)) {
        return Err(HostError::no_guest(unknown, fleet, status.guests.iter().map(|guest| &guest.name)));
    }
    let dir = FleetDir::of(fleet);
    let mut found = Vec::new();
    for guest in status.guests {
        let wanted = names.is_empty() || names.contains(&guest.name);
        if !wanted || guest.ended.is_some() {
            continue;
        }
        let socket = dir.control(&guest.name)?;
        let said = control_within(&guest.name, &socket, guest.pid, &vm::Request::Status, ANSWER_LIMIT)?;
        match said {
            vm::Reply::Status(vm) => {
                found.push((Space { name: guest.name, pid: vm.pid, extents: vm.extents }, guest.domain));
            }
            other => return Err(HostError::unexpected_of_vm(&guest.name, &other)),
        }
    }
    Ok(found)
}
