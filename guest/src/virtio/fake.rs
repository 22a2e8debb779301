//! A balloon device for tests: registers and rings over the driver's own words; it can be set to
//! answer late.

use core::ops::Range;
use core::sync::atomic::{AtomicU32, Ordering};
use std::boxed::Box;
use std::cell::RefCell;
use std::collections::HashSet;
use std::rc::Rc;
use std::vec;
use std::vec::Vec;

use super::balloon::{Driver, F_STATS_VQ, Frames, PageMap, SHARED_WORDS};
use super::ring::{ENTRIES_MAX, Ring};
use super::{F_VERSION_1, INTERRUPT_CONFIG, MAGIC, Transport, VERSION, register, status};

/// Where the shared words seem to lie.
const SHARED_GPA: u64 = 0x10_0000;
/// Where the pages seem to lie; some above 4 GiB.
const BASE: u64 = 0x20_0000;

/// A descriptor as the device finds it.
#[derive(Clone, Debug)]
struct Buffer {
    gpa: u64,
    bytes: u32,
    writable: bool,
}

#[derive(Debug, Default)]
struct Queue {
    entries: u32,
    ready: u32,
    addresses: [u64; 3],
    taken: u16,
    used: u16,
}

/// State that tests read and set.
#[derive(Debug)]
pub(crate) struct State {
    words: &'static [AtomicU32],
    frames: Frames,
    offered: u64,
    accepted: u64,
    selected: [u32; 3],
    queues: Vec<Queue>,
    interrupts: u32,
    pub(crate) status: u32,
    pub(crate) num_pages: u32,
    pub(crate) actual: u32,
    pub(crate) hint_cmd: u32,
    /// Page frame numbers in the balloon.
    pub(crate) held: HashSet<u32>,
    /// Pages, by index, that the host has emptied and that were not looked at since.
    pub(crate) emptied: HashSet<u64>,
    /// Pages that were reported or hinted, repeated ones too.
    pub(crate) told: Vec<u64>,
    /// What the driver said on the hinting queue.
    pub(crate) hint_cmds: Vec<u32>,
    pub(crate) statistics: Vec<(u16, u64)>,
    /// Requests are answered by [`Device::answer`] only, not when they are made.
    pub(crate) late: bool,
    /// How often the largest balloon so far was seen, in pages.
    pub(crate) most: usize,
    /// Nothing is answered any more.
    pub(crate) dead: bool,
    /// Most entries of a queue.
    pub(crate) entries_max: u32,
    statistics_held: Option<u16>,
}

/// A device, shared between test and driver.
#[derive(Clone, Debug)]
pub(crate) struct Device(pub(crate) Rc<RefCell<State>>);

impl Device {
    /// A device that offers `features`, and pages, two thirds of them below 4 GiB.
    pub(crate) fn new(features: u64, pages: u64) -> Self {
        let words: Vec<_> = (0..SHARED_WORDS).map(|_| AtomicU32::new(0)).collect();
        let low_count = pages * 2 / 3;
        let mut state = State {
            words: Box::leak(words.into_boxed_slice()),
            frames: Frames { base: BASE, low_count, high_count: pages - low_count },
            offered: features | F_VERSION_1,
            accepted: 0,
            selected: [0; 3],
            queues: Vec::new(),
            interrupts: 0,
            status: 0,
            num_pages: 0,
            actual: 0,
            hint_cmd: 0,
            held: HashSet::new(),
            emptied: HashSet::new(),
            told: Vec::new(),
            hint_cmds: Vec::new(),
            statistics: Vec::new(),
            late: false,
            most: 0,
            dead: false,
            entries_max: u32::from(ENTRIES_MAX) * 2,
            statistics_held: None,
        };
        state.reset();
        Self(Rc::new(RefCell::new(state)))
    }

