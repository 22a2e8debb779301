//! Experiments, stress and the simulator: trials of fleets and of models of them.
//!
//! It uses fleets as their users do, and nothing that runs guests may import it. It must not
//! contain policy: the simulator and stress call the one that the daemon runs.
//!
//! Begin with [`experiment`] (`run.rs`: the points of a plan, one fleet for each trial), then
//! [`stress`] (a scenario, phase by phase, to real guests) and [`simulate`] (the same policy on a
//! model of hosts and guests). What the benches need to compare figures is here too: [`contender`],
//! [`environment`], [`provenance`], [`spread`]. `resources/docs/reference/experiments.md` and
//! `scenarios.md` have the keys of their files.

pub mod contender;
pub mod environment;
pub mod experiment;
pub mod provenance;
pub mod simulate;
pub mod spread;
pub mod stress;
