//! Names in a fleet file.

use super::error::SpecError;
use super::limits::MAX_NAME_BYTES;

/// Whether it can be the name of a fleet, a guest or a domain.
pub(crate) fn check_name(name: &str) -> Result<(), SpecError> {
    let allowed = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
    match !name.is_empty() && name.len() <= MAX_NAME_BYTES && name.chars().all(allowed) {
        true => Ok(()),
        false => Err(SpecError::Name(name.into())),
    }
}
