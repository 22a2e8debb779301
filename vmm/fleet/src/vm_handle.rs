//! A guest as the management of its memory sees it: its control socket, its process, and what the
//! fleet file promised it.

use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use super::HostError;
use super::client::control_within;
use super::spec::Reservation;
use machine::balloon::BalloonStatus;
use machine::control::{ErrorKind, Reply, Request, Status};
use measure::Space;
use memory::PAGE_BYTES;

/// How many VMs are asked at once.
const AT_ONCE: usize = 32;
/// How long a VM process may take to answer. Many wait for the slowest.
const ANSWER_LIMIT: Duration = Duration::from_secs(2);

/// A handle on a guest's VM. Cheap to copy, and usable from any thread without locking the fleet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VmHandle {
    /// Its name.
    pub guest: String,
    /// Its process.
    pub pid: u32,
    /// Its control socket.
    pub socket: PathBuf,
    /// RAM in bytes.
    pub memory_bytes: u64,
    /// What it is promised when memory is short.
    pub reservation: Reservation,
}

/// Asks many VMs at once: one that is busy does not keep the others waiting. The results are in the
/// order of `handles`.
pub fn each<T: Send>(handles: &[VmHandle], work: impl Fn(usize, &VmHandle) -> T + Sync) -> Vec<T> {
    let mut all = Vec::with_capacity(handles.len());
    for (n, some) in handles.chunks(AT_ONCE).enumerate() {
        let work = &work;
        thread::scope(|scope| {
            let begin = n * AT_ONCE;
            let threads: Vec<_> = some
                .iter()
                .enumerate()
                .map(|(m, handle)| scope.spawn(move || work(begin + m, handle)))
                .collect();
            // A thread that panicked has said so; its guest is as one that does not answer.
            all.extend(threads.into_iter().filter_map(|thread| thread.join().ok()));
        });
    }
    all
}

/// A guest's statistics are valid for this time. A guest that runs is asked every second.
pub const WORD_SECONDS: f64 = 30.0;

/// What a guest's VM says of itself.
#[derive(Clone, Debug)]
pub struct Said {
    /// Of the VM.
    pub status: Status,
    /// Of its balloon; None without one.
    pub balloon: Option<BalloonStatus>,
    /// When it spoke of its balloon.
    pub at: Instant,
    /// For how long it has not answered, if that is long: then all of this is older.
    pub silent: Option<Duration>,
    /// What it answered that it cannot say.
    pub trouble: Vec<String>,
}

impl VmHandle {
    /// Asks the VM process.
    pub fn control(&self, request: &Request) -> Result<Reply, HostError> {
        control_within(&self.guest, &self.socket, Some(self.pid), request, ANSWER_LIMIT)
    }

    /// What the VM says of itself.
    pub fn status(&self) -> Result<Status, HostError> {
        match self.control(&Request::Status)? {
            // It is called as it is here, whatever it says: one that joined may say anything.
            Reply::Status(status) => Ok(Status { name: self.guest.clone(), ..status }),
            other => Err(HostError::unexpected_of_vm(&self.guest, &other)),
        }
    }

    /// What it says of itself.
    pub fn ask(&self) -> Result<Said, HostError> {
        let status = self.status()?;
        let mut said = Said { status, balloon: None, at: Instant::now(), silent: None, trouble: Vec::new() };
        said.balloon = said.balloon_of(&self.guest, self.control(&Request::Balloon))?;
        Ok(said)
    }

    /// RAM in pages.
    pub fn promised_pages(&self) -> u64 {
        self.memory_bytes / PAGE_BYTES
    }
}

impl Said {
    /// Notes what a VM refuses that answers; what else is wrong stays an error.
    pub(super) fn tolerates(&mut self, error: HostError) -> Result<(), HostError> {
        match error {
            HostError::Control { refusal, .. } => self.trouble.push(refusal.text),
            error => return Err(error),
        }
        Ok(())
    }

    /// The balloon in the answer of `guest` to [`Request::Balloon`]; None where it has none, or
    /// cannot see it, which is noted.
    pub(super) fn balloon_of(
        &mut self,
        guest: &str,
        answer: Result<Reply, HostError>,
    ) -> Result<Option<BalloonStatus>, HostError> {
        match answer {
            Ok(Reply::Balloon(balloon)) => Ok(Some(*balloon)),
            Ok(other) => Err(HostError::unexpected_of_vm(guest, &other)),
            Err(error) if error.is_refusal(ErrorKind::NoBalloon) => Ok(None),
            Err(error) => self.tolerates(error).map(|()| None),
        }
    }

