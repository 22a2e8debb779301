//! A guest that goes on from where another one was, and one that is captured.

use std::sync::Arc;
use std::time::{Duration, Instant};

use guest::protocol::{Command, Mac};
use machine::Interface;

use super::{BUILT_IN_LIMIT, Guest};
use crate::HostError;
use crate::client::Com2;
use crate::images::Image;
use crate::watch::{Stage, Watch};
use os::limits;
use wire::LineError;

/// How often its COM2 socket is looked for.
const POLL: Duration = Duration::from_millis(2);

impl Guest {
    /// The image that it went on from, if its daemon started it so.
    pub fn image(&self) -> Option<&Arc<Image>> {
        self.image.as_ref()
    }

    /// Lets go of it.
    pub(crate) fn forget_image(&mut self) {
        self.image = None;
    }

    /// The number by which it differs from other copies, as it says itself.
    pub fn generation(&self) -> Option<u64> {
        self.generation
    }

    /// Waits until it is ready, or, where it went on from an image, answers.
    pub(crate) fn wait_here(&mut self, watch: &Watch) -> Result<(), HostError> {
        match self.image.is_some() && self.com2.is_none() {
            true => self.wait_answer(watch),
            false => self.wait_ready(watch),
        }
    }

    /// Waits until it answers on COM2, of one that went on from an image: it does not say once more that it is ready.
    pub fn wait_answer(&mut self, watch: &Watch) -> Result<(), HostError> {
        let path = self.dir.com2(&self.spec.name)?;
        let began = Instant::now();
        while self.com2.is_none() {
            watch.check()?;
            self.check_alive()?;
            match Com2::connect(&self.spec.name, &path, self.pid().unwrap_or(0)) {
                Ok(com2) => self.com2 = Some(com2),
                Err(source) if limits::is_shortage(&source) || began.elapsed() > BUILT_IN_LIMIT => {
                    let peer = format!("COM2 of guest {}", self.spec.name);
                    return Err(HostError::Socket { peer, source: LineError::Io(limits::explained(source)) });
                }
                Err(_) => std::thread::sleep(POLL),
            }
        }
        // What it says before it obeys anything: from then on it does nothing at random that another copy does, too. A Linux guest is woken by
        // the command, and says it before the answer, if its agent can.
        while self.is_built_in() && self.com2.as_ref().is_some_and(|com2| com2.generation().is_none()) {
            watch.check()?;
            self.check_alive()?;
            if began.elapsed() > BUILT_IN_LIMIT {
                let (guest, log) = (self.spec.name.clone(), String::new());
                return Err(HostError::Silent { guest, limit: BUILT_IN_LIMIT, log });
            }
            self.com2.as_mut().map_or(Ok(None), Com2::poll)?;
        }
        self.command(&Command::Report, Stage::Ready, watch)?;
        self.tell_addresses(watch)?;
        self.generation = self.com2.as_ref().and_then(Com2::generation);
        Ok(())
    }

    /// Tells a Linux guest its Ethernet addresses: its drivers have those of the guest that it is a copy of. An agent that cannot is no error.
    fn tell_addresses(&mut self, watch: &Watch) -> Result<(), HostError> {
        let Some(image) = self.image.clone().filter(|_| !self.is_built_in()) else { return Ok(()) };
        let address = |interface: &Interface| interface.mac.map(|mac| Mac(mac.0));
        let pairs = image.spec.vm.net.iter().zip(&self.spec.vm.net);
        let pairs: Vec<_> = pairs.filter_map(|(was, is)| address(was).zip(address(is))).collect();
        for (was, is) in pairs.into_iter().filter(|(was, is)| was != is) {
            match self.command(&Command::Mac { was, is }, Stage::Ready, watch) {
                Err(HostError::Refused { .. }) => {
                    tracing::warn!(
                        "guest {} keeps the address {was}: its agent gives it no other",
                        self.spec.name
                    );
                }
                told => _ = told?,
            }
        }
        Ok(())
    }

    /// An error if it has ended.
    pub(crate) fn failure(&mut self) -> Option<HostError> {
        self.check_alive().err()
    }

    /// An error if it is not a guest that can be captured, as far as that is seen from here.
    pub(crate) fn may_be_captured(&self) -> Result<(), HostError> {
        let why = match () {
            () if self.has_joined() => "another program started it, and its COM2 is that program's",
            () if self.ready.is_none() => "it is not ready yet",
            () if self.pid().is_none() => "it has ended",
            () => return Ok(()),
        };
        Err(HostError::NotCaptured { guest: self.spec.name.clone(), why })
    }
}
