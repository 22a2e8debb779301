//! Bytes that are nearly a state, made from one that is: what a careless or hostile hand makes of a
//! state file. The same from every seed.

use splitmix::SplitMix64;

use super::container::{self, Section};

/// Something that is wrong with `whole`, which is a state.
///
/// Half of them have the right digests: those are no proof, for the writer of the sections writes
/// them too.
pub fn damaged(whole: &[u8], dice: &mut SplitMix64) -> Vec<u8> {
    match dice.below(8) {
        0 => whole[..dice.below(whole.len() as u64) as usize].to_vec(),
        1..4 => bytes(whole.to_vec(), dice),
        _ => sections(whole, dice),
    }
}

/// With sections that were changed, and the digests made to fit.
pub fn sections(whole: &[u8], dice: &mut SplitMix64) -> Vec<u8> {
    let found = container::read(whole).unwrap_or_default();
    let mut all: Vec<(u32, u32, Vec<u8>)> =
        found.iter().map(|section| (section.kind, section.version, section.bytes().to_vec())).collect();
    let at = dice.below(all.len() as u64) as usize;
    match dice.below(12) {
        0 => _ = all.remove(at),
        1 => all.push(all[at].clone()),
        2 => all[at].0 = dice.below(12) as u32,
        3 => all[at].1 = [0, 2, u32::MAX][dice.below(3) as usize],
        4 => all[at].2 = (0..dice.below(300)).map(|_| dice.draw() as u8).collect(),
        _ => all[at].2 = bytes(std::mem::take(&mut all[at].2), dice),
    }
    let sections: Vec<_> =
        all.into_iter().map(|(kind, version, bytes)| Section::raw(kind, version, bytes)).collect();
    container::write(&sections)
}

/// Some of them are others, fewer or more.
fn bytes(mut bytes: Vec<u8>, dice: &mut SplitMix64) -> Vec<u8> {
    for _ in 0..=dice.below(4) {
        let at = dice.below(bytes.len().max(1) as u64) as usize;
        match dice.below(6) {
            _ if bytes.is_empty() => bytes.push(dice.draw() as u8),
            0 | 1 => bytes[at] ^= 1 << dice.below(8),
            2 => bytes[at] = [0, 1, 0x7f, 0x80, 0xff][dice.below(5) as usize],
            3 => bytes.truncate(at),
            // A length of up to 2^63 where a short one was.
            4 => _ = bytes.splice(at..=at, [0xff; 8].into_iter().chain([0x7f])).count(),
            _ => bytes.insert(at, dice.draw() as u8),
        }
    }
    bytes
}
