//! The guest that a command is about.

use fleet::HostError;
use fleet::balloon::Target;

#[derive(clap::Args)]
pub(super) struct Which {
    /// A guest's name, or the path of a control socket
    #[arg(value_name = "GUEST")]
    guest: String,
    /// Which fleet; not needed while only one is up
    #[arg(long, visible_alias = "fleet", value_name = "FLEET")]
    name: Option<String>,
}

impl Which {
    /// Finds it.
    pub(super) fn find(&self) -> Result<Target, HostError> {
        Target::find(&self.guest, self.name.clone())
    }
}
