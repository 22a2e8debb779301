//! Chains, and the ring loop, from the point of view of a driver that breaks every rule.

use std::sync::Arc;

use proptest::prelude::*;
use virtio_queue::{Queue, QueueT};
use vm_memory::bitmap::BitmapSlice;
use vm_memory::{VolatileMemoryError, VolatileSlice};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::*;
use crate::interrupt::IrqLine;
use crate::virtio::drain::{Completion, MAX_PASSES, complete, drain};
use crate::virtio::setup::QueueSetup;
use crate::virtio::testing::*;
use crate::virtio::{Interrupt, Progress};
use crate::warn::Limited;

/// A queue with both its sides and no transport.
struct Bench {
    memory: Arc<GuestMemory>,
    ring: Ring,
    queue: Queue,
    interrupt: Interrupt,
    irq: EventFd,
    broken: Limited,
}

impl Bench {
    fn new(size: u16, event_idx: bool) -> Self {
        let memory = ram();
        let ring = Ring::new(&memory, 0, size);
        let setup = QueueSetup {
            size: u32::from(size),
            desc_table: ring.desc,
            avail_ring: ring.avail,
            used_ring: ring.used,
            ready: true,
        };
        let queue = setup.build(size, event_idx, &memory).unwrap();
        let irq = EventFd::new(EFD_NONBLOCK).unwrap();
        let interrupt = Interrupt::new(IrqLine::new(irq.try_clone().unwrap()));
        Self { memory, ring, queue, interrupt, irq, broken: Limited::new("bench") }
    }

