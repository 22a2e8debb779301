//! The other side of a capture, as a fleet's daemon is: keeps what a VM gives of itself, one question after the other, and starts
//! VMs that go on from there.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use machine::capture::link::{Answer, Ask, Link, socket};
use machine::{ImageFds, VmConfig, handover};
use memory::slab::{Draft, Slab};
use os::handed;
use rustix::net::{SocketAddrUnix, SocketFlags, accept_with};

/// How long a VM may take from one question to the next.
const LIMIT: Duration = Duration::from_secs(60);

/// Where VMs that are captured connect to.
pub struct Listener {
    socket: OwnedFd,
    path: PathBuf,
}

impl Listener {
    /// Listens at `path`.
    ///
    /// # Errors
    /// There is something else.
    pub fn bind(path: PathBuf) -> io::Result<Self> {
        let socket = socket()?;
        rustix::net::bind(&socket, &SocketAddrUnix::new(&path)?)?;
        rustix::net::listen(&socket, 4)?;
        Ok(Self { socket, path })
    }

    /// Its path.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The next VM.
    ///
    /// # Errors
    /// None connects.
    pub fn accept(&self) -> io::Result<Keeper> {
        let link = Link::new(accept_with(self.socket.as_fd(), SocketFlags::CLOEXEC)?, LIMIT)?;
        Ok(Keeper { link, draft: None, slabs: Vec::new(), state: None })
    }
}

/// What is kept of one VM.
pub struct Keeper {
    link: Link,
    draft: Option<File>,
    slabs: Vec<(File, u64)>,
    state: Option<File>,
}

impl Keeper {
    /// Answers one question. Whether all is there then.
    ///
    /// # Errors
    /// There is none any more, or it makes no sense.
    pub fn step(&mut self) -> io::Result<bool> {
        let (question, file) = self.link.receive::<Ask>()?;
        let invalid = || io::Error::from(io::ErrorKind::InvalidData);
        let (answer, given) = match question {
            Ask::Draft(pages) => {
                let draft = Draft::new(pages).map_err(io::Error::other)?.into_file();
                self.draft = Some(draft.try_clone()?);
                (Answer::Draft, Some(draft))
            }
            Ask::Filled(pages) => {
                let draft = self.draft.take().ok_or_else(invalid)?;
                Slab::receive(draft.try_clone()?.into(), pages).map_err(io::Error::other)?;
                self.slabs.push((draft, pages));
                let number = u32::try_from(self.slabs.len() - 1).map_err(io::Error::other)?;
                (Answer::Number(number), None)
            }
            Ask::Known { .. } => (Answer::Known(None), None),
            Ask::Restart => {
                (self.draft, self.slabs) = (None, Vec::new());
                (Answer::Restarted, None)
            }
            Ask::Map | Ask::Disk { .. } => return Err(invalid()),
            Ask::State => {
                self.state = Some(file.ok_or_else(invalid)?);
                (Answer::Kept, None)
            }
        };
        self.link.send(&answer, given.as_ref().map(AsFd::as_fd))?;
        Ok(self.state.is_some())
    }

    /// The image, once all is there.
    ///
    /// # Errors
    /// It is not.
    pub fn image(self) -> io::Result<Image> {
        let state = self.state.ok_or(io::ErrorKind::UnexpectedEof)?;
        Ok(Image { state, slabs: self.slabs.into_iter().map(|(file, _)| file).collect() })
    }
}

/// A VM as it was.
pub struct Image {
    state: File,
    slabs: Vec<File>,
}

impl Image {
    /// The command that starts the VM of `config`, which goes on from here.
    ///
    /// # Errors
    /// Descriptors are short.
    pub fn command(&self, config: VmConfig) -> io::Result<Command> {
        let mut program = Command::new(crate::samepage());
        let state = handed::give(&mut program, self.state.try_clone()?.into());
        let give = |slab: &File| Ok(handed::give(&mut program, slab.try_clone()?.into()));
        let slabs = self.slabs.iter().map(give).collect::<io::Result<_>>()?;
        let (name, control) = (config.name.clone(), config.control.clone().unwrap_or_default());
        let image = Some(ImageFds { state, slabs, ..ImageFds::default() });
        let config = handover::write(&VmConfig { image, ..config })?;
        let config = handed::give(&mut program, config);
        program.args(["run", "--name", &name, "--control"]).arg(control);
        program.args(["--config-fd", &config.to_string()]);
        Ok(program)
    }
}
