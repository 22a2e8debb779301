//! State files that are right in form and wrong in what they say, loaded all the way on this host's KVM.

use std::fs;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use devices::state::DeviceState;
use kvm_ioctls::Kvm;
use os::one_line;
use splitmix::SplitMix64;

use super::create::Kind;
use super::load::{How, MemorySource, StateFile};
use super::load_error::LoadError;
use crate::state::hostile;
use crate::state::saved::{Around, VmState};
use crate::state::setup::{BalloonV1, DriveV1, Setup, SetupV1};
use crate::{Console, EventLoop, Vm, VmConfig, VmError};

/// Well-digested rubbish that is loaded.
const INPUTS: usize = if cfg!(debug_assertions) { 150 } else { 1500 };

/// A snapshot of the built-in guest, when its balloon's driver was there.
struct Saved {
    directory: tempfile::TempDir,
    memory: PathBuf,
    state: VmState,
}

fn config() -> VmConfig {
    VmConfig {
        cmdline: Some(String::new()),
        memory_bytes: 16 << 20,
        console: Console::None,
        ..VmConfig::default()
    }
}

impl Saved {
    /// None, said aloud, where there is no KVM.
    fn new() -> Option<Self> {
        if Kvm::new().is_err() {
            testing::skipped(module_path!(), "no usable /dev/kvm");
            return None;
        }
        let directory = tempfile::tempdir().unwrap();
        let (state, memory) = (directory.path().join("state"), directory.path().join("memory"));
        let vm = Vm::start(&config(), &mut EventLoop::new(false).unwrap()).unwrap();
        let until = Instant::now() + Duration::from_secs(60);
        while vm.running().board.save().virtio.iter().all(|device| device.status & 4 == 0) {
            assert!(Instant::now() < until, "no driver");
            thread::sleep(Duration::from_millis(10));
        }
        assert!(vm.running().pause());
        let balloon = BalloonV1 { stats_polling_interval_s: 1, ..BalloonV1::default() };
        let setup = SetupV1 { balloon: Some(balloon), ..SetupV1::default() };
        vm.running().create_snapshot(Kind::Full, (&state, &memory), Setup { vm: setup, mmds: None }).unwrap();
        vm.stop();
        let state = VmState::decode(&fs::read(&state).unwrap()).unwrap();
        Some(Self { directory, memory, state })
    }

    /// Goes on from these bytes, as far as its first instruction.
    fn load(&self, bytes: &[u8]) -> Result<(), String> {
        let path = self.directory.path().join("other");
        fs::write(&path, bytes).unwrap();
        let loaded = load(&path, &self.memory);
        loaded.map(Vm::stop).map_err(|error| one_line(&*error))
    }
}

fn load(state: &Path, memory: &Path) -> Result<Vm, Box<dyn std::error::Error>> {
    let file = StateFile::open(state)?;
    let config = file.config(config());
    let image = file.image(&config, &MemorySource::File(memory.into()), How::default())?;
    Ok(Vm::start_from(Some(image), &config, &mut EventLoop::new(false)?)?)
}

#[test]
fn what_no_vm_can_be_is_refused_by_name() {
    let Some(saved) = Saved::new() else { return };
    assert_eq!(saved.load(&saved.state.encode().unwrap()), Ok(()));
    type Change = fn(&mut VmState);
    let balloon = |state: &mut VmState| state.devices.virtio[1].queues.len();
    assert!(balloon(&mut saved.state.clone()) > 1);
    let changes: &[(Change, &str)] = &[
        (|state| state.machine.backend = "elsewhere".into(), "is of a VM with backend elsewhere"),
        (|state| state.machine.vcpus = 0, "vCPUs 0: expected 1 to 32"),
        (|state| state.machine.vcpus = 33, "vCPUs 33: expected 1 to 32"),
        (|state| state.machine.vcpus = 2, "vCPUs whose state was saved 1: expected 2"),
        (|state| state.vcpus.clear(), "vCPUs whose state was saved 0: expected 1"),
        (|state| state.machine.memory_bytes = 1 << 63, "memory of bytes 9223372036854775808"),
        (|state| state.machine.memory_bytes = 0, "memory of bytes 0"),
        (|state| state.machine.memory_bytes += 1, "in whole pages"),
        (|state| state.machine.memory_bytes += 4096, "the memory file has 16777216 bytes"),
        (
            |state| state.vcpus[0].xsave = vec![0; 1 << 16],
            "the XSAVE area has 65536 bytes, and this host's has",
        ),
        (|state| state.vcpus[0].xsave.truncate(4095), "XSAVE area has 4095 bytes"),
        (|state| state.vcpus[0].lapic.push(0), "the local APIC has 1025 bytes: expected 1024"),
        (|state| state.vcpus[0].xcrs = vec![(0, 1); 17], "list of registers is too long"),
        (|state| state.vcpus[0].msrs = vec![(0x10, 0); 1025], "list of registers is too long"),
        (|state| state.vcpus[0].msrs.push((0xdead_0000, 1)), "register 0xdead0000 cannot be set"),
        (|state| state.vcpus[0].cpuid = vec![state.vcpus[0].cpuid[0]; 257], "CPUID is too long"),
        (
            |state| {
                state.vcpus[0]
                    .cpuid
                    .iter_mut()
                    .filter(|leaf| leaf.function == 1)
                    .for_each(|leaf| leaf.ecx = !0)
            },
            "CPUID 0x1.0, ecx",
        ),
        (|state| _ = state.devices.virtio.pop(), "1 virtio devices were saved, and there are 2"),
        (|state| state.devices.virtio.swap(0, 1), "was saved where kind"),
        (|state| state.devices.virtio[1].driver_features = !0, "is none that a driver gets to"),
        (|state| state.devices.virtio[1].status = 0x7f, "is none that a driver gets to"),
        (|state| _ = state.devices.virtio[1].queues.pop(), "queues were saved, and it has"),
        (|state| state.devices.virtio[1].queues[0].desc_table = 1 << 40, "device of kind 5, queue 0"),
        (|state| state.devices.virtio[1].queues[0].avail_ring = !1, "device of kind 5, queue 0"),
        (|state| state.devices.virtio[1].queues[0].used_ring = (16 << 20) - 4, "device of kind 5, queue 0"),
        (|state| state.devices.virtio[1].queues[0].size = 1 << 31, "device of kind 5, queue 0"),
        (|state| state.devices.virtio[1].device = DeviceState::Nothing, "is of another one"),
        (|state| state.devices.com1.input = vec![0; 65], "a serial port has 65 bytes of input"),
        (|state| drives(state, 5), "drives 5: expected at most 4"),
        (|state| drives(state, 1), "the drive /nowhere cannot be opened"),
    ];
    for (change, said) in changes {
        let mut state = saved.state.clone();
        change(&mut state);
        let refused = saved.load(&state.encode().unwrap()).expect_err(said);
        assert!(refused.contains(said), "{refused}\nexpected: {said}");
    }
    // What a daemon keeps is no file's.
    let image = VmState { around: Around::Image(memory()), ..saved.state.clone() };
    let refused = saved.load(&image.encode().unwrap()).unwrap_err();
    assert!(refused.contains("an image that a daemon keeps"), "{refused}");
    assert_eq!(saved.load(&saved.state.encode().unwrap()), Ok(()));
}

