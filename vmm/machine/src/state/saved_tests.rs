use proptest::prelude::*;

use super::*;
use crate::state::mirror::{Pic, Registers};

fn state() -> VmState {
    let vcpu = |n: u64| VcpuV1 {
        cpuid: vec![Default::default(); 3],
        tsc_khz: Some(2_500_000),
        mp_state: 0,
        registers: Registers { rip: n, rax: u64::MAX, ..Default::default() },
        system: Default::default(),
        xsave: vec![7; 4096],
        xcrs: vec![(0, 7)],
        debug: Default::default(),
        lapic: vec![9; 1024],
        msrs: (0..60).map(|msr| (msr, u64::from(msr) << 40)).collect(),
        events: Default::default(),
    };
    let chips = ChipsV1 {
        pics: [Pic::default(); 2],
        ioapic: Default::default(),
        pit: Default::default(),
        pit_flags: 0,
        clock: 1 << 50,
    };
    let devices = DevicesV1 {
        com1: SerialState { output: b"hello".into(), ..Default::default() },
        com2: SerialState::default(),
        pm1: Pm1State::default(),
        pci: PciState::default(),
        virtio: Vec::new(),
    };
    VmState {
        machine: MachineV1 { backend: "pvm".into(), memory_bytes: 64 << 20, vcpus: 2 },
        chips,
        vcpus: vec![vcpu(1), vcpu(2)],
        devices,
        around: Around::Image(MemoryV1 { slabs: vec![2048, 7], runs: vec![(3, 4, 0, 0), (9, 1, 1, 6)] }),
    }
}

#[test]
fn what_is_written_is_read() {
    let bytes = state().encode().unwrap();
    assert_eq!(VmState::decode(&bytes).unwrap(), state());
    assert!(bytes.len() < 16 << 10, "{} bytes", bytes.len());
}

/// The form may not change while it has this version: snapshots that users keep are written in it.
#[test]
fn the_form_is_the_one_that_was_published() {
    let bytes = state().encode().unwrap();
    let digest = blake3::hash(&bytes).to_hex();
    assert_eq!(
        digest.as_str(),
        "eefa17bc845da44f6eac9abdf1bc3f774a6d2535e3c08c3a3b19ddbead57a8ce",
        "see `container.rs`: a new form is a new version"
    );
}

#[test]
fn what_was_cut_short_or_damaged_is_refused() {
    let bytes = state().encode().unwrap();
    for length in 0..bytes.len() {
        assert!(VmState::decode(&bytes[..length]).is_err(), "{length}");
    }
    for at in 0..bytes.len() {
        let mut damaged = bytes.clone();
        damaged[at] ^= 1 << (at % 8);
        assert!(VmState::decode(&damaged).is_err(), "{at}");
    }
    assert!(VmState::decode(&[bytes.clone(), vec![0]].concat()).is_err());
}

/// Digests are no proof: a writer of the sections writes them too.
fn forged(kind: u32, version: u32, bytes: &[u8]) -> Vec<u8> {
    let bytes = bytes.to_vec();
    let whole = state();
    let mut sections = vec![
        Section::of(MACHINE, 1, &whole.machine).unwrap(),
        Section::of(CHIPS, 1, &whole.chips).unwrap(),
        Section::of(DEVICES, 1, &whole.devices).unwrap(),
        Section::of(MEMORY, 1, whole.memory().unwrap()).unwrap(),
    ];
    sections.retain(|section| section.kind() != kind);
    sections.push(Section::raw(kind, version, bytes));
    container::write(&sections)
}

#[test]
fn sections_that_cannot_be_are_named() {
    let said = |bytes: &[u8]| VmState::decode(bytes).unwrap_err().to_string();
    for (bytes, what) in [
        (forged(MEMORY, 2, &[]), "memory is of version 2"),
        (forged(77, 1, &[]), "kind 77"),
        (forged(MACHINE, 1, &[0xff; 9]), "description cannot be read"),
        (forged(MEMORY, 1, &[0, 0, 0]), "memory cannot be read"),
        // A list that says that it has 2^63 entries.
        (forged(MEMORY, 1, &[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x7f]), "memory cannot be read"),
        (container::write(&[]), "no description"),
        (vec![0; 100], "does not begin"),
    ] {
        assert!(said(&bytes).contains(what), "{}", said(&bytes));
    }
    let one = Section::of(MACHINE, 1, &state().machine).unwrap();
    let two = Section::of(MACHINE, 1, &state().machine).unwrap();
    assert_eq!(said(&container::write(&[one, two])), "it has two of description");
}

proptest! {
    #[test]
    fn rubbish_never_panics(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
        let _ = VmState::decode(&bytes);
        let _ = VmState::decode(&[b"SAMEPAGE\x01\0\0\0".as_slice(), &bytes].concat());
    }

    #[test]
    fn forged_sections_never_panic(kind in 1u32..6, bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        let _ = VmState::decode(&forged(kind, 1, &bytes));
    }
}
