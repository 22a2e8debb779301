//! A VM process that stands by: it has made what a VM needs before it is known which one it will be, and waits for its image.
//!
//! Its daemon has the other end of a socket. When that is closed (the daemon has ended, or does not need it) the process ends; what
//! comes through it is a configuration, an image, and where its messages go. From then on it is as any VM process: it is confined
//! before the guest's first instruction, and nothing of a guest's has been in it before.

use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::net::UnixStream;

use os::arguments;
use serde::{Deserialize, Serialize};
use thiserror::Error;
use wire::packets::{self, MAX_FILES};

use super::build::Vm;
use super::config::VmConfig;
use super::create::BareVm;
use super::drive::MAX_DRIVES;
use super::error::VmError;
use super::events::EventLoop;
use super::exit::Ending;
use super::handover::{self, HandoverError};
use super::image_error::ImageStartError;
use super::restore::{Image, ReceivedDisk};
use super::run::serve;
use super::state::vcpu::Saved;

/// The command that a process is started with to stand by.
pub const COMMAND: &str = "standby";
/// What it says when it does.
pub const STANDS_BY: &[u8] = b"stands by";
/// The longest packet.
const MAX_PACKET_BYTES: usize = 4096;
/// Descriptors before those of slabs: configuration, messages, state.
const FIRST_FILES: usize = 3;
/// More slabs than any image has.
const MAX_SLABS: u32 = 1 << 16;

