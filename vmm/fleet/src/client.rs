//! The two ways into a VM process: its control socket (JSON lines) and its COM2 socket (the guest's
//! protocol).

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use guest::protocol::{Command, LineReader, Reply};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::HostError;
use machine::control;
use os::Peer;
use wire::{LineError, Lines};

pub use wire::connect;

/// How long a VM process, or the daemon, may take to answer what it can answer at once.
pub(super) const ANSWER_LIMIT: Duration = Duration::from_secs(20);
/// Longest answer that is read.
pub(super) const MAX_ANSWER_BYTES: usize = 64 << 20;
/// How often a silent socket is looked at again, for an interrupt.
const POLL: Duration = Duration::from_millis(200);

/// Asks one question of a JSON-lines socket and reads one answer of whatever form, within `limit`.
pub fn ask<A: DeserializeOwned>(
    stream: UnixStream,
    question: &impl Serialize,
    limit: Duration,
) -> Result<A, LineError> {
    let (mut lines, until) = (Lines::new(stream, MAX_ANSWER_BYTES), Instant::now() + limit);
    lines.send_json(question, until)?;
    serde_json::from_slice(&lines.receive(until)?).map_err(LineError::NotUnderstood)
}

/// Asks a VM's control socket; its refusal is an error.
pub fn control(guest: &str, path: &Path, request: &control::Request) -> Result<control::Reply, HostError> {
    control_within(guest, path, None, request, ANSWER_LIMIT)
}

/// As [`control`], with this time to answer. Where it is known which process the VM is, no other
/// one is asked.
pub fn control_within(
    guest: &str,
    path: &Path,
    pid: Option<u32>,
    request: &control::Request,
    limit: Duration,
) -> Result<control::Reply, HostError> {
    let connected = connect(path, limit).and_then(|stream| check_peer(&stream, pid).map(|()| stream));
    match connected {
        Ok(stream) => ask_vm(guest, stream, request, limit),
        Err(source) => vm_answer(guest, Err(source.into())),
    }
}

/// Asks the VM of `guest`, which is at the other end of `stream`.
pub(super) fn ask_vm(
    guest: &str,
    stream: UnixStream,
    request: &control::Request,
    limit: Duration,
) -> Result<control::Reply, HostError> {
    vm_answer(guest, Lines::new(stream, MAX_ANSWER_BYTES).ask(request, Instant::now() + limit))
}

/// What came of asking the VM of `guest`; its refusal is an error.
pub(super) fn vm_answer(
    guest: &str,
    answer: Result<control::Answer, LineError>,
) -> Result<control::Reply, HostError> {
    match answer {
        Ok(Ok(reply)) => Ok(reply),
        Ok(Err(refusal)) => Err(HostError::Control { guest: guest.into(), refusal }),
        Err(source) => Err(HostError::socket(format!("the VM of guest {guest}"), source)),
    }
}

/// An error if another process than `pid` listens.
pub(super) fn check_peer(stream: &UnixStream, pid: Option<u32>) -> io::Result<()> {
    let Some(pid) = pid else { return Ok(()) };
    match Peer::of(stream)?.pid {
        peer if peer == pid => Ok(()),
        peer => Err(io::Error::other(format!("process {peer} answers there, not process {pid}"))),
    }
}

/// A guest's control channel.
pub struct Com2 {
    guest: String,
    stream: UnixStream,
    reader: LineReader,
    buffered: Vec<u8>,
    generation: Option<u64>,
}

impl Com2 {
    /// Connects to the COM2 socket of `guest`, whose VM is process `pid`.
    pub fn connect(guest: &str, path: &Path, pid: u32) -> io::Result<Self> {
        let stream = connect(path, ANSWER_LIMIT)?;
        check_peer(&stream, Some(pid))?;
        stream.set_read_timeout(Some(POLL))?;
        stream.set_write_timeout(Some(ANSWER_LIMIT))?;
        Ok(Self {
            guest: guest.into(),
            stream,
            reader: LineReader::new(),
            buffered: Vec::new(),
            generation: None,
        })
    }

    /// The number by which the guest said that it is a copy, if it has since this was connected.
    pub fn generation(&self) -> Option<u64> {
        self.generation
    }

    /// The next reply, or None after `POLL` without one. What is no reply is skipped: a guest may
    /// say anything.
    pub fn poll(&mut self) -> Result<Option<Reply>, HostError> {
        let failed = |source: io::Error| HostError::socket(format!("COM2 of guest {}", self.guest), source);
        if self.buffered.is_empty() {
            let mut bytes = [0u8; 1024];
            match self.stream.read(&mut bytes) {
                Ok(0) => return Err(failed(io::ErrorKind::UnexpectedEof.into())),
                Ok(n) => self.buffered.extend(&bytes[..n]),
                Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {
                    return Ok(None);
                }
                Err(e) => return Err(failed(e)),
            }
        }
        let mut used = 0;
        let mut reply = None;
        for byte in &self.buffered {
            used += 1;
            if let Some(Ok(line)) = self.reader.push(*byte)
                && let Ok(parsed) = Reply::parse(line)
            {
                if let Reply::Generation { number } = parsed {
                    self.generation = Some(number);
                }
                reply = Some(parsed);
                break;
            }
        }
        self.buffered.drain(..used);
        Ok(reply)
    }

    /// Sends a command and waits for its final reply. `step` sees progress and may end the wait by
    /// an error; it is also called, without progress, while the guest is silent, and says whether
    /// that is no fault of the guest's. Silence that is, is allowed for `limit`.
    pub fn command(
        &mut self,
        command: &Command,
        limit: Duration,
        step: &mut dyn FnMut(Option<(u64, u64)>) -> Result<bool, HostError>,
    ) -> Result<Reply, HostError> {
        let failed =
            |guest: &str, source: io::Error| HostError::socket(format!("COM2 of guest {guest}"), source);
        self.stream.write_all(format!("{command}\n").as_bytes()).map_err(|e| failed(&self.guest, e))?;
        let mut heard = Instant::now();
        loop {
            match self.poll()? {
                Some(Reply::Progress { done, total }) => {
                    heard = Instant::now();
                    step(Some((done, total)))?;
                }
                Some(reply @ (Reply::Err { .. } | Reply::Panic { .. })) => {
                    return Err(HostError::Refused {
                        guest: self.guest.clone(),
                        command: command.to_string(),
                        answer: reply.to_string(),
                    });
                }
                Some(reply) if reply.is_final() => return Ok(reply),
                _ if step(None)? => heard = Instant::now(),
                _ => {}
            }
            if heard.elapsed() > limit {
                return Err(HostError::Stuck {
                    guest: self.guest.clone(),
                    command: command.to_string(),
                    limit,
                });
            }
        }
    }
}
