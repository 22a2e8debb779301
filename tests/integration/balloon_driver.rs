//! The built-in guest's balloon driver against the VMM's balloon device, without a VM between them.
//!
//! Rings lie in guest memory, as they do in a VM. What the device discards, the guest finds zeroed.
#![expect(unsafe_code, reason = "the driver wants its part of guest memory as one slice")]

use std::collections::HashSet;
use std::io;
use std::ops::Range;
use std::slice;
use std::sync::atomic::AtomicU32;
use std::sync::{Arc, Mutex, MutexGuard};

use devices::GuestMemory;
use devices::bus::BusDevice;
use devices::interrupt::IrqLine;
use devices::reclaim::{Gpa, Reclaim};
use devices::virtio::balloon::{Balloon, Config, Handle};
use devices::virtio::mmio::MmioTransport;
use guest::content::{PAGE_SIZE, PAGE_WORDS, Page};
use guest::protocol::Reply;
use guest::service::{Out, Port, Service, Wait};
use guest::virtio::balloon::{Driver, Frames, PageMap, SHARED_WORDS};
use guest::virtio::{Transport, register};
use guest::workload::{Pages, Workload};
use vm_memory::{GuestAddress, GuestMemoryBackend};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

const SHARED_GPA: u64 = 0x1_0000;
const LOW_BYTES: usize = 16 << 20;
const HIGH_BYTES: usize = 8 << 20;
const FRAMES: Frames = Frames { base: 1 << 20, low_count: 3840, high_count: 2048 };
const QUEUES: u32 = 5;
const FILL: &str = "fill seed=1 common=7 zero=10 common_pct=40 dup=10 unique=40";

/// Pages, by index, that the host has discarded and that were not looked at since.
#[derive(Clone, Default)]
struct Discarded(Arc<Mutex<HashSet<u64>>>);

impl Reclaim for Discarded {
    fn discard(&self, range: Range<Gpa>) -> io::Result<()> {
        let pfns = range.start.0 / PAGE_SIZE as u64..range.end.0 / PAGE_SIZE as u64;
        self.0.lock().expect("no panic").extend(pfns.filter_map(|pfn| FRAMES.page(pfn)));
        Ok(())
    }
}

struct Memory {
    pages: Vec<Page>,
    discarded: Discarded,
}

impl Pages for Memory {
    fn count(&self) -> u64 {
        FRAMES.count()
    }

    fn page(&mut self, index: u64) -> &mut Page {
        if self.discarded.0.lock().expect("no panic").remove(&index) {
            self.pages[index as usize] = [0; PAGE_WORDS];
        }
        &mut self.pages[index as usize]
    }

    fn release(&mut self, _pages: Range<u64>) {}
}

#[derive(Clone)]
struct Registers(Arc<Mutex<MmioTransport>>);

impl Registers {
    fn lock(&self) -> MutexGuard<'_, MmioTransport> {
        self.0.lock().expect("no panic")
    }
}

impl Transport for Registers {
    fn read(&mut self, offset: u32) -> u32 {
        let mut data = [0; 4];
        self.lock().read(offset.into(), &mut data);
        u32::from_le_bytes(data)
    }

    fn write(&mut self, offset: u32, value: u32) {
        self.lock().write(offset.into(), &value.to_le_bytes());
    }
}

#[derive(Default)]
struct Sent(Vec<String>);

impl Out for Sent {
    fn send(&mut self, _port: Port, reply: &Reply) {
        self.0.push(reply.to_string());
    }
}

struct Guest {
    service: Service<'static, Memory, Registers>,
    registers: Registers,
    handle: Handle,
    now_micros: u64,
}

impl Guest {
    fn new(config: Config) -> Self {
        let ranges = [(GuestAddress(0), LOW_BYTES), (GuestAddress(1 << 32), HIGH_BYTES)];
        let ram = Arc::new(GuestMemory::from_ranges(&ranges).expect("guest memory"));
        let shared = ram.get_host_address(GuestAddress(SHARED_GPA)).expect("in RAM").cast::<AtomicU32>();
        // It must outlive the slice below.
        std::mem::forget(Arc::clone(&ram));
        // SAFETY: page-aligned, inside one mapping that is never unmapped, zeroed, and touched by
        // both sides through atomics and volatile accesses only.
        let words = unsafe { slice::from_raw_parts(shared, SHARED_WORDS) };
        let discarded = Discarded::default();
        let (balloon, handle) = Balloon::new(config, &ram, Box::new(discarded.clone()));
        let irq = IrqLine::new(EventFd::new(EFD_NONBLOCK).expect("an eventfd"));
        let registers = Registers(Arc::new(Mutex::new(MmioTransport::new(ram, Box::new(balloon), irq))));
        let map = vec![0; PageMap::words(FRAMES.count())].leak();
        let pages = PageMap::new(FRAMES, map);
        let mut driver = Driver::new(registers.clone(), words, SHARED_GPA, pages, FRAMES.count());
        driver.on().expect("the device starts");
        let memory = Memory { pages: vec![[0; PAGE_WORDS]; FRAMES.count() as usize], discarded };
        let generations = vec![0; FRAMES.count() as usize].leak();
        let service = Service::with_balloon(Workload::new(memory, generations), Some(driver));
        let mut guest = Self { service, registers, handle, now_micros: 0 };
        guest.settle();
        guest
    }

