//! Carries out what the control socket asks of a running VM.

use std::time::Duration;

use kernel_view::smaps::SharePages;

use super::{ErrorKind, Pressed, Refusal, Reply, Request, Rest, Serve, Served, Status, host};
use crate::balloon::{BalloonError, BalloonSize};
use crate::exit::Ending;
use crate::running::Running;
use crate::walk::Tables;

impl Serve for Running {
    fn serve(&mut self, request: Request) -> Served {
        self.carry_out(request).unwrap_or_else(|refusal| Served::Now(Err(refusal)))
    }
}

impl Running {
    fn carry_out(&mut self, request: Request) -> Result<Served, Refusal> {
        let reply = match request {
            Request::Status => Reply::Status(self.status()),
            Request::StatusAndFrames => {
                let frames = SharePages::of(std::process::id())
                    .map_err(host("the frames of this process cannot be read"))?;
                let pmem = self.shared.regions.pages().map_err(host("the page table cannot be read"))?;
                Reply::Status(Status { frames: Some(frames), pmem, ..self.status() })
            }
            Request::Pause if self.pause() => Reply::Done,
            Request::Pause => {
                let text =
                    "a vCPU did not leave the guest in time, or a drive did not answer; the VM runs on";
                return Err(Refusal::new(ErrorKind::VcpuStuck, text));
            }
            Request::Resume => {
                self.resume();
                Reply::Done
            }
            Request::Stop => {
                self.outcome.tell(Ending::Stopped);
                Reply::Done
            }
            Request::PowerButton => Reply::PowerButton(Pressed { driver: self.press_power_button() }),
            Request::ShutDown { timeout_seconds, com2 } => {
                self.shut_down(Duration::from_secs(timeout_seconds.into()), com2.as_deref())
                    .map_err(host("the timer cannot be set"))?;
                Reply::Done
            }
            Request::Mergeable { on } => {
                self.ram.set_mergeable(on)?;
                Reply::Done
            }
            Request::Balloon => Reply::Balloon(Box::new(self.balloon_status()?)),
            Request::BalloonSize => {
                Reply::BalloonSize(BalloonSize::of(self.balloon.as_ref().ok_or(BalloonError::None)?))
            }
            Request::BalloonStatistics => {
                self.balloon.as_ref().ok_or(BalloonError::None)?;
                match self.request_balloon_statistics() {
                    true => Reply::Done,
                    false => return Err(BalloonError::Unasked.into()),
                }
            }
            Request::Capture { socket } => {
                let vm = self.clone();
                return Ok(Served::Later(Box::new(move || {
                    let begun = vm.begin_capture(&socket);
                    let rest: Rest = Box::new(move || Ok(Reply::Captured(vm.end_capture(begun?)?)));
                    rest
                })));
            }
            Request::BalloonTarget { pages } => {
                self.set_balloon(pages)?;
                Reply::Done
            }
            Request::Throttle { pages_per_second } => {
                self.set_throttle(pages_per_second)?;
                Reply::Done
            }
            Request::PageOut { pages } => Reply::PagedOut(self.page_out(pages)?),
            Request::Walk { address, vcpu, root } => {
                Reply::Walked(Box::new(self.walk(address, Tables { vcpu, root })?))
            }
            Request::PageTable { from, vcpu, root } => {
                Reply::PageTable(Box::new(self.page_table(from, Tables { vcpu, root })?))
            }
            Request::WorkingSet => Reply::WorkingSet(self.working_set()?),
            Request::KvmStats => {
                Reply::KvmStats(self.stats.read().map_err(host("KVM's statistics cannot be read"))?)
            }
        };
        Ok(Served::Now(Ok(reply)))
    }
}
