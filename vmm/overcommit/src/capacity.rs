//! What guests may take together.

use serde::{Deserialize, Serialize};
use thiserror::Error;

/// Why a capacity is not possible.
#[derive(Debug, Error)]
pub enum CapacityError {
    #[error(
        "a capacity of 0 is not possible: expected what all guests may take together, at most {most_pages} pages here"
    )]
    None { most_pages: u64 },
    /// Beyond what there is.
    #[error(
        "a capacity of {asked_pages} pages is not possible: {limited_by} has {most_pages} pages; give less, or leave it out to \
         use all"
    )]
    TooMuch {
        asked_pages: u64,
        most_pages: u64,
        /// The limit that was exceeded.
        limited_by: Limit,
    },
}

/// The limit of a capacity.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Limit {
    Host,
    /// The control group that this process is in, or one above it.
    ControlGroup,
    Asked,
}

impl std::fmt::Display for Limit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Host => "this host",
            Self::ControlGroup => "our control group",
            Self::Asked => "the configuration",
        })
    }
}

/// What guests may take together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Capacity {
    pub pages: u64,
    pub limited_by: Limit,
}

impl Capacity {
    /// The least of `host_pages`, what the host has besides its pool of huge pages; `group_pages`,
    /// the limit of our control group; and `asked_pages`.
    ///
    /// # Errors
    /// 0 was asked for, or more than there is.
    pub fn of(
        host_pages: u64,
        group_pages: Option<u64>,
        asked_pages: Option<u64>,
    ) -> Result<Self, CapacityError> {
        let (most_pages, limited_by) = match group_pages {
            Some(limit) if limit < host_pages => (limit, Limit::ControlGroup),
            _ => (host_pages, Limit::Host),
        };
        match asked_pages {
            _ if most_pages == 0 => Err(CapacityError::None { most_pages }),
            Some(0) => Err(CapacityError::None { most_pages }),
            Some(asked_pages) if asked_pages > most_pages => {
                Err(CapacityError::TooMuch { asked_pages, most_pages, limited_by })
            }
            Some(pages) => Ok(Self { pages, limited_by: Limit::Asked }),
            None => Ok(Self { pages: most_pages, limited_by }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_least_limit_is_the_capacity() {
        let of = |group, asked| Capacity::of(2000, group, asked).expect("a capacity");
        assert_eq!(of(None, None), Capacity { pages: 2000, limited_by: Limit::Host });
        assert_eq!(of(Some(1000), None), Capacity { pages: 1000, limited_by: Limit::ControlGroup });
        assert_eq!(of(Some(3000), None).limited_by, Limit::Host);
        assert_eq!(of(Some(1600), Some(1500)), Capacity { pages: 1500, limited_by: Limit::Asked });
    }

    #[test]
    fn what_cannot_be_is_said() {
        let error = |group, asked| Capacity::of(2000, group, Some(asked)).expect_err("an error").to_string();
        assert!(error(None, 0).contains("at most 2000 pages"), "{}", error(None, 0));
        assert!(error(None, 2001).contains("this host has 2000 pages"), "{}", error(None, 2001));
        assert!(error(Some(9), 10).contains("our control group has 9 pages"), "{}", error(Some(9), 10));
        assert!(Capacity::of(0, None, None).is_err());
    }
}
