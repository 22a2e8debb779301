//! One integration binary: the `samepage` command as its users run it.
//!
//! Tests whose names begin with `lab_` run in the nested-paging lab (`tests/lab`); they are run by
//! themselves: `cargo test -p tests --test integration lab_ -- --test-threads=1`.

mod admission;
mod api;
mod architecture;
mod bad_input;
mod balloon;
mod balloon_driver;
mod balloon_merged;
mod by_name;
mod captures;
mod clone_kills;
mod clones;
mod control;
mod demo;
mod doctor;
mod documents;
mod drives;
mod experiment;
mod firecracker_clients;
mod fleet;
mod fleet_life;
mod guide;
mod half_open;
mod hostile;
mod huge_pages;
mod inside;
mod kernels;
mod ksm_settings;
mod measure;
mod measure_choice;
mod measure_formats;
mod measure_limits;
mod metadata;
mod nested;
mod network;
mod open_fleet;
mod overcommit;
mod page_out;
mod power;
mod preflight;
mod printing;
mod prometheus;
mod requests;
mod rolling;
mod run;
mod silent;
mod simulate;
mod slab;
mod slab_fleet;
mod snapshots;
mod terminals;
mod throttle;
mod uffd;
mod upgrade;

mod walk;
mod watching;
mod working_set;
