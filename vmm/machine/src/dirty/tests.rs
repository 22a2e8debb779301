use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::sync::mpsc;
use std::thread;

use kvm_ioctls::{Kvm, VcpuExit, VcpuFd};
use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::create::{create_vcpus, create_vm};
use crate::{Console, Ending, VmConfig, registers, run};
use memory::ram::Backing;
use memory::{PAGE_BYTES, PageNo};

const CODE_GPA: u64 = 1 << 20;
/// Asks port 0x3f0 for an address and writes there, unless it is 0; for ever.
const CODE: [u8; 13] = [
    0x66, 0xba, 0xf0, 0x03, // mov dx, 0x3f0
    0xed, // in eax, dx
    0x85, 0xc0, // test eax, eax
    0x74, 0xf7, // jz to the first
    0x88, 0x00, // mov [rax], al
    0xeb, 0xf3, // jmp to the first
];
/// The first page that is not the boot code's: the processor writes to page tables by itself.
const FIRST: u64 = 512;

/// A VM whose one vCPU writes to a given page.
struct Writer {
    vm: Arc<VmFd>,
    vcpu: VcpuFd,
    ram: Ram,
}

impl Writer {
    /// None, said aloud, where there is no KVM.
    fn new(bytes: u64) -> Option<Self> {
        let Ok(kvm) = Kvm::new() else {
            testing::skipped(module_path!(), "no usable /dev/kvm");
            return None;
        };
        let ram = Ram::new(bytes, Backing::Anonymous).unwrap();
        registers::write_tables(ram.memory()).unwrap();
        ram.memory().write_slice(&CODE, GuestAddress(CODE_GPA)).unwrap();
        let vm = Arc::new(create_vm(&kvm, &ram).unwrap());
        let vcpu = create_vcpus(&kvm, &vm, 1).unwrap().remove(0);
        registers::enter(&vcpu, CODE_GPA, 0).unwrap();
        let mut writer = Self { vm, vcpu, ram };
        writer.write(&[]);
        Some(writer)
    }

    /// The guest writes a byte to each of these pages.
    fn write(&mut self, pages: &[u64]) {
        let mut pages = pages.iter();
        loop {
            match self.vcpu.run() {
                // When it asks again it has written.
                Ok(VcpuExit::IoIn(0x3f0, answer)) => {
                    let page = pages.next();
                    answer.copy_from_slice(&((page.unwrap_or(&0) * PAGE_BYTES) as u32).to_le_bytes());
                    if page.is_none() {
                        return;
                    }
                }
                other => panic!("{other:?}"),
            }
        }
    }

    fn log(&self) -> DirtyLog {
        DirtyLog::new(&self.vm, &self.ram)
    }
}

/// Numbers of the pages in the log.
fn pages(log: &mut DirtyLog) -> Vec<u64> {
    let mut written = PageSet::all(70);
    log.read(&mut written).unwrap();
    written.iter().map(|page| page.0).collect()
}

/// Those of them from [`FIRST`] on.
fn written(log: &mut DirtyLog) -> Vec<u64> {
    pages(log).into_iter().filter(|page| *page >= FIRST).collect()
}

fn clear_all(log: &mut DirtyLog) {
    let mut written = PageSet::default();
    log.read(&mut written).unwrap();
    log.clear(&written).unwrap();
}

#[test]
fn what_the_guest_writes_after_a_clear_is_logged_and_nothing_else() {
    // More than one call clears, and an end that is not a whole word.
    let Some(mut writer) = Writer::new((160 << 20) + 3 * PAGE_BYTES) else { return };
    let mut log = writer.log();
    let end = writer.ram.bytes() / PAGE_BYTES;
    log.start().unwrap();
    assert_eq!(written(&mut log), (FIRST..end).collect::<Vec<_>>(), "at first all pages count as written");
    writer.write(&[600, 700]);
    clear_all(&mut log);
    assert!(written(&mut log).is_empty());
    writer.write(&[600, 20_000, end - 1]);
    assert_eq!(written(&mut log), [600, 20_000, end - 1]);
    // Of these only some are cleared, of which one is written again.
    let mut some = PageSet::none(end);
    some.insert(PageNo(600));
    some.insert(PageNo(end - 1));
    log.clear(&some).unwrap();
    assert_eq!(written(&mut log), [20_000]);
    writer.write(&[end - 1, 20_000]);
    assert_eq!(written(&mut log), [20_000, end - 1]);
    // Others may run between the calls.
    let (mut bitmap, mut parts) = (PageSet::default(), 0);
    log.read(&mut bitmap).unwrap();
    log.clear_in_parts(&bitmap, &mut || parts += 1).unwrap();
    assert!(parts >= 2, "{parts} calls for pages far from each other");
    // Given back and written again.
    let gpa = devices::reclaim::Gpa(600 * PAGE_BYTES);
    let discard =
        devices::reclaim::Reclaim::discard(&writer.ram, gpa..devices::reclaim::Gpa(gpa.0 + PAGE_BYTES));
    discard.unwrap();
    assert!(written(&mut log).is_empty());
    writer.write(&[600]);
    assert_eq!(written(&mut log), [600]);
}