fn drives(state: &mut VmState, count: usize) {
    if let Around::File(setup) = &mut state.around {
        setup.drives = vec![DriveV1 { path: b"/nowhere".into(), ..DriveV1::default() }; count];
    }
}

fn memory() -> crate::state::saved::MemoryV1 {
    crate::state::saved::MemoryV1 { slabs: Vec::new(), runs: Vec::new() }
}

/// A guest may be wrong after that; this process may not.
#[test]
fn fuzz_of_states_with_right_digests_starts_a_vm_or_says_why_not() {
    let Some(saved) = Saved::new() else { return };
    let (whole, mut dice) = (saved.state.encode().unwrap(), SplitMix64::new(11));
    let (mut started, mut refused) = (0, 0);
    for _ in 0..INPUTS {
        match saved.load(&hostile::sections(&whole, &mut dice)) {
            Ok(()) => started += 1,
            Err(why) => {
                assert!(why.len() > 20, "{why:?}");
                refused += 1;
            }
        }
    }
    assert!(refused > INPUTS / 3 && started > 0, "{refused} refused, {started} started");
}

#[test]
fn files_that_may_not_be_read_are_refused_by_name() {
    use std::os::unix::fs::PermissionsExt;
    let Some(saved) = Saved::new() else { return };
    let (state, nobody) = (saved.directory.path().join("private"), 65_534);
    fs::write(&state, saved.state.encode().unwrap()).unwrap();
    fs::set_permissions(saved.directory.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let file = StateFile::open(&state).unwrap();
    let memory = saved.memory.clone();
    for path in [&state, &memory] {
        fs::set_permissions(path, fs::Permissions::from_mode(0o000)).unwrap();
    }
    let look = move || {
        // A thread of root's that has become another user; of another user it is as before.
        let _ = rustix::thread::set_thread_res_uid(
            rustix::thread::Uid::from_raw(nobody),
            rustix::thread::Uid::from_raw(nobody),
            rustix::thread::Uid::from_raw(nobody),
        );
        let opened = StateFile::open(&state).map(drop).unwrap_err();
        let config = file.config(config());
        let loaded = file.image(&config, &MemorySource::File(memory.clone()), How::default());
        [(opened, state), (loaded.map(drop).unwrap_err(), memory)]
    };
    for (error, path) in std::thread::spawn(look).join().unwrap() {
        let text = one_line(&error);
        assert!(text.contains(path.to_str().unwrap()) && text.contains("Permission denied"), "{text}");
    }
}

#[test]
fn a_file_that_changes_while_it_is_read_is_refused() {
    let Some(saved) = Saved::new() else { return };
    let path = saved.directory.path().join("changing");
    fs::write(&path, saved.state.encode().unwrap()).unwrap();
    let file = StateFile::open(&path).unwrap();
    let config = file.config(config());
    let image = file.image(&config, &MemorySource::File(saved.memory.clone()), How::default()).unwrap();
    // After it was opened, before it is copied.
    let memory = fs::OpenOptions::new().write(true).open(&saved.memory).unwrap();
    memory.set_len((16 << 20) - 4096).unwrap();
    memory.set_len(16 << 20).unwrap();
    let started = Vm::start_from(Some(image), &config, &mut EventLoop::new(false).unwrap());
    let error = started.map(Vm::stop).unwrap_err();
    assert!(matches!(&error, VmError::Image(_)), "{error}");
    assert!(one_line(&error).contains("was changed while it was read"), "{error}");
    assert!(matches!(StateFile::open(&saved.memory), Err(LoadError::State { .. })));
}
