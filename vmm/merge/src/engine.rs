//! What an engine is asked for, and what it tells.

use measure::Space;

use super::error::EngineError;
use super::slab;

/// What merges.
pub trait Engine: Send {
    /// Its name on the command line and in reports.
    fn name(&self) -> &'static str;

    /// Makes it ready for guests that are yet to start. Idempotent; [`Engine::start`] does it too.
    fn open(&mut self) -> Result<(), EngineError> {
        Ok(())
    }

    /// Admits process `pid`, the VM of a guest, to a trust domain. Only for an engine that keeps
    /// domains apart.
    fn admit(&mut self, _guest: &str, _pid: u32, _domain: &str, _memory_bytes: u64) {}

    /// VMs that apply and were neither admitted nor refused, each returned once. Only an engine
    /// that is open to others has any.
    fn applicants(&mut self) -> Vec<slab::Applicant> {
        Vec::new()
    }

    /// Refuses an applicant, by the number of its connection, and sends it the reason.
    fn refuse(&mut self, _applicant: u64, _why: slab::Refusal) {}

    /// The process of a guest that was admitted has ended.
    fn remove(&mut self, _guest: &str) {}

    /// Starts merging the memory of `guests`. On an error nothing has been changed.
    fn start(&mut self, guests: &[Space]) -> Result<(), EngineError>;

    /// How far it has come.
    fn progress(&mut self) -> Result<Progress, EngineError>;

    /// What the slab engine knows of its guests; None from any other.
    fn statistics(&self) -> Option<slab::engine::Statistics> {
        None
    }

    /// A way to ask from any thread how many pages all slabs have; None from an engine that has
    /// none.
    fn slab_pages(&self) -> Option<SlabPages> {
        None
    }

    /// Its slabs, for images of guests; None from an engine that has none.
    fn images(&self) -> Option<slab::engine::ImageSlabs> {
        None
    }

    /// Merges at urgent priority while memory is short, whatever it costs. An engine without a
    /// limit does nothing.
    fn set_priority(&mut self, _urgent: bool) {}

    /// Stops merging and puts back every host setting; what is merged stays merged. Idempotent;
    /// dropping an engine does the same.
    fn stop(&mut self);

    /// Why nothing merges any more, though it was started; None while something does or may.
    fn stalled(&self) -> Option<String> {
        None
    }

    /// What a reader of its numbers should know.
    fn notes(&self) -> Vec<String> {
        Vec::new()
    }
}

/// See [`Engine::slab_pages`].
pub type SlabPages = Box<dyn Fn() -> u64 + Send>;

/// How far an engine has come since [`Engine::start`].
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Progress {
    /// Pages of the guests on shared or zero frames now, the first page of each frame included.
    pub merged_pages: u64,
    /// Processor time the engine took. `None` where it cannot be seen.
    pub cpu_seconds: Option<f64>,
    /// Complete passes over all memory offered for merging. 0 for an engine that does not scan.
    pub full_passes: u64,
}
