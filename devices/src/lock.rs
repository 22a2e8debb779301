//! The lock that a device's threads share. This crate knows no operating system, so it has its own.

use std::sync::{Mutex, MutexGuard, PoisonError};

/// What is in `mutex`: nothing that takes a device's lock can panic half-way, so a poisoned one is
/// as good as any.
pub(crate) fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