#[test]
fn what_the_vmm_writes_is_in_the_same_log() {
    let Some(mut writer) = Writer::new(16 << 20) else { return };
    let mut log = writer.log();
    log.start().unwrap();
    clear_all(&mut log);
    writer.write(&[900]);
    writer.ram.memory().write_obj(1u8, GuestAddress(901 * PAGE_BYTES)).unwrap();
    assert_eq!(written(&mut log), [900, 901]);
    clear_all(&mut log);
    assert!(written(&mut log).is_empty());
}

#[test]
fn it_stops_and_starts_again_and_ends_with_the_vm() {
    let Some(mut writer) = Writer::new(16 << 20) else { return };
    let (mut log, all) = (writer.log(), (FIRST..4096).collect::<Vec<_>>());
    assert!(log.read(&mut PageSet::default()).is_err(), "it is off");
    log.stop().unwrap();
    for _ in 0..2 {
        log.start().unwrap();
        assert_eq!(written(&mut log), all);
        clear_all(&mut log);
        log.start().unwrap();
        assert!(written(&mut log).is_empty(), "it was on");
        log.stop().unwrap();
        log.stop().unwrap();
        assert!(log.clear(&PageSet::none(4096)).is_err());
        writer.write(&[1000]);
    }
    // Another handle is the same log.
    log.clone().start().unwrap();
    assert_eq!(written(&mut log), all);
    assert!(log.clear(&PageSet::none(4032)).is_err());
    drop(writer);
    let gone = [log.start(), log.stop(), log.read(&mut PageSet::default()), log.clear(&PageSet::none(4096))];
    for result in gone {
        assert_eq!(result.unwrap_err().to_string(), "the VM has ended");
    }
}

#[test]
fn a_kvm_without_it_says_what_is_missing() {
    let Some(writer) = Writer::new(16 << 20) else { return };
    let mut log = writer.log();
    log.log.lock().unwrap().supported = false;
    let error = log.start().unwrap_err();
    assert!(error.kind() == io::ErrorKind::Unsupported && error.to_string().contains("Linux 5.7"), "{error}");
}

/// They read and clear as they like, each against a list of its own of what was written: none
/// notices the others.
#[test]
fn readers_do_not_notice_each_other() {
    use std::collections::BTreeSet;
    let Some(mut writer) = Writer::new(16 << 20) else { return };
    let (log, mut dice) = (writer.log(), splitmix::SplitMix64::new(7));
    let mut logs = [Reader::Merging, Reader::Snapshots, Reader::Capture].map(|reader| log.seen_by(reader));
    let all: BTreeSet<u64> = (FIRST..4096).collect();
    // None: it has it off.
    let mut expected: [Option<BTreeSet<u64>>; READERS] = [const { None }; READERS];
    for step in 0..3000 {
        let reader = (dice.draw() % READERS as u64) as usize;
        match dice.draw() % 8 {
            0..3 => {
                let page = FIRST + dice.draw() % 300;
                match dice.draw() % 2 {
                    0 => writer.write(&[page]),
                    _ => writer.ram.memory().write_obj(1u8, GuestAddress(page * PAGE_BYTES)).unwrap(),
                }
                expected.iter_mut().flatten().for_each(|pages| _ = pages.insert(page));
            }
            3..6 => {
                let (mut seen, mut some) = (PageSet::default(), PageSet::none(4096));
                let read = logs[reader].read(&mut seen);
                assert_eq!(read.is_ok(), expected[reader].is_some(), "step {step}");
                // All that is read, or a part of it, and pages that were not written as well.
                let from = [0, 0, FIRST + 100, FIRST + 2000][(dice.draw() % 4) as usize];
                some.insert_range(memory::PageRange::between(PageNo(from), PageNo(4096)));
                if dice.draw() % 2 == 0 {
                    some.intersect(&seen);
                }
                if let Some(pages) = &mut expected[reader] {
                    logs[reader].clear(&some).unwrap();
                    pages.retain(|page| !some.has(PageNo(*page)));
                }
            }
            6 if step % 5 == 0 => {
                logs[reader].stop().unwrap();
                expected[reader] = None;
            }
            6 => {}
            _ => {
                logs[reader].start().unwrap();
                expected[reader].get_or_insert_with(|| all.clone());
            }
        }
        for (log, pages) in logs.iter_mut().zip(&expected) {
            match pages {
                Some(pages) => {
                    assert_eq!(&written(log).into_iter().collect::<BTreeSet<_>>(), pages, "step {step}")
                }
                None => assert!(log.read(&mut PageSet::default()).is_err(), "step {step}"),
            }
        }
    }
}

