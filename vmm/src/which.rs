//! The arguments that name a fleet or a guest.

use std::path::Path;

use fleet::HostError;
use fleet::spec::FleetSpec;
use fleet::target::Target;

#[derive(clap::Args)]
pub(super) struct WhichFleet {
    /// The fleet: its name, or its file; not needed while only one is up
    #[arg(value_name = "FLEET")]
    fleet: Option<String>,
    /// The same as FLEET, as other commands have it
    #[arg(long, visible_alias = "fleet", value_name = "FLEET", conflicts_with = "fleet")]
    name: Option<String>,
}

impl WhichFleet {
    /// The name given, if any. A name has no dot and no slash, so an argument with one is a fleet
    /// file.
    pub(super) fn name(self) -> Result<Option<String>, HostError> {
        match self.fleet.or(self.name) {
            Some(file) if file.contains(['.', '/']) => Ok(Some(FleetSpec::read(Path::new(&file))?.name)),
            name => Ok(name),
        }
    }
}

#[derive(clap::Args)]
pub(super) struct Which {
    /// A guest's name, or the path of a control socket
    #[arg(value_name = "GUEST")]
    guest: String,
    /// The fleet; not needed while only one is up
    #[arg(long, visible_alias = "fleet", value_name = "FLEET")]
    name: Option<String>,
}

impl Which {
    pub(super) fn find(&self) -> Result<Target, HostError> {
        Target::find(&self.guest, self.name.clone())
    }
}
