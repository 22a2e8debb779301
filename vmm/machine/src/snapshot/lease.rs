//! The memory file in which a guest's RAM lies. Before another process writes to it or cuts it
//! short, what still lies there is copied: the guest stands still meanwhile, and the other process
//! waits.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use os::lease::Lease;
use os::one_line;
use signal_hook::SigId;

use crate::running::Running;

/// A lease on a memory file, and the event that says that a writer waits for its end.
pub(crate) struct FileLease {
    lease: Lease,
    told: Told,
}

/// Readable when SIGIO has come, as long as it lives.
struct Told {
    stream: UnixStream,
    registered: SigId,
}

impl Told {
    fn new() -> io::Result<Self> {
        let (stream, mut tell) = UnixStream::pair()?;
        stream.set_nonblocking(true)?;
        // It is looked at once in any case: the lease may be broken before this is watched.
        tell.write_all(&[0])?;
        Ok(Self { stream, registered: signal_hook::low_level::pipe::register(libc::SIGIO, tell)? })
    }
}

impl Drop for Told {
    fn drop(&mut self) {
        signal_hook::low_level::unregister(self.registered);
    }
}

impl FileLease {
    /// Takes one.
    ///
    /// # Errors
    /// The file may be written to by others, or is of a file system that has none: then it is to be
    /// copied.
    pub(crate) fn take(file: &File) -> io::Result<Self> {
        // Before there is a lease: the signal would end this process.
        let told = Told::new()?;
        Ok(Self { lease: Lease::take(file)?, told })
    }
}

/// Watches it on the event loop.
pub(crate) struct FileWatch {
    /// None once it is given up.
    lease: Option<Lease>,
    told: Told,
    vm: Running,
}

impl FileWatch {
    /// Of the file in which the RAM of `vm` lies.
    pub(crate) fn new(lease: FileLease, vm: Running) -> Self {
        Self { lease: Some(lease.lease), told: lease.told, vm }
    }

    fn look(&mut self) {
        if !self.lease.as_ref().is_some_and(Lease::is_broken) {
            return;
        }
        let was_paused = self.vm.is_paused();
        let still = was_paused || self.vm.pause();
        let left = if still { self.vm.ram().leave_file().map_err(|error| one_line(&error)) } else { Ok(()) };
        match (still, left) {
            (true, Ok(())) => {
                tracing::info!("{}: its memory file is to be written to, and was copied", self.vm.name());
                self.lease = None;
            }
            // The kernel takes the lease away after a while.
            (true, Err(why)) => tracing::warn!(
                "{}: its memory file is to be written to, and cannot be copied: {why}",
                self.vm.name()
            ),
            (false, _) => tracing::warn!(
                "{}: its memory file is to be written to, and cannot be copied: a vCPU did not leave the guest in time",
                self.vm.name()
            ),
        }
        if still && !was_paused {
            self.vm.resume();
        }
    }
}

impl MutEventSubscriber for FileWatch {
    fn init(&mut self, ops: &mut EventOps) {
        let _ = ops.add(Events::new(&self.told.stream, EventSet::IN));
    }

    fn process(&mut self, _: Events, _: &mut EventOps) {
        let mut bytes = [0; 64];
        while matches!(self.told.stream.read(&mut bytes), Ok(1..)) {}
        self.look();
    }
}
