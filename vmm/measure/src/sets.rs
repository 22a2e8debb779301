//! The holders of a content: sets of guests, each known by a number.
//!
//! Guests are read one after the other, so a set grows at its end only, and is written as the set
//! before and one guest more. Few sets occur, however many contents there are; and what is asked
//! afterwards (pairs, domains, what each guest adds) is asked of sets and how many contents have
//! each.

use std::collections::HashMap;

/// The number of a set; 0 is the empty one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct SetId(pub u32);

impl SetId {
    /// The empty set.
    pub const NONE: Self = Self(0);
}

#[derive(Clone, Copy, Debug)]
struct Set {
    /// All guests but the last.
    before: SetId,
    last: u16,
}

/// All sets that occur.
#[derive(Debug)]
pub struct Sets {
    sets: Vec<Set>,
    larger: HashMap<(SetId, u16), SetId>,
    /// The last answers, as neighbouring pages tend to have the same holders.
    recent: [(SetId, u16, SetId); RECENT],
}

const RECENT: usize = 64;

impl Default for Sets {
    fn default() -> Self {
        let none = Set { before: SetId::NONE, last: u16::MAX };
        Self { sets: vec![none], larger: HashMap::new(), recent: [(SetId::NONE, 0, SetId::NONE); RECENT] }
    }
}

impl Sets {
    /// Whether `guest` was the last to be added to `set`.
    pub fn ends_with(&self, set: SetId, guest: u16) -> bool {
        set != SetId::NONE && self.sets[set.0 as usize].last == guest
    }

    /// `set` with `guest`, which is not before any of those in it.
    pub fn with(&mut self, set: SetId, guest: u16) -> SetId {
        if self.ends_with(set, guest) {
            return set;
        }
        let slot = (set.0 as usize ^ usize::from(guest)) % RECENT;
        let (before, last, found) = self.recent[slot];
        if found != SetId::NONE && before == set && last == guest {
            return found;
        }
        let next = SetId(self.sets.len() as u32);
        let found = *self.larger.entry((set, guest)).or_insert(next);
        if found == next {
            self.sets.push(Set { before: set, last: guest });
        }
        self.recent[slot] = (set, guest, found);
        found
    }

    /// How many there are, the empty one too.
    pub fn len(&self) -> usize {
        self.sets.len()
    }

    /// True while there is the empty set only.
    pub fn is_empty(&self) -> bool {
        self.sets.len() == 1
    }

    /// The guests of a set, the last first.
    pub fn guests(&self, set: SetId) -> impl Iterator<Item = u16> {
        let mut set = set;
        std::iter::from_fn(move || {
            (set != SetId::NONE).then(|| {
                let Set { before, last } = self.sets[set.0 as usize];
                set = before;
                last
            })
        })
    }

    /// Memory that they take, in bytes.
    pub fn bytes(&self) -> u64 {
        // A bucket of the map has a key of 8 bytes, a value of 4 and one byte of its own.
        (self.sets.capacity() * size_of::<Set>() + self.larger.capacity() * 13 * 8 / 7) as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_guests_are_the_same_set() {
        let mut sets = Sets::default();
        let mut make = |guests: &[u16]| guests.iter().fold(SetId::NONE, |set, guest| sets.with(set, *guest));
        let (a, ab, abb) = (make(&[1]), make(&[1, 2]), make(&[1, 2, 2]));
        assert!(a != ab && ab == abb && make(&[2]) != a && make(&[1]) == a);
        let long: Vec<u16> = (0..300).collect();
        let all = make(&long);
        assert_eq!(make(&long), all);
        let mut guests: Vec<u16> = sets.guests(all).collect();
        guests.reverse();
        assert_eq!(guests, long);
        assert!(sets.ends_with(all, 299) && !sets.ends_with(SetId::NONE, u16::MAX));
        assert_eq!(sets.len(), 1 + 3 + 300);
    }
}
