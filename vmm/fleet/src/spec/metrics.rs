//! Where a fleet's metrics are served: `metrics` of a fleet file.

use std::fmt;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::paths::resolve;

/// What an address begins with that is a path.
const UNIX: &str = "unix:";

/// An address at which metrics are collected. There is no authentication: every process that can
/// connect can read.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MetricsAddress {
    /// An IP address and a port.
    Tcp(SocketAddr),
    /// A Unix socket that is made there, for this user alone.
    Unix(PathBuf),
}

/// What is wrong with `metrics`.
#[derive(Debug, Error)]
pub enum MetricsAddressError {
    /// It is neither.
    #[error(
        "metrics = {0:?} is no address: expected an IP address and a port such as \"127.0.0.1:9464\" (\"0.0.0.0:9464\" for all that can \
         reach this host), or \"unix:\" and a path"
    )]
    Neither(String),
    /// A port that no collector could know.
    #[error(
        "metrics = {0:?} has no port that could be asked: expected 1 to 65535, such as \"127.0.0.1:9464\""
    )]
    NoPort(String),
}

impl MetricsAddress {
    /// Parses it. A relative path begins at `dir`.
    ///
    /// # Errors
    /// It is no address, or has port 0.
    pub fn parse(text: &str, dir: &Path) -> Result<Self, MetricsAddressError> {
        if let Some(path) = text.strip_prefix(UNIX) {
            return match path.is_empty() {
                true => Err(MetricsAddressError::Neither(text.into())),
                false => Ok(Self::Unix(resolve(Path::new(path), dir))),
            };
        }
        let address: SocketAddr = text.parse().map_err(|_| MetricsAddressError::Neither(text.into()))?;
        match address.port() {
            0 => Err(MetricsAddressError::NoPort(text.into())),
            _ => Ok(Self::Tcp(address)),
        }
    }

    /// Whether other hosts may reach it.
    pub fn is_public(&self) -> bool {
        matches!(self, Self::Tcp(address) if !address.ip().to_canonical().is_loopback())
    }
}

impl fmt::Display for MetricsAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => write!(f, "http://{address}/metrics"),
            Self::Unix(path) => write!(f, "{UNIX}{}", path.display()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<MetricsAddress, String> {
        MetricsAddress::parse(text, Path::new("/fleets")).map_err(|e| e.to_string())
    }

    #[test]
    fn addresses_and_who_can_reach_them() {
        for (text, shown, public) in [
            ("127.0.0.1:9464", "http://127.0.0.1:9464/metrics", false),
            ("127.8.0.1:1", "http://127.8.0.1:1/metrics", false),
            ("[::1]:9464", "http://[::1]:9464/metrics", false),
            ("[::ffff:127.0.0.1]:9464", "http://[::ffff:127.0.0.1]:9464/metrics", false),
            ("0.0.0.0:9464", "http://0.0.0.0:9464/metrics", true),
            ("[::]:9464", "http://[::]:9464/metrics", true),
            ("192.0.2.1:65535", "http://192.0.2.1:65535/metrics", true),
            ("unix:/run/x.sock", "unix:/run/x.sock", false),
            ("unix:x.sock", "unix:/fleets/x.sock", false),
        ] {
            let address = parse(text).unwrap();
            assert_eq!((address.to_string().as_str(), address.is_public()), (shown, public), "{text}");
        }
    }

    #[test]
    fn every_mistake_is_named() {
        for (text, expected) in [
            ("", "no address"),
            (":9464", "no address"),
            ("9464", "no address"),
            ("localhost:9464", "expected an IP address and a port"),
            ("127.0.0.1", "no address"),
            ("127.0.0.1:70000", "no address"),
            ("unix:", "no address"),
            ("127.0.0.1:0", "expected 1 to 65535"),
        ] {
            let error = parse(text).unwrap_err();
            assert!(error.contains(expected), "{text} gave {error}");
        }
    }
}
