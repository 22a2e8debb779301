//! What each call of KVM took and answered, to see what a host can do.

use std::time::{Duration, Instant};

use super::StateError;

/// One call.
#[derive(Clone, Debug)]
pub struct Step {
    /// Which, as in `GET REGS`.
    pub call: String,
    /// None if it was carried out; what went wrong else, 0 where that is no error of the kernel's.
    pub errno: Option<i32>,
    /// How long it took.
    pub time: Duration,
}

/// Whether calls are written down.
#[derive(Debug, Default)]
pub struct Trace(Option<Vec<Step>>);

impl Trace {
    /// One that writes all down.
    pub fn on() -> Self {
        Self(Some(Vec::new()))
    }

    /// What was written down so far.
    pub fn take(&mut self) -> Vec<Step> {
        self.0.as_mut().map(std::mem::take).unwrap_or_default()
    }

    /// Reads something.
    pub fn get<T>(
        &mut self,
        what: &'static str,
        call: impl FnOnce() -> Result<T, kvm_ioctls::Error>,
    ) -> Result<T, StateError> {
        self.call("GET", what, call)
    }

    /// Writes something.
    pub fn set<T>(
        &mut self,
        what: &'static str,
        call: impl FnOnce() -> Result<T, kvm_ioctls::Error>,
    ) -> Result<T, StateError> {
        self.call("SET", what, call)
    }

    fn call<T>(
        &mut self,
        verb: &'static str,
        what: &'static str,
        call: impl FnOnce() -> Result<T, kvm_ioctls::Error>,
    ) -> Result<T, StateError> {
        let began = Instant::now();
        let done = call();
        if self.0.is_some() {
            self.took(&format!("{verb} {what}"), began, done.as_ref().err().map(|e| e.errno()));
        }
        done.map_err(|source| StateError::Kvm { verb, what, source })
    }

    /// Writes down a call that began then.
    pub fn took(&mut self, call: &str, began: Instant, errno: Option<i32>) {
        if let Some(steps) = &mut self.0 {
            steps.push(Step { call: call.into(), errno, time: began.elapsed() });
        }
    }
}
