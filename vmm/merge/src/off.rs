//! The engine that merges nothing: the baseline of every comparison.

use super::{Engine, EngineError, Progress};
use measure::Space;

/// Merges nothing.
#[derive(Clone, Copy, Debug, Default)]
pub struct Off;

impl Engine for Off {
    fn name(&self) -> &'static str {
        "off"
    }

    fn start(&mut self, _guests: &[Space]) -> Result<(), EngineError> {
        Ok(())
    }

    fn progress(&mut self) -> Result<Progress, EngineError> {
        Ok(Progress { cpu_seconds: Some(0.0), ..Progress::default() })
    }

    fn stop(&mut self) {}
}
