//! What is at the other ends of a VM's serial ports: its console at COM1, a socket at COM2.

use std::sync::{Arc, Mutex};

use devices::legacy::serial::Serial;
use event_manager::MutEventSubscriber;
use vmm_sys_util::eventfd::EventFd;

use super::channel::{Channel, ChannelOutput};
use super::config::{Console, VmConfig};
use super::console::ConsoleInput;
use super::error::VmError;
use super::exit::Outcome;
use super::feed::Feed;
use super::listener::Listener;
use super::vcpu::Shared;

/// Standard input to COM1, if it is the console of a VM of `config`.
pub(super) fn console_input(
    config: &VmConfig,
    shared: &Arc<Shared>,
    com1: Arc<Mutex<Serial>>,
    outcome: &Outcome,
) -> Result<Option<Box<dyn MutEventSubscriber>>, VmError> {
    if config.lifeline || config.console != Console::Stdio {
        return Ok(None);
    }
    let drained = drained(&com1)?;
    let input = ConsoleInput::new(Feed::new(com1, shared.clone()), drained, outcome.clone());
    Ok(Some(Box::new(input.map_err(VmError::host("watch the terminal"))?)))
}

/// The socket's clients to COM2, which `feed` feeds, and its `output` to them.
pub(super) fn channel(
    listener: Listener,
    output: ChannelOutput,
    com2: &Mutex<Serial>,
    feed: Arc<Mutex<Feed>>,
) -> Result<Box<dyn MutEventSubscriber>, VmError> {
    Ok(Box::new(Channel::new(listener, output, feed, drained(com2)?)))
}

fn drained(port: &Mutex<Serial>) -> Result<EventFd, VmError> {
    let port = os::lock(port);
    port.drained_fd().try_clone().map_err(VmError::host("duplicate an eventfd"))
}
