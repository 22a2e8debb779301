//! Guests whose memory is the input: rings, lists and buffers from a numbered pseudo-random source.
//!
//! An input is a number, so one that fails is run again by that number alone. The release build
//! runs many (`tests/run`), the debug build a few.

use super::*;
use crate::bus::BusDevice;
use crate::virtio::Progress;
use splitmix::SplitMix64;

/// Of each kind.
const INPUTS: u64 = if cfg!(debug_assertions) { 300 } else { 10_000 };
/// Steps of a hostile guest.
const MAX_STEPS: u64 = 40;
/// Notifications after which a queue with a few good requests must be empty.
const MAX_TURNS: usize = 8;

/// Pages of the RAM below the hole, and of that above.
const PAGES: [Range<u64>; 2] = [0..LOW_RAM / 4096, HIGH_RAM_START / 4096..HIGH_RAM_END / 4096];

/// Numbers that look random.
struct Random(SplitMix64);

impl Random {
    fn new(seed: u64) -> Self {
        Self(SplitMix64::new(seed))
    }

    fn next(&mut self) -> u64 {
        self.0.draw()
    }

    fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }

    fn one_in(&mut self, of: u64) -> bool {
        self.below(of) == 0
    }

    fn pick<const N: usize>(&mut self, from: [u64; N]) -> u64 {
        from[self.below(N as u64) as usize]
    }

    /// An address in use, or next to one.
    fn address(&mut self) -> u64 {
        let near = [0, DATA, 0x1_0000 * (1 + self.below(5)), LOW_RAM, HIGH_RAM_START, HIGH_RAM_END, u64::MAX];
        let near = self.pick(near).wrapping_add(self.pick([0, 0, 4, 0x1000, 0x4000, 0x8000]));
        let any = self.next();
        let byte = self.below(HIGH_RAM_END);
        let page = self.below(HIGH_RAM_END) & !0xfff;
        self.pick([near, near.wrapping_sub(0x1000), near.wrapping_sub(3), page, page, byte, any])
    }

    fn len(&mut self) -> u32 {
        let (any, words, pages) = (self.next(), 4 * self.below(600), 4096 * self.below(20));
        self.pick([0, 1, 4, 4, 10, 100, words, words, words + 3, pages, pages, any]) as u32
    }

    /// A page frame number or a command ID.
    fn word(&mut self) -> u32 {
        let (any, low, around) = (self.next(), self.below(0x110), self.below(0x230));
        self.pick([0, 1, 2, 3, low, low, around, around, any]) as u32
    }

    /// A list as allocators make them: stretches up, down or on the spot, and single pages.
    fn list(&mut self) -> Vec<u32> {
        let mut pfns = Vec::new();
        let most = if self.one_in(50) { 5000 } else { 300 };
        let wanted = self.below(most);
        while (pfns.len() as u64) < wanted {
            let start = self.word();
            let step = self.pick([0, 1, 1, 1, u64::MAX, u64::MAX, 2]) as u32;
            let len = self.pick([1, 1, 2, 16, 100]);
            pfns.extend((0..len as u32).map(|i| start.wrapping_add(i.wrapping_mul(step))));
        }
        pfns
    }
}

/// Says which input it was that failed.
struct Input(u64);

impl Drop for Input {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("input {}", self.0);
        }
    }
}

/// A guest's memory, written without asking whether that makes sense.
struct Scribble {
    memory: Arc<GuestMemory>,
    random: Random,
}

impl Scribble {
    fn bytes(&self, at: u64, value: u64, len: usize) {
        // What does not fit into RAM is not written.
        let _ = self.memory.write_slice(&value.to_le_bytes()[..len], GuestAddress(at));
    }

    /// Overwrites something, rings of `queue` in most cases.
    fn something(&mut self, queue: u64) {
        let base = 0x1_0000 * (1 + queue);
        match self.random.below(16) {
            0 => {
                let (at, value) = (self.random.address(), self.random.next());
                self.bytes(at, value, 8);
            }
            1..=3 => {
                let first = DATA + 4 * self.random.below(64);
                (0..16).for_each(|i| {
                    let word = self.random.word();
                    self.bytes(first + 4 * i, word.into(), 4);
                });
            }
            4..=8 => {
                let (slot, head) = (self.random.below(256), self.random.below(16));
                self.bytes(base + 0x4004 + 2 * slot, head, 2);
            }
            9 => {
                let slot = self.random.below(16);
                self.descriptor(DATA + 16 * slot, queue);
            }
            _ => {
                let slot = self.random.below(16);
                self.descriptor(base + 16 * slot, queue);
            }
        }
    }