    /// A driver of it, not yet on.
    pub(crate) fn driver(&self) -> Driver<'static, Device> {
        let state = self.0.borrow();
        let map = vec![u64::MAX; PageMap::words(state.frames.count())];
        let pages = PageMap::new(state.frames, Box::leak(map.into_boxed_slice()));
        Driver::new(self.clone(), state.words, SHARED_GPA, pages, state.frames.count() + 100)
    }

    /// Changes the configuration as a host does.
    pub(crate) fn set(&self, change: impl FnOnce(&mut State)) {
        let mut state = self.0.borrow_mut();
        change(&mut state);
        state.interrupts |= INTERRUPT_CONFIG;
    }

    /// Answers the pending requests.
    pub(crate) fn answer(&self) {
        let mut state = self.0.borrow_mut();
        for queue in 0..state.queues.len() {
            state.process(queue);
        }
    }

    /// Uses the statistics buffer, which asks for another.
    pub(crate) fn ask_statistics(&self) {
        let mut state = self.0.borrow_mut();
        let queue = 2;
        if let Some(head) = state.statistics_held.take() {
            state.use_chain(queue, head);
        }
    }
}

impl State {
    fn reset(&mut self) {
        let queues = 2 + (self.offered & (F_STATS_VQ | 1 << 3 | 1 << 5)).count_ones();
        self.queues = (0..queues).map(|_| Queue::default()).collect();
        (self.status, self.interrupts, self.actual, self.statistics_held) = (0, 0, 0, None);
        self.held.clear();
    }

    fn word(&self, gpa: u64) -> &'static AtomicU32 {
        &self.words[((gpa - SHARED_GPA) / 4) as usize]
    }

    fn half(&self, gpa: u64) -> u16 {
        (self.word(gpa & !3).load(Ordering::Acquire) >> (8 * (gpa & 2))) as u16
    }

    fn chain(&self, queue: usize, head: u16) -> Option<Vec<Buffer>> {
        let (mut chain, mut at) = (Vec::new(), u64::from(head));
        for _ in 0..self.queues[queue].entries {
            let descriptor = self.queues[queue].addresses[0] + 16 * at;
            let word = |n: u64| self.word(descriptor + 4 * n).load(Ordering::Acquire);
            let flags = word(3);
            let gpa = u64::from(word(0)) | u64::from(word(1)) << 32;
            chain.push(Buffer { gpa, bytes: word(2), writable: flags & 2 != 0 });
            if flags & 1 == 0 {
                return Some(chain);
            }
            at = u64::from(flags >> 16);
        }
        None
    }

    fn process(&mut self, queue: usize) {
        while !self.dead && self.queues[queue].ready == 1 {
            let Queue { entries, addresses: [_, available, _], taken, .. } = self.queues[queue];
            if self.half(available + 2) == taken {
                break;
            }
            let head = self.half(available + 4 + 2 * u64::from(u32::from(taken) % entries));
            self.queues[queue].taken = taken.wrapping_add(1);
            let Some(chain) = self.chain(queue, head) else {
                self.status |= status::NEEDS_RESET;
                self.interrupts |= INTERRUPT_CONFIG;
                return;
            };
            // In the order of the queues that are offered.
            let features = [None, None, Some(1), Some(3), Some(5)];
            let offered = features.iter().filter(|f| f.is_none_or(|bit| self.offered >> bit & 1 != 0));
            match offered.copied().nth(queue).flatten() {
                None => self.moved(&chain, queue == 0),
                Some(1) => {
                    self.read_statistics(&chain);
                    if let Some(before) = self.statistics_held.replace(head) {
                        self.use_chain(queue, before);
                    }
                    continue;
                }
                Some(bit) => self.free(&chain, bit == 3),
            }
            self.use_chain(queue, head);
        }
    }

    fn moved(&mut self, chain: &[Buffer], inflate: bool) {
        for buffer in chain.iter().filter(|buffer| !buffer.writable) {
            for n in 0..u64::from(buffer.bytes / 4) {
                let pfn = self.word(buffer.gpa + 4 * n).load(Ordering::Acquire);
                let Some(page) = self.frames.page(pfn.into()) else { continue };
                if inflate {
                    self.held.insert(pfn);
                    self.emptied.insert(page);
                } else {
                    assert!(self.held.remove(&pfn), "{page} is deflated and was not in the balloon");
                }
            }
        }
        self.most = self.most.max(self.held.len());
    }

    fn free(&mut self, chain: &[Buffer], hint: bool) {
        for buffer in chain {
            if hint && !buffer.writable {
                self.hint_cmds.push(self.word(buffer.gpa).load(Ordering::Acquire));
                continue;
            }
            for n in 0..u64::from(buffer.bytes) / 4096 {
                if let Some(page) = self.frames.page(buffer.gpa / 4096 + n) {
                    self.told.push(page);
                    self.emptied.insert(page);
                }
            }
        }
    }

    fn read_statistics(&mut self, chain: &[Buffer]) {
        let mut bytes = Vec::new();
        for word in 0..u64::from(chain[0].bytes.div_ceil(4)) {
            let word = self.word(chain[0].gpa + 4 * word);
            bytes.extend(word.load(Ordering::Acquire).to_le_bytes());
        }
        let stats = bytes[..chain[0].bytes as usize].chunks_exact(10);
        self.statistics = stats
            .map(|stat| {
                let (tag, value) = stat.split_at(2);
                (u16::from_le_bytes(tag.try_into().unwrap()), u64::from_le_bytes(value.try_into().unwrap()))
            })
            .collect();
    }

    fn use_chain(&mut self, queue: usize, head: u16) {
        let Queue { entries, addresses: [_, _, used], used: index, .. } = self.queues[queue];
        let element = used + 4 + 8 * u64::from(u32::from(index) % entries);
        self.word(element).store(head.into(), Ordering::Relaxed);
        self.word(element + 4).store(0, Ordering::Relaxed);
        self.queues[queue].used = index.wrapping_add(1);
        self.word(used).store(u32::from(index.wrapping_add(1)) << 16, Ordering::Release);
        self.interrupts |= 1;
    }
}

