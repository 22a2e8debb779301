//! How an agent shares the processors with guests: it works in pieces of less than a millisecond,
//! and yields between them.
//!
//! Why not by the class SCHED_IDLE: while a thread has pages frozen, writers to them wait for it.
//! Beside two busy loops on two processors such a thread, once preempted, came back after up to 1.6
//! s; one that has just yielded has a time slice before it that is longer than a run is frozen. Nor
//! could it leave that class again without privilege when memory is short.

use std::time::{Duration, Instant};

/// The shortest and the longest piece. Short ones give a guest that wakes up the processor soon;
/// longer ones, within a millisecond, are for a busy machine. Yielding costs a microsecond or two.
const PIECE: (Duration, Duration) = (Duration::from_micros(150), Duration::from_micros(900));
/// Its nice value, as ksmd's.
const NICE: i32 = 5;
/// A thread that runs for longer than this before our next time slice is busy all the time. A few
/// other agents, each with a piece of its own, run for less: their pieces must not make ours
/// longer, and so theirs.
const BUSY: Duration = Duration::from_micros(1500);
/// Beside a busy thread a piece takes the time that others had before it, divided by this: about
/// the share of its nice value beside one other.
const PART: u32 = 4;

/// See the module's description.
#[derive(Debug)]
pub struct Yielding {
    /// Memory is short: merging comes first, and does not yield.
    pub urgent: bool,
    piece: Duration,
    began: Instant,
    /// How often it has yielded.
    pub pieces: u64,
}

impl Yielding {
    /// For an agent that begins to work now.
    pub fn new() -> Self {
        Self { urgent: false, piece: PIECE.0, began: Instant::now(), pieces: 0 }
    }

    /// Lowers the priority of the calling thread, once.
    pub fn lower_priority(&self) {
        // Where that is refused it keeps its priority.
        let _ = rustix::process::nice(NICE);
    }

    /// Yields, if it is time. To be called between two small parts of the work, with nothing frozen
    /// and no lock held.
    pub fn yield_if_due(&mut self) {
        let now = Instant::now();
        if self.urgent || now.duration_since(self.began) < self.piece {
            return;
        }
        // On an idle processor it costs less than a microsecond.
        std::thread::yield_now();
        self.pieces += 1;
        self.began = Instant::now();
        self.piece = piece_after(self.began.duration_since(now));
    }

    /// The work begins anew, after a sleep.
    pub fn woke(&mut self) {
        (self.began, self.piece) = (Instant::now(), PIECE.0);
    }
}

/// How long the piece may be after others had the processor for the time `others`.
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
        let mut yielding = Yielding::new();
        let began = Instant::now();
        while yielding.pieces < 4 {
            yielding.yield_if_due();
        }
        assert!(began.elapsed() >= PIECE.0 * 4, "no piece is shorter than that: {:?}", began.elapsed());
        yielding.urgent = true;
        std::thread::sleep(PIECE.1);
        yielding.yield_if_due();
        assert_eq!(yielding.pieces, 4);
        yielding.urgent = false;
        yielding.yield_if_due();
        assert_eq!(yielding.pieces, 5);
    }
}