/// The log that a whole VM gives out, of its own guest and its own devices.
#[test]
fn a_running_vm_has_one() {
    if Kvm::new().is_err() {
        testing::skipped(module_path!(), "no usable /dev/kvm");
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let com2 = directory.path().join("com2");
    let config = VmConfig {
        name: "logged".into(),
        cmdline: Some(String::new()),
        memory_bytes: 32 << 20,
        console: Console::None,
        com2: Some(com2.clone()),
        ..VmConfig::default()
    };
    let (started, when_started) = mpsc::channel();
    let vm = thread::spawn(move || {
        run(&config, |running| started.send((running.write_log(), running.ram().clone())).unwrap()).unwrap()
    });
    let (mut log, ram) = when_started.recv().unwrap();
    let mut guest = UnixStream::connect(&com2).unwrap();
    let mut lines = BufReader::new(guest.try_clone().unwrap()).lines();
    let mut until = |word: &str| loop {
        let line = lines.next().unwrap().unwrap();
        if line.starts_with(word) {
            return line;
        }
        assert!(!line.starts_with("err "), "{line}");
    };
    let ready = until("ready ");
    let base = ready.split_once("base=").unwrap().1.split(' ').next().unwrap().trim_start_matches("0x");
    let first = u64::from_str_radix(base, 16).unwrap() / PAGE_BYTES;
    log.start().unwrap();
    clear_all(&mut log);
    writeln!(guest, "fill seed=1 common=2 zero=0 common_pct=0 dup=0 unique=100 pages=500").unwrap();
    until("ok ");
    let filled = pages(&mut log);
    assert!((first..first + 500).all(|page| filled.contains(&page)), "{first}: {filled:?}");
    assert!(
        !filled.iter().any(|page| (first + 500..ram.bytes() / PAGE_BYTES - 64).contains(page)),
        "{filled:?}"
    );
    clear_all(&mut log);
    writeln!(guest, "verify").unwrap();
    until("ok ");
    assert!(!pages(&mut log).iter().any(|page| (first..first + 500).contains(page)), "they were only read");
    writeln!(guest, "poweroff").unwrap();
    assert!(matches!(vm.join().unwrap(), Ending::PowerOff));
    assert!(log.read(&mut PageSet::default()).is_err());
}

proptest! {
    /// Every word with a bit is in one span, none is in two, and no span is longer than it may be.
    #[test]
    fn spans_have_every_bit_once(
        words in proptest::collection::vec(prop_oneof![9 => Just(0u64), 1 => any::<u64>()], 0..2000)
    ) {
        let (mut from, mut left) = (0, words.clone());
        while let Some(span) = next_span(&words, from) {
            prop_assert!(span.start >= from && span.len() <= MAX_SPAN_WORDS);
            prop_assert!(words[span.start] != 0 && words[span.end - 1] != 0);
            from = span.end;
            left[span].fill(0);
        }
        prop_assert!(left.iter().all(|word| *word == 0));
    }
}

#[test]
fn near_words_are_one_span_and_far_ones_are_not() {
    let mut words = vec![0; 1000];
    words[3] = 1;
    words[3 + GAP_WORDS + 1] = 1;
    words[3 + 2 * GAP_WORDS + 3] = 1;
    assert_eq!(next_span(&words, 0), Some(3..3 + GAP_WORDS + 2));
    assert_eq!(next_span(&words, 3 + GAP_WORDS + 2), Some(3 + 2 * GAP_WORDS + 3..3 + 2 * GAP_WORDS + 4));
    assert_eq!(next_span(&words, 1001), None);
}
