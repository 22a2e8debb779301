//! Guests whose rings are anything, from a numbered pseudo-random source: an input that fails is
//! run again by its number.

use splitmix::SplitMix64;

use super::*;

/// The release build runs many (`tests/run`), the debug build a few.
const INPUTS: u64 = if cfg!(debug_assertions) { 300 } else { 10_000 };
const STEPS: u64 = 40;

struct Random(SplitMix64);

impl Random {
    fn any(&mut self) -> u64 {
        self.0.draw()
    }

    fn below(&mut self, end: u64) -> u64 {
        self.any() % end
    }

    fn pick<const N: usize>(&mut self, from: [u64; N]) -> u64 {
        from[self.below(N as u64) as usize]
    }

    fn address(&mut self) -> u64 {
        let (near, any, below) = (BUFFERS + self.below(0x1_0000), self.any(), self.below(100));
        let edge = self.pick([0, LOW_RAM, HIGH_RAM_START, HIGH_RAM_END]).wrapping_sub(below);
        self.pick([near, near, near, near, near, near, edge, any])
    }

    fn bytes(&mut self) -> u64 {
        let (small, any) = (self.below(2000), self.any());
        self.pick([0, 1, 12, small, small, small, small, 0x1000, 0x1_0000, MAX_BYTES as u64, any])
    }
}

/// A guest that does anything. Returns whether frames went out, and came in.
fn hostile(input: u64) -> [bool; 2] {
    let mut random = Random(SplitMix64::new(input));
    let mut guest = Guest::new(None);
    let mut reached = [false; 2];
    for step in 0..STEPS {
        if step == 0 || guest.driver.status() & NEEDS_RESET != 0 || random.below(20) == 0 {
            let features = random.any();
            guest.start(features & (OFFERED | EVENT_IDX) | TRANSPORT_FEATURES & !EVENT_IDX);
        }
        let queue = random.below(2) as usize;
        let usual = if queue == RECEIVE { WRITE } else { 0 };
        for _ in 0..random.below(6) {
            let slot = random.below(16);
            let (any, indirect) = (random.any(), u64::from(INDIRECT));
            let (alone, joined) = (u64::from(usual), u64::from(usual | NEXT));
            let flags = random.pick([alone, alone, alone, joined, indirect, any]);
            let next = random.pick([slot + 1, any >> 16]);
            let descriptor = (random.address(), random.bytes() as u32, flags as u16, next as u16);
            guest.rings[queue].descriptor(slot as u16, descriptor);
        }
        for _ in 0..random.below(8) {
            let head = random.pick([0, 1, 2, 3, 4, 5, 6, 7, 8, 16, 0xffff]);
            guest.rings[queue].offer(head as u16);
        }
        if random.below(30) == 0 {
            guest.rings[queue].set_avail_idx(random.any() as u16);
        }
        guest.rings[queue].set_used_event(random.below(64) as u16);
        let bytes = random.bytes() as usize % (MAX_BYTES + 100);
        let _ = guest.host.send(&frame(bytes, 1));
        let before = guest.rings[RECEIVE].used_idx();
        guest.driver.transport.notify(queue);
        guest.poll();
        reached[1] |= guest.rings[RECEIVE].used_idx() != before;
        while let Some(frame) = guest.sent() {
            assert!((MIN_BYTES..=MAX_BYTES).contains(&frame.len()), "input {input}: {}", frame.len());
            reached[0] = true;
        }
    }
    // Whatever happened, a reset brings the device back.
    guest.start(ALL);
    let turns = (0..10).take_while(|_| guest.poll() == Progress::More).count();
    assert!(turns < 10, "input {input}");
    reached
}

#[test]
fn any_rings_are_survived() {
    let mut reached = [false; 2];
    for input in 0..INPUTS {
        let now = hostile(input);
        reached = [reached[0] | now[0], reached[1] | now[1]];
    }
    assert_eq!(reached, [true; 2], "what no input reaches is not tested");
}