impl Transport for Device {
    fn read(&mut self, offset: u32) -> u32 {
        let state = self.0.borrow();
        let queue = state.queues.get(state.selected[2] as usize);
        match offset {
            register::MAGIC_VALUE => MAGIC,
            register::VERSION => VERSION,
            register::DEVICE_FEATURES => (state.offered >> (32 * state.selected[0])) as u32,
            register::QUEUE_NUM_MAX => queue.map_or(0, |_| state.entries_max),
            register::QUEUE_READY => queue.map_or(0, |queue| queue.ready),
            register::INTERRUPT_STATUS => state.interrupts,
            register::STATUS => state.status,
            0x100 => state.num_pages,
            0x104 => state.actual,
            0x108 => state.hint_cmd,
            _ => panic!("read of {offset:#x}"),
        }
    }

    fn write(&mut self, offset: u32, value: u32) {
        let mut state = self.0.borrow_mut();
        let selected = state.selected[2] as usize;
        match offset {
            register::DEVICE_FEATURES_SEL => state.selected[0] = value,
            register::DRIVER_FEATURES_SEL => state.selected[1] = value,
            register::QUEUE_SEL => state.selected[2] = value,
            register::DRIVER_FEATURES => {
                let shift = 32 * state.selected[1];
                state.accepted = state.accepted & !(0xffff_ffff << shift) | u64::from(value) << shift;
            }
            register::STATUS if value == 0 => state.reset(),
            register::STATUS => {
                assert_eq!(state.accepted & !state.offered, 0);
                state.status |= value;
            }
            register::INTERRUPT_ACK => state.interrupts &= !value,
            register::QUEUE_NUM => state.queues[selected].entries = value,
            register::QUEUE_READY => state.queues[selected].ready = value,
            register::QUEUE_NOTIFY if state.late => {}
            register::QUEUE_NOTIFY => state.process(value as usize),
            0x080..0x0b0 => {
                let part = &mut state.queues[selected].addresses[(offset as usize - 0x80) / 16];
                let shift = 8 * (offset & 4);
                *part = *part & !(0xffff_ffff << shift) | u64::from(value) << shift;
            }
            0x104 => state.actual = value,
            _ => panic!("write of {value:#x} to {offset:#x}"),
        }
    }
}

/// A ring of `entries` and its device, for tests of the ring alone.
pub(crate) fn ring(entries: u32) -> (Ring<'static>, Device) {
    let device = Device::new(0, 10);
    device.0.borrow_mut().entries_max = entries;
    let words = device.0.borrow().words;
    (Ring::start(&mut device.clone(), 0, words, SHARED_GPA).unwrap(), device)
}

/// The words that [`ring`] lies in.
pub(crate) fn words(device: &Device, range: Range<usize>) -> &'static [AtomicU32] {
    &device.0.borrow().words[range]
}
