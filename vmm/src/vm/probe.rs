//! Which KVM this is (to be replaced by the full probe).
/// Short name of the KVM backend.
pub fn backend() -> String { "pvm".into() }
