//! Errors with their causes.

/// An error with its causes on one line.
pub fn one_line(error: &dyn std::error::Error) -> String {
    match error.source() {
        Some(source) => format!("{error}: {}", one_line(source)),
        None => error.to_string(),
    }
}
