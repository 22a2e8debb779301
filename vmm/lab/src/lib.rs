//! What is tried with fleets and with models of them: experiments, stress, the simulator.
//!
//! It uses fleets as their users do, and nothing that guests run on may import it. It must not contain policy: the
//! simulator and stress call the one that the daemon runs.
//!
//! Begin with [`experiment`] (`run.rs`: the points of a plan, one fleet for each trial), then [`stress`] (a scenario, phase
//! by phase, to real guests) and [`simulate`] (the same policy on a model of hosts and guests).
//! What figures are compared by is here for the benches too: [`contender`], [`environment`], [`provenance`], [`spread`].
//! `resources/docs/reference/experiments.md` and `scenarios.md` have the keys of their files.

pub mod contender;
pub mod environment;
pub mod experiment;
pub mod provenance;
pub mod simulate;
pub mod spread;
pub mod stress;
