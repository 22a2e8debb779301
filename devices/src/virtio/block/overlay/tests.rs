use std::io::Write;

use proptest::prelude::*;

use super::*;
use crate::virtio::block::Medium;

/// 100 blocks and a part of one.
const BYTES: u64 = 100 * BLOCK_BYTES + 1536;

fn base() -> (File, Vec<u8>) {
    let content: Vec<u8> = (0..BYTES).map(|at| (at / 512 + at % 251) as u8).collect();
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(&content).unwrap();
    (file, content)
}

fn write(medium: &mut Medium, at: u64, bytes: &[u8]) {
    let mut bytes = bytes.to_vec();
    medium.seek(at).unwrap();
    medium.write_all_volatile(&VolatileSlice::from(&mut bytes[..])).unwrap();
}

fn read(medium: &mut Medium, at: u64, bytes: usize) -> Vec<u8> {
    let mut read = vec![0xaa; bytes];
    medium.seek(at).unwrap();
    medium.read_exact_volatile(&mut VolatileSlice::from(&mut read[..])).unwrap();
    read
}

fn all(file: &File) -> Vec<u8> {
    let mut content = vec![0; file.metadata().unwrap().len() as usize];
    file.read_exact_at(&mut content, 0).unwrap();
    content
}

#[derive(Clone, Debug)]
enum Act {
    Write(u64, Vec<u8>),
    Zero(u64, u64),
    Discard(u64, u64),
    Sync,
    Reopen,
}

fn acts() -> impl Strategy<Value = Vec<Act>> {
    let range =
        || (0..BYTES / 512, 1..40_u64).prop_map(|(at, n)| (at * 512, (n * 512).min(BYTES - at * 512)));
    let act = prop_oneof![
        4 => (range(), any::<u8>()).prop_map(|((at, n), with)| Act::Write(at, vec![with; n as usize])),
        1 => range().prop_map(|(at, n)| Act::Zero(at, n)),
        1 => range().prop_map(|(at, n)| Act::Discard(at, n)),
        1 => Just(Act::Sync),
        1 => Just(Act::Reopen),
    ];
    prop::collection::vec(act, 1..20)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// It reads as a disk does that was written whole, also when it was opened again, and its base is never written.
    #[test]
    fn it_is_as_a_disk_of_its_own(acts in acts(), is_kept in any::<bool>()) {
        let (file, original) = base();
        let (top, mut expected) = (tempfile::tempfile().unwrap(), original.clone());
        let open = || {
            let (base, top) = (file.try_clone().unwrap(), top.try_clone().unwrap());
            let overlay = match is_kept {
                true => Overlay::kept(base, BYTES, top).unwrap(),
                false => Overlay::temporary(base, BYTES, top).unwrap(),
            };
            Medium::Overlay(Box::new(overlay))
        };
        let mut medium = open();
        for act in acts {
            match act {
                Act::Write(at, bytes) => {
                    write(&mut medium, at, &bytes);
                    expected[at as usize..at as usize + bytes.len()].copy_from_slice(&bytes);
                }
                Act::Zero(at, bytes) => {
                    medium.zero(at, bytes, false).unwrap();
                    expected[at as usize..(at + bytes) as usize].fill(0);
                }
                Act::Discard(at, bytes) => {
                    medium.discard(at, bytes).unwrap();
                    let now = read(&mut medium, at, bytes as usize);
                    let range = at as usize..(at + bytes) as usize;
                    for (now, expected) in now.iter().zip(&mut expected[range]) {
                        prop_assert!(*now == *expected || *now == 0);
                        *expected = *now;
                    }
                }
                Act::Sync => medium.sync().unwrap(),
                Act::Reopen if is_kept => {
                    drop(medium);
                    medium = open();
                }
                Act::Reopen => {}
            }
            prop_assert!(read(&mut medium, 0, BYTES as usize) == expected);
        }
        prop_assert!(all(&file) == original);
    }
}

