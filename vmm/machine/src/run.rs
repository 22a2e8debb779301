//! Runs one VM to its end.

use super::Config;
use super::build::Vm;
use super::error::VmError;
use super::events::EventLoop;
use super::exit::Ending;
use super::running::Running;
use memory::ram::Ram;

/// Builds the VM of `config` and runs it until it ends. `loaded` gets its RAM when all that it starts from is in there and no
/// vCPU runs yet; `started` hears of it once they do.
pub fn run(
    config: &Config,
    loaded: impl FnOnce(&Ram),
    started: impl FnOnce(&Running),
) -> Result<Ending, VmError> {
    // Signals before sockets: whoever sees a socket may end the VM, and it is removed.
    let mut events = EventLoop::new(config.lifeline)?;
    let vm = Vm::start(Vm::map_ram(config)?, config, &mut events, loaded)?;
    started(vm.running());
    let ending = loop {
        if let Some(ending) = events.turn()? {
            break ending;
        }
    };
    vm.stop();
    Ok(ending)
}
