//! For what a fleet cannot come up.

use std::fmt;

use serde::Serialize;

/// Something for which the fleet could not come up.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Problem {
    /// Whose it is; None: the fleet's.
    pub guest: Option<String>,
    /// The key of the fleet file that it is about, if there is one.
    pub key: Option<&'static str>,
    /// What is wrong, what was expected, and what to do.
    pub problem: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(guest) = &self.guest {
            write!(f, "guest {guest}: ")?;
        }
        if let Some(key) = self.key {
            write!(f, "{key}: ")?;
        }
        f.write_str(&self.problem)
    }
}

/// Problems as part of a message: a single one in line, more of them a line each.
#[derive(Debug)]
pub struct Listed(pub Vec<Problem>);

impl fmt::Display for Listed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0.as_slice() {
            [only] => write!(f, " {only}"),
            all => all.iter().try_for_each(|problem| write!(f, "\n  {problem}")),
        }
    }
}