    /// A descriptor as the queue could have it, or any.
    fn descriptor(&mut self, at: u64, queue: u64) {
        let random = &mut self.random;
        let (mut address, mut len, mut flags) = (DATA + 4 * random.below(64), 4 * random.below(200), 0);
        match queue {
            2 => len = 10 * random.below(20) + random.pick([0, 0, 0, 3]),
            3 if random.one_in(2) => len = 4,
            3 | 4 => {
                address = 4096 * (random.pick([0, 0x80, 0x200]) + random.below(9));
                (len, flags) = (4096 * (1 + random.below(8)), WRITE.into());
            }
            _ => {}
        }
        if random.one_in(4) {
            flags |= u64::from(NEXT);
        }
        let mut next = random.below(16);
        if random.one_in(12) {
            let any = random.next();
            let change = random.below(5);
            address = if change == 0 { random.address() } else { address };
            len = if change == 1 { random.len().into() } else { len };
            flags = if change == 2 { any } else { flags ^ u64::from(change == 3) << 1 };
            next = if change == 4 { any } else { next };
        }
        self.bytes(at, address, 8);
        self.bytes(at + 8, len & 0xffff_ffff | (flags & 0xffff) << 32 | next << 48, 8);
    }

    /// Makes some more heads available.
    fn publish(&mut self, queue: u64) {
        let idx = GuestAddress(0x1_0000 * (1 + queue) + 0x4002);
        let more = if self.random.one_in(40) { self.random.next() } else { self.random.below(24) };
        let now: u16 = self.memory.read_obj(idx).unwrap();
        self.bytes(idx.0, now.wrapping_add(more as u16).into(), 2);
    }
}

fn call(handle: &Handle, random: &mut Random) {
    match random.below(7) {
        0 => handle.set_target(random.word()),
        1 => _ = handle.request_statistics(),
        2 => _ = handle.start_hinting(random.one_in(2)),
        3 => _ = handle.stop_hinting(),
        4 => _ = (handle.hinting(), handle.has_driver()),
        5 => _ = handle.statistics().map(|statistics| statistics.iter().count()),
        _ => _ = handle.held(),
    }
}

/// A guest that does anything. The host in the tests checks every discard. Returns what happened.
fn hostile(input: u64) -> Counters {
    let _input = Input(input);
    let mut random = Random::new(input);
    let mut guest = Guest::new(ALL);
    let memory = guest.driver.memory.clone();
    let mut scribble = Scribble { memory: memory.clone(), random: Random::new(!input) };
    {
        let mut notes = guest.host.0.lock().unwrap();
        notes.fails = random.one_in(8);
        if random.one_in(3) {
            // Another vCPU that writes while the device reads.
            let mut other = Scribble { memory, random: Random::new(input.rotate_left(32)) };
            notes.meanwhile = Some(Box::new(move || {
                let queue = other.random.below(5);
                other.something(queue);
            }));
        }
    }
    let mut before = guest.handle.counters();
    for step in 0..MAX_STEPS {
        if step == 0 || guest.driver.status() & NEEDS_RESET != 0 || random.one_in(40) {
            // EVENT_IDX too; and mostly all queues, so that each is what its index says.
            let features = if random.one_in(3) { random.next() } else { ALL_FEATURES };
            guest.start(features & ALL_FEATURES | random.next() & 1 << 29);
            assert_eq!(guest.handle.held_pages(), 0);
            (0..5).for_each(|queue| (0..48).for_each(|_| scribble.something(queue)));
        }
        let queue = random.below(6);
        match random.below(10) {
            0 | 1 => call(&guest.handle, &mut random),
            2 => {
                let (at, len) = (0x100 + random.below(24), random.below(9) as usize);
                guest.driver.transport.write(at, &random.next().to_le_bytes()[..len]);
                guest.driver.transport.read(at, &mut [0; 8][..len]);
            }
            _ => {
                (0..4).for_each(|_| scribble.something(queue % 5));
                scribble.publish(queue % 5);
                guest.driver.transport.notify(queue as usize);
            }
        }
        guest.discarded();
        let held = guest.held();
        let inside = |&(first, end): &(u64, u64)| {
            PAGES.iter().any(|region| region.start <= first && first < end && end <= region.end)
        };
        assert!(held.iter().all(inside), "{held:x?}");
        assert!(held.windows(2).all(|pair| pair[0].1 < pair[1].0), "{held:x?}");
        let after = guest.handle.counters();
        assert!(never_back(&before, &after), "{before:?} {after:?}");
        before = after;
    }
    // Whatever happened, a reset brings the device back.
    guest.start(ALL_FEATURES);
    {
        let mut notes = guest.host.0.lock().unwrap();
        (notes.fails, notes.meanwhile) = (false, None);
    }
    guest.discarded();
    guest.list(INFLATE, &[3, 4]);
    assert_eq!((guest.held(), guest.discarded()), (vec![(3, 5)], vec![(3, 5)]));
    before
}

