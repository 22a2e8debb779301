//! Marks of 16 entries, compared all at once.
#![expect(unsafe_code, reason = "vector instructions, which every x86-64 processor has")]

use std::arch::x86_64::{
    __m128i, _mm_cmpeq_epi8, _mm_load_si128, _mm_movemask_epi8, _mm_set1_epi8, _mm_setzero_si128,
};

/// Entries of a group.
pub const GROUP: usize = 16;

/// A byte for each entry of a group: 0 as long as there is none.
#[derive(Clone, Copy, Debug, Default)]
#[repr(align(16))]
pub struct Marks([u8; GROUP]);

impl Marks {
    /// The bit that every mark of an entry has.
    pub const TAKEN: u8 = 0x80;

    #[inline]
    pub fn set(&mut self, place: usize, mark: u8) {
        self.0[place] = mark;
    }

    /// The places with this mark, ascending.
    #[inline]
    pub fn equal(&self, mark: u8) -> Places {
        // SAFETY: x86-64 has SSE2.
        unsafe { self.compare(_mm_set1_epi8(mark.cast_signed())) }
    }

    /// The places without an entry, ascending.
    #[inline]
    pub fn empty(&self) -> Places {
        // SAFETY: x86-64 has SSE2.
        unsafe { self.compare(_mm_setzero_si128()) }
    }

    /// The marks of a group that was filled from its beginning.
    pub fn taken(&self) -> impl Iterator<Item = u8> {
        self.0.into_iter().take_while(|mark| *mark != 0)
    }

    #[inline]
    #[target_feature(enable = "sse2")]
    fn compare(&self, with: __m128i) -> Places {
        // SAFETY: 16 bytes, aligned to 16.
        let marks = unsafe { _mm_load_si128(self.0.as_ptr().cast()) };
        Places(_mm_movemask_epi8(_mm_cmpeq_epi8(marks, with)).cast_unsigned())
    }
}

/// Places in a group: a bit for each.
#[derive(Clone, Copy, Debug)]
pub struct Places(u32);

impl Iterator for Places {
    type Item = usize;

    #[inline]
    fn next(&mut self) -> Option<usize> {
        let place = self.0.trailing_zeros() as usize;
        self.0 &= self.0.wrapping_sub(1);
        (place < GROUP).then_some(place)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn places_are_those_that_a_loop_finds(bytes: [u8; GROUP], mark: u8) {
            // Few different ones, so that some are equal.
            let marks = Marks(bytes.map(|byte| byte % 4));
            let slow = |wanted: u8| (0..GROUP).filter(move |place| marks.0[*place] == wanted);
            prop_assert!(marks.equal(mark % 4).eq(slow(mark % 4)));
            prop_assert!(marks.empty().eq(slow(0)));
        }
    }

    #[test]
    fn what_is_taken_ends_where_nothing_is() {
        let mut marks = Marks::default();
        assert_eq!(marks.empty().count(), GROUP);
        (0..3).for_each(|place| marks.set(place, Marks::TAKEN | 5));
        assert_eq!(marks.taken().collect::<Vec<_>>(), [0x85; 3]);
        assert_eq!(marks.empty().next(), Some(3));
    }
}