#[test]
fn what_was_flushed_is_in_the_file() {
    let (file, _) = base();
    let top = tempfile::tempfile().unwrap();
    let open =
        |top: &File| Overlay::kept(file.try_clone().unwrap(), BYTES, top.try_clone().unwrap()).unwrap();
    let mut medium = Medium::Overlay(Box::new(open(&top)));
    write(&mut medium, 8192, &[1; 4096]);
    medium.sync().unwrap();
    write(&mut medium, 16384, &[2; 4096]);
    // As a host that dies here leaves it.
    let mut left = tempfile::tempfile().unwrap();
    left.write_all(&all(&top)).unwrap();
    let mut medium = Medium::Overlay(Box::new(open(&left)));
    assert_eq!(read(&mut medium, 8192, 4096), [1; 4096]);
    let base = all(&file);
    assert_eq!(read(&mut medium, 16384, 4096), base[16384..20480], "it was not flushed");
}

#[test]
fn another_file_is_no_overlay() {
    let (file, _) = base();
    let kept = |bytes, top: &File| {
        Overlay::kept(file.try_clone().unwrap(), bytes, top.try_clone().unwrap()).map(drop)
    };
    let mut other = tempfile::tempfile().unwrap();
    for rubbish in [&[7_u8; 3][..], &[0; 8192]] {
        other.write_all(rubbish).unwrap();
        assert!(matches!(kept(BYTES, &other), Err(OverlayError::Form)));
    }
    let top = tempfile::tempfile().unwrap();
    kept(BYTES, &top).unwrap();
    kept(BYTES, &top).unwrap();
    assert!(matches!(kept(BYTES - 512, &top), Err(OverlayError::Length { .. })));
    top.set_len(4096).unwrap();
    assert!(matches!(kept(BYTES, &top), Err(OverlayError::File(_))));
    let top = tempfile::tempfile().unwrap();
    kept(BYTES, &top).unwrap();
    let times = std::fs::FileTimes::new().set_modified(std::time::UNIX_EPOCH);
    file.set_times(times).unwrap();
    assert!(matches!(kept(BYTES, &top), Err(OverlayError::Changed)));
}

/// What was written goes to another one by the file and the map; from then on they are apart.
#[test]
fn a_copy_goes_on_from_what_was_written() {
    let (file, mut expected) = base();
    for is_kept in [false, true] {
        let (base, top) = (file.try_clone().unwrap(), tempfile::tempfile().unwrap());
        let overlay = match is_kept {
            true => Overlay::kept(base, BYTES, top).unwrap(),
            false => Overlay::temporary(base, BYTES, top).unwrap(),
        };
        let mut medium = Medium::Overlay(Box::new(overlay));
        for (at, bytes) in [(512, 5000), (BYTES - 1536, 1536)] {
            write(&mut medium, at, &vec![9; bytes]);
            expected[at as usize..at as usize + bytes].fill(9);
        }
        medium.zero(40960, 8192, true).unwrap();
        expected[40960..49152].fill(0);
        let (top, start) = medium.top();
        let mut copied = tempfile::tempfile().unwrap();
        copied.write_all(&all(top)[start as usize..]).unwrap();
        let map = medium.map().unwrap();
        let resumed = Overlay::resumed(file.try_clone().unwrap(), BYTES, copied, map.clone()).unwrap();
        let mut resumed = Medium::Overlay(Box::new(resumed));
        assert!(read(&mut resumed, 0, BYTES as usize) == expected);
        write(&mut medium, 0, &[1; 4096]);
        write(&mut resumed, 4096, &[2; 4096]);
        assert!(read(&mut resumed, 0, 4096) == expected[..4096]);
        assert!(read(&mut medium, 4096, 4096) == expected[4096..8192]);
        let (base, top) = (file.try_clone().unwrap(), tempfile::tempfile().unwrap());
        let refused = Overlay::resumed(base, BYTES, top, map[1..].to_vec());
        assert!(matches!(refused, Err(OverlayError::Map { .. })), "{refused:?}");
    }
}
