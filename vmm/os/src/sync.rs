//! Locks. A panic ends the program, so a poisoned lock is met in tests only, and nothing here
//! leaves a value half changed.

use std::sync::{LockResult, Mutex, MutexGuard, PoisonError, TryLockError};

/// Locks `mutex`, whether it is poisoned or not.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    unpoisoned(mutex.lock())
}

/// Locks `mutex`, whether it is poisoned or not, unless it is locked.
pub fn try_lock<T>(mutex: &Mutex<T>) -> Option<MutexGuard<'_, T>> {
    match mutex.try_lock() {
        Ok(guard) => Some(guard),
        Err(TryLockError::Poisoned(guard)) => Some(guard.into_inner()),
        Err(TryLockError::WouldBlock) => None,
    }
}

/// The value of a lock or a wait, whether the lock is poisoned or not.
pub fn unpoisoned<T>(result: LockResult<T>) -> T {
    result.unwrap_or_else(PoisonError::into_inner)
}