fn numbers(c: &Counters) -> [u64; 7] {
    let Counters { inflated_pages, deflated_pages, refused, failed_discards, .. } = *c;
    let bytes = [c.reclaimed_bytes, c.reported_bytes, c.hinted_bytes];
    [inflated_pages, deflated_pages, refused, failed_discards, bytes[0], bytes[1], bytes[2]]
}

fn never_back(before: &Counters, after: &Counters) -> bool {
    numbers(before).iter().zip(numbers(after)).all(|(before, after)| *before <= after)
}

/// A set of pages, by page number.
#[derive(Debug, PartialEq)]
struct Set([bool; (HIGH_RAM_END / 4096) as usize]);

impl Default for Set {
    fn default() -> Self {
        Self([false; (HIGH_RAM_END / 4096) as usize])
    }
}

impl Set {
    fn of(ranges: &[(u64, u64)]) -> Self {
        let mut set = Self::default();
        ranges.iter().for_each(|&(first, end)| set.0[first as usize..end as usize].fill(true));
        set
    }
}

/// A guest whose rings are right and whose lists are anything, against a set of pages.
fn modelled(input: u64) {
    let _input = Input(input);
    let mut random = Random::new(input);
    let mut guest = Guest::running(ALL, ALL_FEATURES);
    let mut held = Set::default();
    let mut counters = Counters::default();
    for _ in 0..1 + random.below(6) {
        let queue = random.pick([INFLATE as u64, INFLATE as u64, DEFLATE as u64]) as usize;
        let mut given = Set::default();
        let chains = 1 + random.below(4);
        let before = guest.rings[queue].used_idx();
        for chain in 0..chains {
            let pfns = random.list();
            offer(&mut guest, queue, chain, &pfns, &mut random, &mut counters);
            for page in pfns.into_iter().map(u64::from) {
                if !PAGES.iter().any(|region| region.contains(&page)) {
                    counters.refused += 1;
                } else if queue == INFLATE {
                    counters.inflated_pages += 1;
                    given.0[page as usize] = true;
                    held.0[page as usize] = true;
                } else {
                    counters.deflated_pages += 1;
                    held.0[page as usize] = false;
                }
            }
        }
        let progress = (0..MAX_TURNS).map(|_| guest.driver.transport.notify(queue));
        assert!(progress.collect::<Vec<_>>().contains(&Progress::Idle));
        assert_eq!(guest.rings[queue].used_idx(), before.wrapping_add(chains as u16));

        let discarded = guest.discarded();
        let pages: u64 = discarded.iter().map(|(first, end)| end - first).sum();
        counters.reclaimed_bytes += 4096 * pages;
        assert_eq!(Set::of(&discarded), given);
        assert_eq!(Set::of(&guest.held()), held);
        assert_eq!(guest.handle.counters(), counters);
    }
}

/// Offers a list in buffers cut at any byte, with up to three bytes too many and perhaps a buffer
/// to write.
fn offer(
    guest: &mut Guest,
    queue: usize,
    chain: u64,
    pfns: &[u32],
    random: &mut Random,
    counters: &mut Counters,
) {
    let mut list = bytes(pfns);
    if random.one_in(4) {
        list.resize(list.len() + random.below(4) as usize, 0xee);
    }
    counters.refused += u64::from(list.len() < 4 || !list.len().is_multiple_of(4));
    let at = DATA + 0x1_0000 * chain;
    guest.driver.memory.write_slice(&list, GuestAddress(at)).unwrap();
    let mut buffers = Vec::new();
    let mut done = 0;
    while done < list.len() {
        let left = list.len() - done;
        // The last of eight takes the rest: a chain has its own sixteen descriptors.
        let len = if buffers.len() < 8 { 1 + random.below(left as u64) as usize } else { left };
        buffers.push((at + done as u64, len as u32, 0));
        done += len;
    }
    if buffers.is_empty() {
        buffers.push((at, 0, 0));
    }
    if random.one_in(8) {
        buffers.push((at, 64, WRITE));
        counters.refused += 1;
    }
    let first = 16 * chain as u16;
    let ring = &mut guest.rings[queue];
    for (index, &(address, len, flags)) in (first..).zip(&buffers) {
        let more = if usize::from(index - first) + 1 < buffers.len() { NEXT } else { 0 };
        ring.descriptor(index, (address, len, flags | more, index + 1));
    }
    ring.offer(first);
}

#[test]
fn any_memory_is_survived() {
    let mut reached = [false; 7];
    for input in 0..INPUTS {
        let counters = hostile(input);
        for (reached, number) in reached.iter_mut().zip(numbers(&counters)) {
            *reached |= number > 0;
        }
    }
    assert_eq!(reached, [true; 7], "what no input reaches is not tested");
}

#[test]
fn held_pages_are_those_of_a_set() {
    (0..INPUTS).for_each(modelled);
}
