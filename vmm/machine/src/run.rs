//! Runs one VM to its end.

use super::build::Vm;
use super::config::VmConfig;
use super::error::VmError;
use super::events::EventLoop;
use super::exit::Ending;
use super::running::Running;

/// Builds the VM of `config` and runs it until it ends. `started` is called once its vCPUs run.
pub fn run(config: &VmConfig, started: impl FnOnce(&Running)) -> Result<Ending, VmError> {
    // Signals before sockets: once there is a socket the VM may be ended, and the socket is removed then.
    let mut events = EventLoop::new(config.lifeline)?;
    let vm = Vm::start(config, &mut events)?;
    started(vm.running());
    serve(vm, &mut events)
}

/// Runs `vm`, which `events` serve, until it ends.
pub(super) fn serve(vm: Vm, events: &mut EventLoop) -> Result<Ending, VmError> {
    let ending = loop {
        if let Some(ending) = events.turn()? {
            break ending;
        }
    };
    vm.stop();
    Ok(ending)
}
