//! Free page hinting's command IDs (Virtio 1.2, section 5.5.6.4): which hints belong to a run that
//! is still wanted.
//!
//! The host starts a run by a new ID in configuration space. The driver repeats the ID in the
//! queue, gives the pages it does not use, and ends with STOP; it keeps those pages for itself
//! until the host says DONE. So a hint may be acted on only between the driver's ID and the first
//! of its STOP and the host's DONE.

/// VIRTIO_BALLOON_CMD_ID_STOP: no hints are wanted; the driver keeps what it has hinted.
pub(super) const STOP: u32 = 0;
/// VIRTIO_BALLOON_CMD_ID_DONE: no hints are wanted; the driver may use all pages again.
pub(super) const DONE: u32 = 1;
/// The lowest ID of a run.
const FIRST_RUN: u32 = 2;

/// Where hinting stands (Virtio 1.2, section 5.5.6.4).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HintStatus {
    /// What the host has asked: 0 stop, 1 done, 2 and up the run's number.
    pub host_cmd: u32,
    /// What the guest last answered, if it has.
    pub guest_cmd: Option<u32>,
}

/// The host's side of the protocol.
#[derive(Debug, Default)]
pub(super) struct Hinting {
    pub(super) status: HintStatus,
    pub(super) last_run: u32,
    pub(super) acknowledge_on_stop: bool,
}

impl Hinting {
    pub(super) fn status(&self) -> HintStatus {
        self.status
    }

    /// Asks for a run that differs from all before it (but for those that four billion runs ago had
    /// its number).
    pub(super) fn start(&mut self, acknowledge_on_stop: bool) {
        self.last_run = self.last_run.wrapping_add(1).max(FIRST_RUN);
        self.status.host_cmd = self.last_run;
        self.acknowledge_on_stop = acknowledge_on_stop;
    }

    /// Gives all hinted pages back to the driver.
    pub(super) fn stop(&mut self) {
        self.status.host_cmd = DONE;
    }

    /// Whether a hint that comes now belongs to the run that the host wants.
    pub(super) fn is_running(&self) -> bool {
        self.status.host_cmd >= FIRST_RUN && self.status.guest_cmd == Some(self.status.host_cmd)
    }

    /// The driver sent `cmd`. Returns whether that changed what the host says.
    pub(super) fn answer(&mut self, cmd: u32) -> bool {
        let finished = self.is_running() && cmd == STOP;
        self.status.guest_cmd = Some(cmd);
        let acknowledge = finished && self.acknowledge_on_stop;
        if acknowledge {
            self.stop();
        }
        acknowledge
    }

    /// The driver is gone. IDs go on, so that nothing of it can be taken for an answer to the next.
    pub(super) fn reset(&mut self) {
        self.status = HintStatus::default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hints_count_between_the_id_and_stop() {
        let mut hinting = Hinting::default();
        assert_eq!(hinting.status(), HintStatus { host_cmd: STOP, guest_cmd: None });
        assert!(!hinting.answer(STOP) && !hinting.is_running(), "no run, no hints");
        hinting.start(false);
        let run = hinting.status().host_cmd;
        assert!(run >= FIRST_RUN && !hinting.is_running());
        assert!(!hinting.answer(run) && hinting.is_running());
        assert!(!hinting.answer(STOP) && !hinting.is_running());
        assert_eq!(hinting.status(), HintStatus { host_cmd: run, guest_cmd: Some(STOP) });
        hinting.stop();
        assert!(!hinting.answer(DONE) && !hinting.is_running(), "DONE is no run's number");
    }

    #[test]
    fn the_end_is_acknowledged_if_asked_for() {
        let mut hinting = Hinting::default();
        hinting.start(true);
        let old = hinting.status().host_cmd;
        hinting.answer(old);
        hinting.start(true);
        assert!(!hinting.is_running(), "hints of the old run are stale");
        assert!(!hinting.answer(STOP), "the old run's end is not the new one's");
        assert!(!hinting.answer(old) && !hinting.is_running());
        hinting.answer(hinting.status().host_cmd);
        assert!(hinting.answer(STOP));
        assert_eq!(hinting.status(), HintStatus { host_cmd: DONE, guest_cmd: Some(STOP) });
        assert!(!hinting.answer(STOP), "once");
    }

    #[test]
    fn numbers_wrap_past_the_reserved_ones() {
        let mut hinting = Hinting { last_run: u32::MAX - 1, ..Default::default() };
        let runs = [0; 3].map(|_| {
            hinting.start(false);
            hinting.status().host_cmd
        });
        assert_eq!(runs, [u32::MAX, 2, 3]);
        hinting.answer(3);
        hinting.reset();
        assert_eq!(hinting.status(), HintStatus::default());
        hinting.start(false);
        assert_eq!(hinting.status().host_cmd, 4);
    }
}
