//! How an agent shares the processors with guests: it works in pieces of less than a millisecond, and between two of them lets others run.
//!
//! Why not by a class of the scheduler below all others (SCHED_IDLE): while a thread has pages frozen, who writes to them waits for
//! it. Beside two busy loops on two processors such a thread, once put aside, came back after up to 1.6 s; one that has just let others
//! run has a turn of its own before it, which is longer than a run is frozen. Nor could it leave that class again without
//! privilege when memory is short.

use std::time::{Duration, Instant};

/// The shortest and the longest piece. Short ones let a guest that wakes up have the processor soon; longer ones, within a
/// millisecond, are for a machine on which others want it all the time. To let others run costs a microsecond or two.
const PIECE: (Duration, Duration) = (Duration::from_micros(150), Duration::from_micros(900));
/// How much less than guests this thread matters to the scheduler: as ksmd.
const NICE: i32 = 5;
/// Who has the processor for so long before it is our turn again wants it all the time. A few other agents, each with a piece of its own,
/// have it for less: that they have pieces must not make ours longer, and so theirs.
const BUSY: Duration = Duration::from_micros(1500);
/// Beside such a one a piece takes the time that others had before it, divided by this: about the part that its nice value is worth
/// beside one other.
const PART: u32 = 4;

/// See the module's description.
#[derive(Debug)]
pub struct Courtesy {
    /// Memory is short: merging comes first, and lets others run only when the scheduler says so.
    pub eager: bool,
    piece: Duration,
    began: Instant,
    /// How often others were let run.
    pub pieces: u64,
}

impl Courtesy {
    /// For an agent that begins to work now.
    pub fn new() -> Self {
        Self { eager: false, piece: PIECE.0, began: Instant::now(), pieces: 0 }
    }

    /// To be called once by the thread that works.
    pub fn be_polite(&self) {
        // Where it is refused, it is like everybody else.
        let _ = rustix::process::nice(NICE);
    }

    /// To be called between two small parts of the work, with nothing frozen and no lock held: lets others run, if it is time.
    pub fn breathe(&mut self) {
        let now = Instant::now();
        if self.eager || now.duration_since(self.began) < self.piece {
            return;
        }
        // Even where nobody else wants the processor it costs less than a microsecond.
        std::thread::yield_now();
        self.pieces += 1;
        self.began = Instant::now();
        self.piece = piece_after(self.began.duration_since(now));
    }

    /// The work begins anew, after a rest.
    pub fn rested(&mut self) {
        (self.began, self.piece) = (Instant::now(), PIECE.0);
    }
}

/// How long the piece may be after others had the processor for so long.
fn piece_after(others: Duration) -> Duration {
    if others < BUSY { PIECE.0 } else { (others / PART).clamp(PIECE.0, PIECE.1) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_piece_is_shorter_than_a_millisecond_whatever_others_do() {
        let millis = Duration::from_millis;
        assert_eq!(piece_after(Duration::ZERO), PIECE.0);
        assert_eq!(piece_after(PIECE.0 * 9), PIECE.0, "nine other agents, with short pieces");
        assert_eq!(piece_after(millis(2)), millis(2) / PART);
        assert_eq!(piece_after(Duration::from_secs(60)), PIECE.1);
        assert!(PIECE.1 < millis(1));
    }

    #[test]
    fn others_are_let_run_after_each_piece_unless_memory_is_short() {
        let mut courtesy = Courtesy::new();
        let began = Instant::now();
        while courtesy.pieces < 4 {
            courtesy.breathe();
        }
        assert!(began.elapsed() >= PIECE.0 * 4, "no piece is shorter than that: {:?}", began.elapsed());
        courtesy.eager = true;
        std::thread::sleep(PIECE.1);
        courtesy.breathe();
        assert_eq!(courtesy.pieces, 4);
        courtesy.eager = false;
        courtesy.breathe();
        assert_eq!(courtesy.pieces, 5);
    }
}
