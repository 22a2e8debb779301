use proptest::prelude::*;

use super::*;

/// Remembers the last access.
#[derive(Default)]
struct Probe {
    last: Option<(u64, Vec<u8>)>,
}

impl BusDevice for Probe {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(offset as u8);
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        self.last = Some((offset, data.to_vec()));
    }
}

fn probe() -> Arc<Mutex<Probe>> {
    Arc::default()
}

#[test]
fn an_access_reaches_the_device_with_its_offset() {
    let mut bus = Bus::default();
    let (a, b) = (probe(), probe());
    bus.insert(0x3f8, 8, "a", a.clone()).unwrap();
    bus.insert(0x400, 8, "b", b.clone()).unwrap();
    assert!(bus.write(0x3ff, &[7]));
    assert_eq!(a.lock().unwrap().last, Some((7, vec![7])));
    assert_eq!(b.lock().unwrap().last, None);
    let mut data = [0; 2];
    assert!(bus.read(0x402, &mut data));
    assert_eq!(data, [2, 2]);
}

#[test]
fn an_address_without_a_device_reads_as_an_open_bus() {
    let mut bus = Bus::default();
    bus.insert(0x10, 4, "a", probe()).unwrap();
    for (addr, len) in [(0xf, 1), (0x14, 1), (0x13, 2), (0xf, 2), (u64::MAX, 2), (0x10, 0)] {
        let mut data = vec![0; len];
        assert!(!bus.read(addr, &mut data), "{addr:#x}+{len}");
        assert!(data.iter().all(|&b| b == 0xff));
        assert!(!bus.write(addr, &data), "{addr:#x}+{len}");
    }
}

#[test]
fn an_access_across_two_neighbours_is_refused() {
    let mut bus = Bus::default();
    let (a, b) = (probe(), probe());
    bus.insert(0, 4, "a", a.clone()).unwrap();
    bus.insert(4, 4, "b", b.clone()).unwrap();
    assert!(!bus.write(2, &[0; 4]));
    assert!(a.lock().unwrap().last.is_none() && b.lock().unwrap().last.is_none());
}

#[test]
fn an_overlap_names_both() {
    let mut bus = Bus::default();
    bus.insert(0x60, 5, "i8042", probe()).unwrap();
    let error = bus.insert(0x64, 2, "other", probe()).unwrap_err();
    assert_eq!(error.to_string(), "device other at 0x64..=0x65 overlaps device i8042 at 0x60..=0x64");
    // A range that encloses an existing one.
    assert!(matches!(bus.insert(0, 0x1000, "big", probe()), Err(BusError::Overlap { .. })));
}

#[test]
fn empty_and_endless_ranges_are_refused_and_the_last_address_is_usable() {
    let mut bus = Bus::default();
    assert_eq!(bus.insert(5, 0, "e", probe()), Err(BusError::Empty { name: "e", base: 5 }));
    assert!(matches!(bus.insert(u64::MAX, 2, "p", probe()), Err(BusError::PastEnd { .. })));
    bus.insert(u64::MAX, 1, "top", probe()).unwrap();
    assert!(bus.write(u64::MAX, &[1]));
}

proptest! {
    /// Against the plainest model there is: a list of ranges.
    #[test]
    fn agrees_with_a_list(
        ranges in prop::collection::vec((0u64..200, 0u64..20), 0..30),
        accesses in prop::collection::vec((0u64..230, 0usize..9), 0..60),
    ) {
        let mut bus = Bus::default();
        let mut model: Vec<(u64, u64)> = Vec::new();
        for (base, len) in ranges {
            let fits = len > 0 && model.iter().all(|&(b, l)| base + len <= b || b + l <= base);
            prop_assert_eq!(bus.insert(base, len, "x", probe()).is_ok(), fits);
            if fits {
                model.push((base, len));
            }
        }
        for (addr, len) in accesses {
            let end = addr + len as u64;
            let hit = model.iter().find(|&&(b, l)| len > 0 && b <= addr && end <= b + l);
            let mut data = vec![0; len];
            prop_assert_eq!(bus.read(addr, &mut data), hit.is_some());
            let expected = hit.map_or(0xff, |&(b, _)| (addr - b) as u8);
            prop_assert!(data.iter().all(|&byte| byte == expected));
        }
    }
}
