//! Locks.

use std::sync::{Mutex, MutexGuard, PoisonError};

/// What is in `mutex`, whoever panicked with it: nothing here leaves a value half changed.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
