//! A fleet's numbers for Prometheus: written in its text format or in OpenMetrics, served over
//! HTTP. Only reads; there is no authentication.

mod accept;
mod exposition;
mod families;
mod http;
mod server;
mod sheet;
mod text;

pub use self::exposition::exposition;
pub use self::families::EngineNow;
pub use self::server::Server;
pub use self::text::Format;
