//! One guest powered off, or its power button pressed.

use std::io;
use std::time::Duration;

use super::HostError;
use super::client;
use super::shutdown::{ANSWER_LIMIT, LOOK, Shutdown, request};
use super::target::Target;
use machine::control::{Reply, Request};
use os::Peer;

/// Has one VM's guest power off. False if it had to be cut off: after `limit`, or when `watch`,
/// which sees how long it has still, says false. When it returns the VM's process has ended.
pub fn power_off(
    target: &Target,
    limit: Duration,
    watch: &mut dyn FnMut(Duration) -> bool,
) -> Result<bool, HostError> {
    let failed = |source: io::Error| HostError::socket(format!("the VM of guest {}", target.guest), source);
    let stream = client::connect(target.socket(), ANSWER_LIMIT).map_err(failed)?;
    let vm = Peer::process(&stream).map_err(failed)?;
    let shutdown = Shutdown::within(limit);
    client::ask_vm(&target.guest, stream, &request(shutdown.vm_limit()), ANSWER_LIMIT)?;
    while !vm.ends_within(LOOK) {
        let left = shutdown.time_left();
        if left.is_zero() || !watch(left) {
            vm.end(|| client::control(&target.guest, target.socket(), &Request::Stop).is_ok());
            return Ok(false);
        }
    }
    Ok(true)
}

/// Presses a VM's power button. False if its guest has no driver for it.
pub fn press_power_button(target: &Target) -> Result<bool, HostError> {
    match client::control(&target.guest, target.socket(), &Request::PowerButton)? {
        Reply::PowerButton(pressed) => Ok(pressed.driver),
        other => Err(HostError::unexpected_of_vm(&target.guest, &other)),
    }
}
