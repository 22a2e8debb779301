//! The policy against a model of hosts and guests: its decisions, before they reach real guests.
//!
//! The same [`step`](super::policy::step) that the daemon calls is called for each host in each
//! step of time. The model is coarse on purpose: a guest is a few numbers, and the cost of lacking
//! memory is an estimate. It serves to find swings, starvation and failures, and to compare two
//! settings; it does not predict a workload's speed.
//!
//! Hosts are independent of each other, and the result follows from the scenario and its seed.

mod dice;
mod guest;
mod host;
pub mod scenario;
pub mod scenario_error;
mod tally;
#[cfg(test)]
mod waiting_tests;

use serde::Serialize;

use host::Host;
use scenario::Scenario;
use tally::Tally;
pub use tally::{KindReport, PhaseReport, Sample};

/// The result of a simulation.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Report {
    pub scenario: String,
    /// The seed of its random numbers.
    pub seed: u64,
    pub hosts: u64,
    /// How many guests on each.
    pub guests_per_host: u64,
    /// The length of a step.
    pub step_seconds: f64,
    /// Guests times steps.
    pub guest_steps: u64,
    pub phases: Vec<PhaseReport>,
}

/// Runs a scenario. `each` is called with every host after every step; an error of it ends the
/// simulation.
///
/// # Errors
/// The error of `each`.
pub fn run<E>(scenario: &Scenario, mut each: impl FnMut(&Sample) -> Result<(), E>) -> Result<Report, E> {
    let mut hosts: Vec<Host> = (0..scenario.hosts).map(|n| Host::new(scenario, n)).collect();
    let kinds: Vec<&str> = scenario.guests.iter().map(|g| g.name.as_str()).collect();
    let mut phases = Vec::with_capacity(scenario.phases.len());
    let mut ended_seconds = 0.0;
    for phase in &scenario.phases {
        let mut tally = Tally::new(kinds.len());
        let steps = scenario.phase_steps(phase);
        for host in &mut hosts {
            host.begin(phase);
        }
        // Step by step and not host by host, so that the time series is in order of time.
        for _ in 0..steps {
            for (number, host) in hosts.iter_mut().enumerate() {
                each(&host.step(phase, number as u64, &mut tally))?;
            }
        }
        let seconds = steps as f64 * scenario.step_seconds;
        ended_seconds += seconds;
        let guests = hosts.iter().flat_map(Host::guests);
        phases.push(tally.report(&phase.name, &kinds, (seconds, ended_seconds), guests));
    }
    let guests_per_host = scenario.guests_per_host();
    Ok(Report {
        scenario: scenario.name.clone(),
        seed: scenario.seed,
        hosts: scenario.hosts,
        guests_per_host,
        step_seconds: scenario.step_seconds,
        guest_steps: scenario.steps() * scenario.hosts * guests_per_host,
        phases,
    })
}
