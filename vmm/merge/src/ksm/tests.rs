//! What the engine says where there is no KSM to drive. Driving it takes other processes:
//! `vmm/merge/tests/ksm.rs`.

use std::fs;

use super::*;

#[test]
fn an_exited_guest_is_named() {
    let fake = tempfile::tempdir().unwrap();
    fs::write(fake.path().join("run"), "0").unwrap();
    let mut ksm = Ksm::new(KsmSettings::fast());
    ksm.knobs = Knobs(fake.path().to_owned());
    ksm.run = Some(Run {
        guests: vec![Space { name: "mail".to_owned(), pid: i32::MAX as u32, extents: Vec::new() }],
        ksmd: None,
        cpu_seconds: None,
        full_scans: 0,
    });
    let error = ksm.progress().unwrap_err().to_string();
    assert!(error.contains("mail") && error.contains("2147483647"), "{error}");
}

#[test]
fn a_kernel_without_ksm_is_told_apart() {
    let nothing = tempfile::tempdir().unwrap();
    let mut ksm = Ksm::new(KsmSettings::fast());
    ksm.knobs = Knobs(nothing.path().join("ksm"));
    let error = ksm.start(&[]).unwrap_err();
    assert!(
        matches!(error, EngineError::NoKsm { .. }) && error.to_string().contains("--engine off"),
        "{error}"
    );
}