    /// What the guest could do without, by its own word.
    pub fn spare_pages(&self) -> Option<u64> {
        Some(self.balloon.as_ref()?.spare_bytes()? / PAGE_BYTES)
    }

    /// How old the guest's own word is, in seconds; None if it never gave any.
    pub fn age_seconds(&self) -> Option<f64> {
        Some(self.balloon.as_ref()?.age_seconds? + self.at.elapsed().as_secs_f64())
    }

    /// Its balloon, with the age that the guest's own word has by now.
    pub fn balloon_now(&self) -> Option<BalloonStatus> {
        Some(BalloonStatus { age_seconds: self.age_seconds(), ..self.balloon.clone()? })
    }

    /// What a balloon could be asked for now: what the guest could do without, by a word that is
    /// not old, if a driver runs that could give it. A guest that is paused or does not answer
    /// gives nothing.
    pub fn to_give_pages(&self) -> u64 {
        let driver = self.balloon.as_ref().is_some_and(|balloon| balloon.size.driver);
        let fresh = self.age_seconds().is_some_and(|age| age <= WORD_SECONDS);
        let gives = driver && fresh && !self.status.paused && self.silent.is_none();
        self.spare_pages().filter(|_| gives).unwrap_or(0)
    }

    /// Where the guest's memory lies, for measuring.
    pub fn space(&self) -> Space {
        Space { name: self.status.name.clone(), pid: self.status.pid, extents: self.status.extents.clone() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fake_vm::{RUNS, vm};
    use machine::balloon::BalloonSize;
    use wire::LineError;

    #[test]
    fn what_is_refused_means_what_its_kind_says() {
        let dir = tempfile::tempdir().unwrap();
        let ask = |guest: &str, balloon: &'static str| {
            vm(dir.path(), guest, move |op| if op == "status" { RUNS } else { balloon }.into()).ask()
        };
        let none = ask("none", r#"{"error":"none","kind":"no-balloon"}"#).unwrap();
        assert!(none.balloon.is_none() && none.trouble.is_empty());
        let older = ask("older", r#"{"error":"none"}"#).unwrap();
        assert!(older.balloon.is_none() && older.trouble.is_empty());
        let unseen = ask("unseen", r#"{"error":"its pagemap is gone","kind":"host"}"#).unwrap();
        assert_eq!((unseen.balloon, unseen.trouble), (None, vec!["its pagemap is gone".to_owned()]));
        let other = ask("other", RUNS).unwrap_err().to_string();
        assert!(other.starts_with("the VM of guest other answered something else: Status"), "{other}");
        let rubbish = ask("rubbish", "rubbish").unwrap_err();
        assert!(
            matches!(rubbish, HostError::Socket { source: LineError::NotUnderstood(_), .. }),
            "{rubbish}"
        );
    }

    #[test]
    fn only_a_fresh_word_of_a_guest_that_could_follow_counts() {
        let status =
            r#"{"name":"a","pid":1,"paused":false,"vcpus":1,"memory_bytes":4096,"backend":"","extents":[]}"#;
        let balloon = BalloonStatus {
            size: BalloonSize { driver: true, ..BalloonSize::default() },
            age_seconds: Some(1.0),
            guest: [("available_memory".to_owned(), 7 * PAGE_BYTES)].into(),
            ..BalloonStatus::default()
        };
        let status: Status = serde_json::from_str(status).unwrap();
        let said =
            Said { status, balloon: Some(balloon), at: Instant::now(), silent: None, trouble: Vec::new() };
        let with = |change: fn(&mut Said, &mut BalloonStatus)| {
            let mut other = said.clone();
            let mut balloon = other.balloon.take().unwrap();
            change(&mut other, &mut balloon);
            Said { balloon: Some(balloon), ..other }.to_give_pages()
        };
        assert_eq!(with(|_, _| ()), 7);
        assert_eq!(with(|_, balloon| balloon.size.driver = false), 0, "no driver");
        assert_eq!(with(|_, balloon| balloon.age_seconds = Some(WORD_SECONDS + 1.0)), 0, "an old word");
        assert_eq!(with(|_, balloon| balloon.age_seconds = None), 0, "no word");
        assert_eq!(with(|said, _| said.status.paused = true), 0, "it is paused");
        assert_eq!(with(|said, _| said.silent = Some(Duration::ZERO)), 0, "it does not answer");
        assert_eq!(Said { balloon: None, ..said.clone() }.to_give_pages(), 0);
        let ago = Instant::now().checked_sub(Duration::from_secs(40));
        assert_eq!(Said { at: ago.unwrap(), ..said }.to_give_pages(), 0, "what was heard long ago");
    }
}
