//! Batches, delivered by several threads in any order, reduced in the order of the chunks by one of
//! them at a time.
//!
//! A thread that delivers while another reduces leaves its batch to that one and reads on: none
//! waits, unless far more is delivered than is reduced.

use std::collections::BTreeMap;
use std::sync::{Condvar, Mutex, MutexGuard};
use std::time::Duration;

use super::reducer::{Batch, Reducer};
use super::source::Source;
use super::tag::Tag;

/// Batches that may wait for one before them.
const MAX_WAITING: usize = 64;

/// The queue to which the threads of a pass deliver.
pub(super) struct OrderedQueue<'a> {
    sources: &'a [&'a dyn Source],
    state: Mutex<State>,
    /// For threads that have delivered too much.
    moved_on: Condvar,
    /// For the thread that waits until all have ended.
    ended: Condvar,
}

struct State {
    /// Absent while a thread uses it.
    reducer: Option<Reducer>,
    /// The turn that is next.
    next: usize,
    waiting: BTreeMap<usize, Batch>,
    /// Vectors for use again.
    spare: Vec<Vec<(u32, Tag)>>,
    /// Threads that wait for `moved_on`: notifying none would be a system call for each batch.
    blocked: usize,
    /// Threads that have not ended.
    running: usize,
    stop: bool,
}

impl<'a> OrderedQueue<'a> {
    /// For `threads` threads, each of which must [enter](Self::enter).
    pub(super) fn new(sources: &'a [&'a dyn Source], reducer: Reducer, threads: usize) -> Self {
        let state = State {
            reducer: Some(reducer),
            next: 0,
            waiting: BTreeMap::new(),
            spare: Vec::new(),
            blocked: 0,
            running: threads,
            stop: false,
        };
        Self { sources, state: Mutex::new(state), moved_on: Condvar::new(), ended: Condvar::new() }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        os::lock(&self.state)
    }

    /// One of the threads, until this is dropped.
    pub(super) fn enter(&self) -> Entered<'_> {
        Entered { queue: self }
    }

    /// Makes all threads end after the chunk they read.
    pub(super) fn stop(&self) {
        self.lock().stop = true;
        self.moved_on.notify_all();
    }

    /// Waits for `timeout` or until all threads have ended; returns whether they have.
    pub(super) fn wait(&self, timeout: Duration) -> bool {
        let running = |state: &mut State| state.running > 0;
        let waited = self.ended.wait_timeout_while(self.lock(), timeout, running);
        let (state, _) = os::unpoisoned(waited);
        state.running == 0
    }

    /// The reducer of all batches; None if a thread ended while it used it.
    pub(super) fn into_reducer(self) -> Option<Reducer> {
        os::unpoisoned(self.state.into_inner()).reducer
    }
}

/// A thread that delivers.
pub(super) struct Entered<'a> {
    queue: &'a OrderedQueue<'a>,
}

impl Entered<'_> {
    /// An empty vector for the tags of a batch; None when the thread is to end.
    pub(super) fn next_vector(&self) -> Option<Vec<(u32, Tag)>> {
        let mut state = self.queue.lock();
        (!state.stop).then(|| state.spare.pop().unwrap_or_default())
    }

    /// Reduces a batch in its turn, and all that waited for it; or leaves it to the thread that
    /// does.
    pub(super) fn deliver(&self, turn: usize, batch: Batch) {
        let queue = self.queue;
        let mut state = queue.lock();
        state.waiting.insert(turn, batch);
        if let Some(mut reducer) = state.reducer.take() {
            while let Some(mut batch) = {
                let next = state.next;
                state.waiting.remove(&next)
            } {
                drop(state);
                reducer.take(&batch, queue.sources[usize::from(batch.guest)].page_types());
                batch.tags.clear();
                state = queue.lock();
                state.spare.push(batch.tags);
                state.next += 1;
                if state.blocked > 0 {
                    queue.moved_on.notify_all();
                }
            }
            state.reducer = Some(reducer);
        }
        // Neither the reducing thread nor the one that reads the next chunk in turn waits here.
        state.blocked += 1;
        let full = |state: &mut State| state.waiting.len() > MAX_WAITING && !state.stop;
        let waited = queue.moved_on.wait_while(state, full);
        os::unpoisoned(waited).blocked -= 1;
    }
}

impl Drop for Entered<'_> {
    fn drop(&mut self) {
        self.queue.lock().running -= 1;
        self.queue.ended.notify_all();
    }
}
