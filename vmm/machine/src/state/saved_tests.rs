use proptest::prelude::*;

use super::*;
use crate::state::mirror::{Pic, Registers};
use crate::state::setup::{BalloonV1, BootV1, DriveV1, FileV1, HugePagesV1, InterfaceV1, VsockV1};

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
        pair: None,
        mmds: None,
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

/// States of all kinds that were damaged in all ways, by the same dice each time: each is a state or an error, in bounded time and memory.
#[test]
fn fuzz_of_the_decoder_ends_in_a_state_or_an_error() {
    const INPUTS: usize = if cfg!(debug_assertions) { 20_000 } else { 1_000_000 };
    let file = VmState { around: Around::File(setup()), ..state() };
    let (address, interfaces) = (Some([169, 254, 170, 2]), vec!["eth0".to_owned()]);
    let mmds = Some(MmdsV1 { is_v2: true, address, imds_compat: true, interfaces });
    let paired = VmState { pair: Some(PairV1 { number: [3; 16] }), mmds, ..file.clone() };
    assert_eq!(VmState::decode(&paired.encode().unwrap()).unwrap(), paired);
    let wholes = [state().encode().unwrap(), paired.encode().unwrap(), GOLDEN.to_vec()];
    let (mut dice, mut decoded, mut refused) = (splitmix::SplitMix64::new(5), 0, 0);
    for number in 0..INPUTS {
        let damaged = super::super::hostile::damaged(&wholes[number % wholes.len()], &mut dice);
        match VmState::decode(&damaged) {
            // It is what it says: written again it is as long.
            Ok(state) => {
                decoded += 1;
                assert!(state.encode().unwrap().len() <= damaged.len() + 64, "{number}");
            }
            Err(error) => {
                refused += 1;
                assert!(!error.to_string().is_empty());
            }
        }
    }
    assert!(decoded > INPUTS / 20 && refused > INPUTS / 2, "{decoded} decoded, {refused} refused");
}

/// A file that version 1 wrote: the built-in guest with a balloon, on PVM.
const GOLDEN: &[u8] = include_bytes!("golden/v1.state");

/// Read for ever, by every later build.
#[test]
fn a_file_of_version_1_is_read() {
    let state = VmState::decode(GOLDEN).unwrap();
    assert_eq!(
        (state.machine.backend.as_str(), state.machine.memory_bytes, state.machine.vcpus),
        ("pvm", 16 << 20, 1)
    );
    assert_eq!((state.vcpus.len(), state.vcpus[0].lapic.len()), (1, 1024));
    let kinds: Vec<u32> = state.devices.virtio.iter().map(|device| device.device_id).collect();
    assert_eq!(kinds, [4, 5]);
    let setup = state.setup().unwrap();
    assert_eq!((setup.samepage.as_str(), setup.is_diff, setup.track_dirty_pages), ("0.1.0", false, true));
    assert_eq!(setup.balloon.map(|balloon| balloon.stats_polling_interval_s), Some(1));
    assert_eq!(setup.boot.as_ref().map(|boot| boot.kernel.as_slice()), Some(b"builtin".as_slice()));
    assert_eq!(state.encode().unwrap(), GOLDEN, "it is written as it was");
}

fn setup() -> SetupV1 {
    SetupV1 {
        samepage: "0.1.0".into(),
        realtime_ns: 1 << 60,
        is_diff: true,
        huge_pages: HugePagesV1::Pool2M,
        smt: true,
        track_dirty_pages: true,
        boot: Some(BootV1 { kernel: b"k".into(), initrd: Some(b"i".into()), args: Some("quiet".into()) }),
        drives: vec![DriveV1 {
            id: "d".into(),
            path: b"/srv/\xff".into(),
            read_only: true,
            is_raw: true,
            is_root: true,
            partuuid: Some("1-2".into()),
            file: FileV1 { bytes: 1 << 40, device: 7, inode: u64::MAX },
        }],
        balloon: Some(BalloonV1 {
            deflate_on_oom: true,
            hinting: true,
            reporting: true,
            stats_polling_interval_s: 9,
        }),
        interfaces: vec![InterfaceV1 {
            id: "n".into(),
            tap: "tap0".into(),
            mac: Some([2; 6]),
            mtu: Some(9000),
        }],
        vsock: Some(VsockV1 { cid: 3, path: b"/run/v".into() }),
    }
}

#[test]
fn the_form_of_a_file_is_the_one_that_was_published() {
    let file = VmState { around: Around::File(setup()), ..state() };
    let bytes = file.encode().unwrap();
    assert_eq!(VmState::decode(&bytes).unwrap(), file);
    assert_eq!(
        blake3::hash(&bytes).to_hex().as_str(),
        "8ffcc3478574de2420152a586e04a22f549c23ac11820c0a752f7e19b09eae5a",
        "see `container.rs`: a new form is a new version"
    );
}
