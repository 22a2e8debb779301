//! Runs one VM to its end.

use super::build::Vm;
use super::config::VmConfig;
use super::error::VmError;
use super::events::EventLoop;
use super::exit::Ending;
use super::running::Running;

/// Builds the VM of `config` and runs it until it ends. `started` hears of it once its vCPUs run.
pub fn run(config: &VmConfig, started: impl FnOnce(&Running)) -> Result<Ending, VmError> {
    // Signals before sockets: whoever sees a socket may end the VM, and it is removed.
    let mut events = EventLoop::new(config.lifeline)?;
    let vm = Vm::start(config, &mut events)?;
    started(vm.running());
    let ending = loop {
        if let Some(ending) = events.turn()? {
            break ending;
        }
    };
    vm.stop();
    Ok(ending)
}
