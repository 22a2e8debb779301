//! A fleet's numbers for Prometheus: written in OpenMetrics, served over HTTP. Only reads; there is no authentication.

mod exposition;
mod families;
mod http;
mod server;

pub use self::exposition::{EngineNow, exposition};
pub use self::server::Server;