    fn drain(&mut self, each: impl FnMut(&mut Chain<'_>) -> Completion) -> Progress {
        drain(&mut self.queue, &self.memory, &self.interrupt, &self.broken, each).unwrap()
    }

    /// Offers `head` and returns the chains the device saw as (readable bytes, writable bytes).
    fn shapes(&mut self, head: u16) -> Vec<(u32, u32)> {
        self.ring.offer(head);
        let mut shapes = Vec::new();
        let progress = self.drain(|chain| {
            shapes.push((chain.readable_bytes(), chain.writable_bytes()));
            Completion::Written(1)
        });
        assert_eq!(progress, Progress::Idle);
        shapes
    }
}

#[test]
fn reading_and_writing_stream_across_buffers() {
    let mut bench = Bench::new(8, true);
    bench.memory.write_slice(b"abc", GuestAddress(BUFFERS)).unwrap();
    bench.memory.write_slice(b"defgh", GuestAddress(HIGH_RAM_START)).unwrap();
    bench.ring.descriptor(0, (BUFFERS, 3, NEXT, 3));
    bench.ring.descriptor(3, (HIGH_RAM_START, 5, NEXT, 1));
    bench.ring.descriptor(1, (BUFFERS + 100, 2, WRITE | NEXT, 2));
    bench.ring.descriptor(2, (BUFFERS + 200, 4, WRITE, 0));
    bench.ring.offer(0);
    bench.drain(|chain| {
        assert_eq!((chain.head(), chain.readable().len(), chain.writable().len()), (0, 2, 2));
        let mut data = [0; 4];
        assert_eq!((chain.read(&mut data), &data), (4, b"abcd"));
        let mut rest = [0; 10];
        assert_eq!((chain.read(&mut rest), &rest[..4]), (4, &b"efgh"[..]));
        assert_eq!(chain.read(&mut rest), 0);
        assert_eq!((chain.write(b"1"), chain.write(b"2345678"), chain.write(b"9")), (1, 5, 0));
        Completion::Written(6)
    });
    let mut written = [0; 2];
    bench.memory.read_slice(&mut written, GuestAddress(BUFFERS + 100)).unwrap();
    assert_eq!(&written, b"12");
    assert_eq!(bench.ring.used(0), (0, 6));
    assert_eq!(bench.broken.count(), 0);
}

/// A file that takes and gives 3 bytes at a time, and ends after 8.
struct Slow(Vec<u8>, Vec<u8>);

impl ReadVolatile for Slow {
    fn read_volatile<B: BitmapSlice>(
        &mut self,
        to: &mut VolatileSlice<'_, B>,
    ) -> Result<usize, VolatileMemoryError> {
        let bytes = to.len().min(3).min(self.0.len());
        to.write_slice(&self.0[..bytes], 0)?;
        self.0.drain(..bytes);
        Ok(bytes)
    }
}

impl WriteVolatile for Slow {
    fn write_volatile<B: BitmapSlice>(
        &mut self,
        from: &VolatileSlice<'_, B>,
    ) -> Result<usize, VolatileMemoryError> {
        let mut bytes = vec![0; from.len().min(3).min(8 - self.1.len())];
        from.read_slice(&mut bytes, 0)?;
        self.1.extend(&bytes);
        Ok(bytes.len())
    }
}

struct Unasked;

impl InFlight for Unasked {
    fn during(&self, _: std::ops::Range<Gpa>, transfer: &mut dyn FnMut()) {
        transfer();
    }
}

#[test]
fn a_file_that_moves_a_few_bytes_at_a_time_moves_all_of_them() {
    let mut bench = Bench::new(8, true);
    bench.memory.write_slice(b"abcdefghij", GuestAddress(BUFFERS)).unwrap();
    bench.ring.descriptor(0, (BUFFERS, 4, NEXT, 1));
    bench.ring.descriptor(1, (BUFFERS + 4, 6, NEXT, 2));
    bench.ring.descriptor(2, (BUFFERS + 100, 5, WRITE | NEXT, 3));
    bench.ring.descriptor(3, (BUFFERS + 200, 5, WRITE, 0));
    bench.ring.offer(0);
    bench.drain(|chain| {
        let mut file = Slow(b"ABCDEFGH".to_vec(), Vec::new());
        assert_eq!(chain.read_into(&mut file, 7).unwrap(), 7);
        assert_eq!(chain.write_from(&mut file, 7, &Unasked).unwrap(), 7);
        // Where they stopped before; and the file ends before the chain does.
        assert!(chain.read_into(&mut file, 100).is_err());
        assert_eq!(chain.write_from(&mut file, 100, &Unasked).unwrap(), 1);
        assert_eq!(file.1, b"abcdefgh");
        assert!(chain.write_last(b'!'));
        Completion::Written(0)
    });
    let read = |at| {
        let mut bytes = [0; 5];
        bench.memory.read_slice(&mut bytes, GuestAddress(at)).unwrap();
        bytes
    };
    assert_eq!((&read(BUFFERS + 100), &read(BUFFERS + 200)), (b"ABCDE", b"FGH\0!"));
}

#[test]
fn an_indirect_chain_is_followed() {
    let mut bench = Bench::new(4, true);
    bench.ring.descriptor(0, (BUFFERS, 32, INDIRECT, 0));
    bench.ring.descriptor_at(BUFFERS, 0, (BUFFERS + 0x1000, 10, NEXT, 1));
    bench.ring.descriptor_at(BUFFERS, 1, (BUFFERS + 0x2000, 20, WRITE, 0));
    assert_eq!(bench.shapes(0), [(10, 20)]);
}

#[test]
fn broken_chains_are_completed_with_nothing_and_counted() {
    type Make = fn(&Ring);
    let cases: [(&str, Make); 13] = [
        ("a loop of one", |ring| ring.descriptor(0, (BUFFERS, 8, NEXT, 0))),
        ("a loop of two", |ring| {
            ring.descriptor(0, (BUFFERS, 8, NEXT, 1));
            ring.descriptor(1, (BUFFERS, 8, NEXT, 0));
        }),
        ("next outside the table", |ring| ring.descriptor(0, (BUFFERS, 8, NEXT, 4))),
        ("outside RAM", |ring| ring.descriptor(0, (LOW_RAM, 8, WRITE, 0))),
        ("across the end of RAM", |ring| ring.descriptor(0, (HIGH_RAM_END - 4, 8, 0, 0))),
        ("across the hole", |ring| ring.descriptor(0, (LOW_RAM - 4, HIGH_RAM_START as u32, 0, 0))),
        ("the last address", |ring| ring.descriptor(0, (u64::MAX, 8, WRITE, 0))),
        ("longest", |ring| ring.descriptor(0, (BUFFERS, u32::MAX, WRITE, 0))),
        ("readable after writable", |ring| {
            ring.descriptor(0, (BUFFERS, 8, WRITE | NEXT, 1));
            ring.descriptor(1, (BUFFERS, 8, 0, 0));
        }),
        ("empty indirect table", |ring| ring.descriptor(0, (BUFFERS, 0, INDIRECT, 0))),
        ("indirect table of half a descriptor", |ring| ring.descriptor(0, (BUFFERS, 24, INDIRECT, 0))),
        ("indirect table outside RAM", |ring| ring.descriptor(0, (LOW_RAM, 64, INDIRECT, 0))),
        ("indirect table in an indirect table", |ring| {
            ring.descriptor(0, (BUFFERS, 16, INDIRECT, 0));
            ring.descriptor_at(BUFFERS, 0, (BUFFERS, 16, INDIRECT, 0));
        }),
    ];
    for (name, make) in cases {
        let mut bench = Bench::new(4, false);
        make(&bench.ring);
        assert!(bench.shapes(0).is_empty(), "{name}");
        assert_eq!(
            (bench.broken.count(), bench.ring.used_idx(), bench.ring.used(0)),
            (1, 1, (0, 0)),
            "{name}"
        );
        assert!(bench.irq.read().is_ok());
        // The next good chain goes through.
        bench.ring.descriptor(2, (BUFFERS, 8, 0, 0));
        assert_eq!(bench.shapes(2), [(8, 0)], "{name}");
    }
}

#[test]
fn an_indirect_chain_longer_than_the_queue_is_cut() {
    let mut bench = Bench::new(4, false);
    for (len, expected) in [(4u16, vec![(32, 0)]), (5, vec![])] {
        bench.ring.descriptor(0, (BUFFERS, 16 * 1000, INDIRECT, 0));
        for index in 0..len {
            let flags = if index + 1 == len { 0 } else { NEXT };
            bench.ring.descriptor_at(BUFFERS, index, (BUFFERS + 0x8000, 8, flags, index + 1));
        }
        assert_eq!(bench.shapes(0), expected);
    }
    assert_eq!(bench.broken.count(), 1);
}

#[test]
fn a_head_that_does_not_exist_is_skipped() {
    let mut bench = Bench::new(4, false);
    assert!(bench.shapes(4).is_empty());
    assert!(bench.shapes(u16::MAX).is_empty());
    assert_eq!((bench.broken.count(), bench.ring.used_idx()), (2, 0));
    bench.ring.descriptor(0, (BUFFERS, 8, 0, 0));
    assert_eq!(bench.shapes(0), [(8, 0)]);
}

#[test]
fn a_held_chain_is_completed_later() {
    let mut bench = Bench::new(4, false);
    bench.ring.descriptor(3, (BUFFERS, 8, 0, 0));
    bench.ring.offer(3);
    let mut head = 0;
    bench.drain(|chain| {
        head = chain.head();
        Completion::Held
    });
    assert_eq!(bench.ring.used_idx(), 0);
    assert!(bench.irq.read().is_err());
    complete(&mut bench.queue, &bench.memory, &bench.interrupt, head, 5).unwrap();
    assert_eq!((bench.ring.used_idx(), bench.ring.used(0)), (1, (3, 5)));
    assert!(bench.irq.read().is_ok());
    assert!(complete(&mut bench.queue, &bench.memory, &bench.interrupt, 4, 0).is_err());
}

#[test]
fn interrupts_are_suppressed_as_the_driver_asks() {
    let mut bench = Bench::new(4, false);
    bench.ring.descriptor(0, (BUFFERS, 8, 0, 0));
    bench.ring.set_avail_flags(1);
    bench.shapes(0);
    assert!(bench.irq.read().is_err(), "NO_INTERRUPT");
    bench.ring.set_avail_flags(0);
    bench.shapes(0);
    assert!(bench.irq.read().is_ok());

    let mut bench = Bench::new(4, true);
    bench.ring.descriptor(0, (BUFFERS, 8, 0, 0));
    bench.ring.set_used_event(2);
    for expected in [false, false, true, false] {
        bench.shapes(0);
        assert_eq!(bench.irq.read().is_ok(), expected);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    /// Random rings: the guest memory is the input. Every chain the device sees is within bounds,
    /// and the loop ends after a bounded number of chains, whatever it finds.
    #[test]
    fn rubbish_is_survived(
        size_shift in 0u32..5,
        event_idx in any::<bool>(),
        descriptors in prop::collection::vec(descriptor(), 16..40),
        heads in prop::collection::vec(prop_oneof![8 => 0u16..16, 1 => any::<u16>()], 1..17),
        avail_idx in prop_oneof![4 => 0u16..17, 1 => any::<u16>()],
    ) {
        let size = 1u16 << size_shift;
        let mut bench = Bench::new(size, event_idx);
        for (index, &descriptor) in descriptors.iter().enumerate() {
            bench.ring.descriptor(index as u16 % size, descriptor);
            bench.ring.descriptor_at(BUFFERS, index as u16, descriptor);
        }
        for &head in &heads {
            bench.ring.offer(head);
        }
        bench.ring.set_avail_idx(avail_idx);
        let mut chains = 0;
        let (memory, ring_size) = (bench.memory.clone(), usize::from(size));
        let mut data = vec![0x5a; 0x2_0000];
        let result = drain(&mut bench.queue, &bench.memory, &bench.interrupt, &bench.broken, |chain| {
            chains += 1;
            assert!(chain.readable().len() + chain.writable().len() <= ring_size);
            for buffer in chain.readable().iter().chain(chain.writable()) {
                let (start, len) = (GuestAddress(buffer.start.0), buffer.len_bytes as usize);
                assert!(memory.check_range(start, len, Permissions::ReadWrite));
            }
            let readable = chain.readable_bytes() as usize;
            assert_eq!(chain.read(&mut data), readable.min(0x2_0000));
            Completion::Written(chain.write(&data[..64]) as u32)
        });
        // Writing to the buffers may overwrite the ring itself, so that it goes on, but not for
        // ever.
        prop_assert!(chains <= MAX_PASSES * ring_size);
        if avail_idx > size {
            prop_assert!(result.is_err());
            prop_assert_eq!(chains, 0);
        }
        prop_assert!(bench.queue.size() == size);
    }
}

/// Mostly plausible, so that the walk gets further than the first descriptor.
fn descriptor() -> impl Strategy<Value = (u64, u32, u16, u16)> {
    let address = prop_oneof![
        6 => BUFFERS..LOW_RAM,
        1 => Just(BUFFERS),
        1 => 0..LOW_RAM,
        1 => HIGH_RAM_START - 100..HIGH_RAM_END + 100,
        1 => any::<u64>(),
    ];
    let len = prop_oneof![6 => 0u32..0x1000, 2 => (0u32..40).prop_map(|n| 16 * n), 1 => any::<u32>()];
    let flags = prop_oneof![8 => 0u16..4, 1 => Just(INDIRECT), 1 => any::<u16>()];
    let next = prop_oneof![8 => 0u16..16, 1 => any::<u16>()];
    (address, len, flags, next)
}
