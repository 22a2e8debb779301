//! What is tried with fleets and with models of them: experiments, stress, the simulator.

pub mod experiment;
pub mod simulate;
pub mod stress;
