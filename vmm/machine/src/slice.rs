//! Slices of time for a vCPU: a timer of its thread that makes KVM_RUN return, whatever other
//! threads have to wait for.
//!
//! The kernel sends the thread the signal that interrupts vCPUs. If it comes while the guest runs,
//! KVM_RUN returns; if it comes before, its handler has set `kvm_run.immediate_exit`, and KVM_RUN
//! returns at once. So no slice is missed.
#![expect(
    unsafe_code,
    reason = "makes POSIX timers, and sets kvm_run's immediate_exit from a signal handler"
)]

use std::cell::Cell;
use std::io;
use std::ptr;
use std::sync::Arc;
use std::time::Duration;

use vmm_sys_util::signal::SIGRTMIN;

use super::pacer::Next;
use super::run_page::RunPage;
use super::throttle::Throttle;

thread_local! {
    /// That of this thread's vCPU; null in other threads. Has no destructor, so that a signal
    /// handler can read it at any time.
    static RUN_PAGE: Cell<*const RunPage> = const { Cell::new(ptr::null()) };
}

/// Handles the signal that interrupts vCPUs.
pub(super) extern "C" fn interrupt(_: i32, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    let page = RUN_PAGE.get();
    if !page.is_null() {
        // SAFETY: `Interruptible` has put it there, has a share of it, and takes it away before it
        // gives that up.
        unsafe { (*page).interrupt() };
    }
}

/// While it lives, a signal makes this thread's next KVM_RUN return at once, too.
pub(super) struct Interruptible(
    #[expect(dead_code, reason = "kept while the thread's pointer to it is")] Arc<RunPage>,
);

impl Interruptible {
    /// `page` is that of this thread's vCPU.
    pub(super) fn new(page: Arc<RunPage>) -> Self {
        RUN_PAGE.set(Arc::as_ptr(&page));
        Self(page)
    }
}

impl Drop for Interruptible {
    fn drop(&mut self) {
        RUN_PAGE.set(ptr::null());
    }
}

/// The slices of one vCPU, for its thread.
#[derive(Default)]
pub(super) struct Slices {
    /// Made when it is first needed, by the thread that it interrupts.
    timer: Option<SliceTimer>,
    /// One has begun and has not ended.
    runs: bool,
}

impl Slices {
    /// Begins a slice if none runs and `throttle` has a rate. Else it returns how long this vCPU is
    /// held.
    pub(super) fn begin(&mut self, throttle: &Throttle) -> Option<Duration> {
        if self.runs {
            return None;
        }
        match throttle.look()? {
            Next::Hold(time) => Some(time),
            Next::Run(slice) => {
                match self.set(slice) {
                    Ok(()) => self.runs = true,
                    Err(error) => throttle.give_up("a vCPU has no timer", &error),
                }
                None
            }
        }
    }

    /// Whatever interrupted the vCPU, it looks before it runs on.
    pub(super) fn end(&mut self) {
        self.runs = false;
    }

    fn set(&mut self, slice: Duration) -> io::Result<()> {
        match &mut self.timer {
            Some(timer) => timer.set(slice),
            none => none.insert(SliceTimer::new()?).set(slice),
        }
    }
}

/// The timer of one thread, which made it.
struct SliceTimer(libc::timer_t);

impl SliceTimer {
    /// One that is not set.
    fn new() -> io::Result<Self> {
        // SAFETY: all zeros is a valid sigevent: integers and a union of integers.
        let mut event: libc::sigevent = unsafe { std::mem::zeroed() };
        event.sigev_notify = libc::SIGEV_THREAD_ID;
        event.sigev_signo = SIGRTMIN();
        // SAFETY: takes nothing and cannot fail.
        event.sigev_notify_thread_id = unsafe { libc::gettid() };
        let mut timer: libc::timer_t = ptr::null_mut();
        // SAFETY: both pointers are to values of this frame.
        match unsafe { libc::timer_create(libc::CLOCK_MONOTONIC, &mut event, &mut timer) } {
            0 => Ok(Self(timer)),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// Interrupts this thread once, after `slice`, which is not zero.
    fn set(&self, slice: Duration) -> io::Result<()> {
        let none = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        let after = libc::timespec {
            tv_sec: slice.as_secs() as libc::time_t,
            tv_nsec: libc::c_long::from(slice.subsec_nanos().cast_signed()),
        };
        let time = libc::itimerspec { it_interval: none, it_value: after };
        // SAFETY: the timer is this value's own, and the pointer is to a value of this frame; the
        // old time is not wanted.
        match unsafe { libc::timer_settime(self.0, 0, &time, ptr::null_mut()) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

impl Drop for SliceTimer {
    fn drop(&mut self) {
        // SAFETY: the timer is this value's own. A signal that is under way finds its handler.
        unsafe { libc::timer_delete(self.0) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmm_sys_util::signal::register_signal_handler;

    #[test]
    fn a_slice_ends_by_itself() {
        register_signal_handler(SIGRTMIN(), interrupt).unwrap();
        let page = RunPage::alone();
        let timer = SliceTimer::new().unwrap();
        {
            let _interruptible = Interruptible::new(page.clone());
            timer.set(Duration::from_micros(100)).unwrap();
            // Sleeping goes on after a signal, so this ends by the flag alone.
            while !page.is_interrupted() {
                std::thread::sleep(Duration::from_millis(1));
            }
        }
        page.go_on();
        timer.set(Duration::from_micros(1)).unwrap();
        std::thread::sleep(Duration::from_millis(20));
        assert!(!page.is_interrupted(), "it was set after it was given up");
    }
}