    fn settle(&mut self) -> Vec<String> {
        let mut out = Sent::default();
        for _ in 0..5000 {
            self.service.poll_balloon();
            match self.service.step(self.now_micros, &mut out) {
                // A VMM wakes a guest that has not seen an interrupt.
                Wait::Forever if self.registers.read(register::INTERRUPT_STATUS) != 0 => {}
                Wait::Forever => return out.0,
                Wait::No => {}
                Wait::Millis(millis) => {
                    self.now_micros += u64::from(millis) * 1000;
                    // As the event loop does for what a bounded pass left behind.
                    for queue in 0..QUEUES {
                        self.registers.lock().notify(queue as usize);
                    }
                }
            }
        }
        panic!("no end: {:?}", out.0);
    }

    #[track_caller]
    fn say(&mut self, line: &str) -> String {
        let mut out = Sent::default();
        assert_eq!(self.service.line(Port::Control, Ok(line), self.now_micros, &mut out), None);
        out.0.extend(self.settle());
        out.0.retain(|line| !line.starts_with("progress "));
        assert_eq!(out.0.len(), 1, "{line}: {:?}", out.0);
        out.0.remove(0)
    }

    fn target(&mut self, pages: u32) {
        self.handle.set_target(pages);
        self.settle();
    }

    #[track_caller]
    fn assert_right(&mut self, filled: u64) {
        let expected = format!("ok command=verify checked={filled} mismatched=0 first=none");
        assert_eq!(self.say("verify"), expected);
        assert_eq!(self.handle.held_pages(), u64::from(self.handle.actual_pages()));
        let checked = self.say("balloon check");
        assert!(checked.ends_with(" nonzero=0"), "{checked}");
        assert_eq!((self.registers.lock().violations(), self.handle.counters().refused), (0, 0));
    }
}

fn all() -> Config {
    Config { target_pages: 0, deflate_on_oom: true, statistics: true, hinting: true, reporting: true }
}

#[test]
fn any_choice_of_features_works() {
    for bits in 0..16 {
        let on = |bit: u32| bits >> bit & 1 != 0;
        let config = Config {
            target_pages: 100,
            deflate_on_oom: on(0),
            statistics: on(1),
            hinting: on(2),
            reporting: on(3),
        };
        let mut guest = Guest::new(config);
        assert_eq!(guest.handle.actual_pages(), 100, "{config:?}");
        assert_eq!(guest.say(&format!("{FILL} pages=3000")), "ok command=fill pages=3000");
        guest.target(1000);
        assert_eq!(guest.handle.actual_pages(), 1000);
        guest.say("free percent=50");
        guest.assert_right(1500);
        assert_eq!(guest.handle.counters().reported_bytes, if on(3) { 1500 * 4096 } else { 0 });
        assert_eq!(guest.handle.request_statistics(), on(1));
        guest.settle();
        assert_eq!(guest.handle.statistics().is_some(), on(1));
        guest.target(0);
        assert_eq!(guest.handle.held_pages(), 0);
        guest.assert_right(1500);
    }
}

#[test]
fn a_run_of_hinting_is_followed_from_its_begin_to_its_end() {
    let mut guest = Guest::new(all());
    guest.say(&format!("{FILL} pages=3000"));
    guest.target(500);
    let free_bytes = (FRAMES.count() - 3000 - 500) * PAGE_SIZE as u64;
    for (run, acknowledge) in [(1, false), (2, true)] {
        guest.handle.start_hinting(acknowledge).expect("hinting");
        guest.settle();
        let report = guest.say("balloon report");
        assert_eq!(guest.handle.counters().hinted_bytes, run * free_bytes, "{report}");
        assert_eq!(guest.handle.hinting().expect("hinting").guest_cmd, Some(0), "{report}");
        let stands = if acknowledge { "hinted=0 hinting=idle" } else { "hinting=finished" };
        assert!(report.contains(stands), "{report}");
        guest.handle.stop_hinting().expect("hinting");
        guest.settle();
        let report = guest.say("balloon report");
        assert!(report.contains("hinted=0 hinting=idle hint_cmd=1"), "{report}");
        guest.assert_right(3000);
    }
}

#[test]
fn a_fill_during_a_run_of_hinting_keeps_what_it_writes() {
    let mut guest = Guest::new(all());
    guest.handle.start_hinting(false).expect("hinting");
    // The run has begun and is not over.
    guest.service.poll_balloon();
    guest.service.step(0, &mut Sent::default());
    assert_eq!(guest.say(&format!("{FILL} pages=5000")), "ok command=fill pages=5000");
    guest.handle.stop_hinting().expect("hinting");
    guest.settle();
    guest.assert_right(5000);
}
