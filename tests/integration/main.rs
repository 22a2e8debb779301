//! One integration binary: the `samepage` command as its users run it.
//!
//! Tests whose names begin with `lab_` run in the nested-paging lab (`tests/lab`); they are run by themselves:
//! `cargo test -p tests --test integration lab_ -- --test-threads=1`.

mod api;
mod architecture;
mod bad_input;
mod balloon;
mod balloon_driver;
mod balloon_merged;
mod control;
mod demo;
mod doctor;
mod drives;
mod experiment;
mod fleet;
mod hostile;
mod inside;
mod kernels;
mod measure;
mod measure_limits;
mod nested;
mod overcommit;
mod page_out;
mod power;
mod run;
mod simulate;
mod slab;
mod slab_fleet;
mod throttle;
mod watching;
mod working_set;
