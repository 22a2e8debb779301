//! Runs one VM to its end.

use super::Config;
use super::build::Vm;
use super::error::VmError;
use super::events::EventLoop;
use super::exit::Ending;

/// Builds the VM of `config` and runs it until it ends.
pub fn run(config: &Config) -> Result<Ending, VmError> {
    // Signals before sockets: whoever sees a socket may end the VM, and it is removed.
    let mut events = EventLoop::new(config.lifeline)?;
    let vm = Vm::start(config, &mut events)?;
    let ending = loop {
        if let Some(ending) = events.turn()? {
            break ending;
        }
    };
    vm.stop();
    Ok(ending)
}
