//! Why a VM does not carry a request out: the kinds by which clients tell one reason from another, and which error of
//! the VM's is of which kind.

use std::io;

use crate::balloon::BalloonError;
use crate::capture::CaptureError;
use crate::throttle::ThrottleError;
use crate::walk::WalkError;
use crate::working_set::WorkingSetError;
use memory::page_out::PageOutError;
use memory::ram::RamError;

wire::error_kinds! {
    /// Which error a VM answers with.
    pub enum ErrorKind {
        /// The line is no request that this VM knows, with the keys that it takes.
        NotARequest,
        /// The VM has no balloon.
        NoBalloon,
        /// The balloon would be larger than guest RAM.
        BalloonTooLarge,
        /// The guest cannot be asked for statistics now: no driver, no answer to the last request, or paused.
        NoStatistics,
        /// Free page hinting cannot be started or stopped now; no request of this socket does that so far.
        Hinting,
        /// A vCPU did not leave the guest in time, or a drive did not answer; the VM runs on.
        VcpuStuck,
        /// A rate of no pages a second, which would be a pause.
        ZeroRate,
        /// It is possible with anonymous guest RAM only.
        NotAnonymous,
        /// The working set is not sampled: the VM was started without.
        NotSampled,
        /// No period of sampling is over yet.
        NoSampleYet,
        /// The host has no active swap.
        NoSwap,
        /// All of the host's swap is used.
        SwapFull,
        /// The VM has something that no copy may have; the text says what.
        NotCapturable,
        /// The keeper of the image refused, or did not answer; the VM runs on.
        Keeper,
        /// The guest does not translate that address, by those tables; the text says why.
        NotTranslated,
        /// The host's kernel did not do, or did not show, what the request needs; the text says what.
        Host,
    }
}

/// Why a request to a VM was not carried out.
pub type Refusal = wire::Refusal<ErrorKind>;

/// The host failed at `what`.
pub(crate) fn host(what: &'static str) -> impl FnOnce(io::Error) -> Refusal {
    move |error| Refusal::new(ErrorKind::Host, format!("{what}: {error}"))
}

impl From<&BalloonError> for ErrorKind {
    fn from(error: &BalloonError) -> Self {
        match error {
            BalloonError::None => Self::NoBalloon,
            BalloonError::TooLarge { .. } => Self::BalloonTooLarge,
            BalloonError::Hinting(_) => Self::Hinting,
            BalloonError::Unasked => Self::NoStatistics,
            BalloonError::Pagemap(_) => Self::Host,
        }
    }
}

impl From<&ThrottleError> for ErrorKind {
    fn from(error: &ThrottleError) -> Self {
        match error {
            ThrottleError::Zero => Self::ZeroRate,
            ThrottleError::NotAnonymous => Self::NotAnonymous,
            ThrottleError::Watch(_) => Self::Host,
        }
    }
}

impl From<&PageOutError> for ErrorKind {
    fn from(error: &PageOutError) -> Self {
        match error {
            PageOutError::NoSwap => Self::NoSwap,
            PageOutError::SwapFull { .. } => Self::SwapFull,
            PageOutError::NotAnonymous => Self::NotAnonymous,
            PageOutError::Swaps(_) | PageOutError::Scan(_) | PageOutError::Pagemap(_) => Self::Host,
        }
    }
}

impl From<&WorkingSetError> for ErrorKind {
    fn from(error: &WorkingSetError) -> Self {
        match error {
            WorkingSetError::Off => Self::NotSampled,
            WorkingSetError::NotYet(_) => Self::NoSampleYet,
            WorkingSetError::Failed(_) => Self::Host,
        }
    }
}

impl From<&CaptureError> for ErrorKind {
    fn from(error: &CaptureError) -> Self {
        match error {
            CaptureError::Unsuited(_) => Self::NotCapturable,
            CaptureError::Pause => Self::VcpuStuck,
            CaptureError::Keeper(_) | CaptureError::Refused(_) => Self::Keeper,
            CaptureError::Vcpu
            | CaptureError::Ended
            | CaptureError::State(_)
            | CaptureError::Memory(_)
            | CaptureError::Vm(_)
            | CaptureError::Disk { .. }
            | CaptureError::Encode(_) => Self::Host,
        }
    }
}

impl From<&WalkError> for ErrorKind {
    fn from(error: &WalkError) -> Self {
        match error {
            WalkError::Pause => Self::VcpuStuck,
            WalkError::NoVcpu { .. } | WalkError::NotLong(_) | WalkError::NotCanonical { .. } => {
                Self::NotTranslated
            }
        }
    }
}

impl From<&RamError> for ErrorKind {
    fn from(error: &RamError) -> Self {
        match error {
            RamError::NotAnonymous { .. } => Self::NotAnonymous,
            _ => Self::Host,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_text_has_the_causes_and_the_kind_tells_them_apart() {
        let none = Refusal::from(BalloonError::None);
        assert_eq!((none.kind, none.text.as_str()), (ErrorKind::NoBalloon, "this VM has no balloon"));
        let cause = io::Error::other("the disk is gone");
        let swaps = Refusal::from(PageOutError::Swaps(cause));
        assert_eq!(swaps.kind, ErrorKind::Host);
        assert_eq!(swaps.text, "/proc/swaps cannot be read: the disk is gone");
        let wire = serde_json::to_string(&none).unwrap();
        assert_eq!(wire, r#"{"error":"this VM has no balloon","kind":"no-balloon"}"#);
    }
}
