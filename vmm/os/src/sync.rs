//! Locks. A panic ends the program, so a poisoned lock is met in tests only, and nothing here leaves a value half changed.

use std::sync::{LockResult, Mutex, MutexGuard, PoisonError};

/// What is in `mutex`, whoever panicked with it.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    unpoisoned(mutex.lock())
}

/// What a lock or a wait gives, whoever panicked with the lock.
pub fn unpoisoned<T>(result: LockResult<T>) -> T {
    result.unwrap_or_else(PoisonError::into_inner)
}