/// Why a process that stood by became no VM.
#[derive(Debug, Error)]
pub enum StandbyError {
    /// Nothing can be made ahead.
    #[error("no VM can be made ahead of its image")]
    Bare(#[source] VmError),
    /// Its daemon says what cannot be understood.
    #[error("what the daemon hands over cannot be received")]
    Link(#[source] io::Error),
    /// The VM's description.
    #[error(transparent)]
    Config(#[from] HandoverError),
    /// The image.
    #[error(transparent)]
    Image(#[from] ImageStartError),
    /// A later daemon would not find it.
    #[error("lists of processes cannot show which VM this is")]
    Arguments(#[source] io::Error),
}

/// The first packet of those that make a VM of a process.
#[derive(Serialize, Deserialize)]
struct Order {
    /// What lists of processes show from then on.
    arguments: Vec<Vec<u8>>,
    /// Slabs, whose descriptors come in the packets behind it;
    slabs: u32,
    /// and behind those, for each drive with an overlay, that of what was written, and where this says so that of its map.
    disks: Vec<(u32, bool)>,
}

/// An image as its daemon has it.
#[derive(Clone, Copy, Debug)]
pub struct ImageFiles<'a> {
    /// The state, in a sealed memfd.
    pub state: BorrowedFd<'a>,
    /// The slabs, by number.
    pub slabs: &'a [BorrowedFd<'a>],
    /// What it had written to drives with overlays: the drive, its blocks (a copy for the VM alone), and which those are.
    pub disks: &'a [(u32, BorrowedFd<'a>, Option<BorrowedFd<'a>>)],
}

/// Makes the process at the other end of `link` the VM of `config`, which goes on from `image`. Its messages go to `messages`, and lists
/// of processes show it with `arguments`.
pub fn hand_over(
    link: &UnixStream,
    arguments: &[OsString],
    config: &VmConfig,
    messages: &File,
    image: ImageFiles<'_>,
) -> io::Result<()> {
    let slabs = u32::try_from(image.slabs.len()).map_err(io::Error::other)?;
    let arguments = arguments.iter().map(|argument| argument.as_bytes().to_vec()).collect();
    let disks = image.disks.iter().map(|(drive, _, map)| (*drive, map.is_some())).collect();
    let order = postcard::to_allocvec(&Order { arguments, slabs, disks }).map_err(io::Error::other)?;
    let config = handover::write(config)?;
    packets::send_all(link, &order, &[config.as_fd(), messages.as_fd(), image.state])?;
    let of_disks = image.disks.iter().flat_map(|(_, top, map)| std::iter::once(*top).chain(*map));
    let rest: Vec<BorrowedFd<'_>> = image.slabs.iter().copied().chain(of_disks).collect();
    rest.chunks(MAX_FILES).try_for_each(|files| packets::send_all(link, b"files", files))
}

/// A process that has become a VM, which does not run yet.
pub struct Chosen {
    config: VmConfig,
    image: Image,
    bare: BareVm,
}

/// Makes what can be made ahead, says so through `link`, and waits until there is something to become. None if there never will be:
/// the daemon has closed its end.
pub fn stand_by(link: OwnedFd) -> Result<Option<Chosen>, StandbyError> {
    let link = UnixStream::from(link);
    let bare = BareVm::ahead().map_err(StandbyError::Bare)?;
    let mut buffer = [0; MAX_PACKET_BYTES];
    let first =
        packets::send_all(&link, STANDS_BY, &[]).and_then(|()| packets::receive_all(&link, &mut buffer));
    let (packet, files) = match first {
        Ok(first) => first,
        Err(error) if is_end(&error) => return Ok(None),
        Err(error) => return Err(StandbyError::Link(error)),
    };
    let invalid = || StandbyError::Link(io::ErrorKind::InvalidData.into());
    let (order, rest) = postcard::take_from_bytes::<Order>(packet).map_err(|_| invalid())?;
    let files = <[OwnedFd; FIRST_FILES]>::try_from(files);
    let (Ok([config, messages, state]), true, 0..=MAX_SLABS) = (files, rest.is_empty(), order.slabs) else {
        return Err(invalid());
    };
    rustix::stdio::dup2_stderr(messages).map_err(|error| StandbyError::Link(error.into()))?;
    if order.disks.len() > MAX_DRIVES {
        return Err(invalid());
    }
    let of_disks: usize = order.disks.iter().map(|(_, has_map)| 1 + usize::from(*has_map)).sum();
    let slabs = order.slabs as usize;
    let files = receive_files(&link, slabs + of_disks).map_err(StandbyError::Link)?;
    let mut files = files.into_iter();
    let slabs = files.by_ref().take(slabs).collect();
    let mut disks = Vec::new();
    for (drive, has_map) in order.disks {
        let (top, map) = (files.next().ok_or_else(invalid)?, has_map.then(|| files.next()).flatten());
        disks.push(ReceivedDisk { drive, top, map });
    }
    let config = handover::received(config.into())?;
    let image = Image::received(state.into(), slabs, disks, Saved::Here)?;
    let shown: Vec<OsString> = order.arguments.into_iter().map(OsString::from_vec).collect();
    arguments::show(&shown).map_err(StandbyError::Arguments)?;
    Ok(Some(Chosen { config, image, bare }))
}

/// `count` descriptors.
fn receive_files(link: &UnixStream, count: usize) -> io::Result<Vec<OwnedFd>> {
    let (mut files, mut buffer) = (Vec::new(), [0; MAX_PACKET_BYTES]);
    while files.len() < count {
        let (_, more) = packets::receive_all(link, &mut buffer)?;
        if more.is_empty() || files.len() + more.len() > count {
            return Err(io::ErrorKind::InvalidData.into());
        }
        files.extend(more);
    }
    Ok(files)
}

/// Whether the other end is closed. What was sent to this one and not read makes it a reset.
fn is_end(error: &io::Error) -> bool {
    use io::ErrorKind::{BrokenPipe, ConnectionReset, UnexpectedEof};
    matches!(error.kind(), BrokenPipe | ConnectionReset | UnexpectedEof)
}

impl Chosen {
    /// What it is to be.
    pub fn config(&self) -> &VmConfig {
        &self.config
    }

    /// Runs the VM to its end. To be called when the process is prepared for it.
    pub fn run(self) -> Result<Ending, VmError> {
        let Self { config, image, bare } = self;
        let mut events = EventLoop::new(config.lifeline)?;
        let vm = Vm::start_in(Some(bare), Some(image), &config, &mut events)?;
        serve(vm, &mut events)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slabs_arrive_however_many_packets_they_take() {
        let file = tempfile::tempfile().unwrap();
        let link = || packets::pair().map(|(a, b)| (UnixStream::from(a), UnixStream::from(b))).unwrap();
        for count in [0, 1, MAX_FILES, 3 * MAX_FILES + 1] {
            let (ours, theirs) = link();
            let slabs = vec![file.as_fd(); count];
            let image = ImageFiles { state: file.as_fd(), slabs: &slabs, disks: &[] };
            let arguments = ["run", "--name", "a"].map(OsString::from);
            hand_over(&ours, &arguments, &VmConfig::default(), &file, image).unwrap();
            let mut buffer = [0; MAX_PACKET_BYTES];
            let (packet, files) = packets::receive_all(&theirs, &mut buffer).unwrap();
            let order: Order = postcard::from_bytes(packet).unwrap();
            assert_eq!((order.slabs as usize, files.len()), (count, FIRST_FILES));
            assert_eq!(order.arguments[2], b"a");
            assert_eq!(receive_files(&theirs, count).unwrap().len(), count);
        }
    }

    #[test]
    fn what_is_no_slab_or_one_too_many_is_refused() {
        let file = tempfile::tempfile().unwrap();
        for sent in [0, 2] {
            let (ours, theirs) = packets::pair().unwrap();
            packets::send_all(&ours.into(), b"files", &vec![file.as_fd(); sent]).unwrap();
            let error = receive_files(&theirs.into(), 1).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidData);
        }
        let (ours, theirs) = packets::pair().unwrap();
        drop(ours);
        assert!(is_end(&receive_files(&theirs.into(), 1).unwrap_err()));
    }
}
