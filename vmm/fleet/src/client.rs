//! The two ways into a VM process: its control socket (JSON lines) and its COM2 socket (the guest's protocol).

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use guest::protocol::{Command, LineReader, Reply};
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, socket_with};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::HostError;
use machine::control;
use os::Peer;

/// How long a VM process, or the daemon, may take to answer what it can answer at once.
pub(super) const ANSWER_LIMIT: Duration = Duration::from_secs(20);
/// Longest answer that is read.
const MAX_ANSWER_BYTES: u64 = 64 << 20;
/// How often a silent socket is looked at again, for an interrupt.
const POLL: Duration = Duration::from_millis(200);

/// Connects to the socket at `path`. One whose process does not take clients is an error after `limit`.
pub fn connect(path: &Path, limit: Duration) -> io::Result<UnixStream> {
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    // For connecting, too, where the queue is full.
    set_socket_timeout(&socket, Timeout::Send, Some(limit))?;
    rustix::net::connect(&socket, &SocketAddrUnix::new(path)?)?;
    Ok(socket.into())
}

/// Asks one question of a JSON-lines socket and reads one answer, within `limit`.
pub fn ask<Q: Serialize, A: DeserializeOwned>(
    mut stream: UnixStream,
    question: &Q,
    limit: Duration,
) -> io::Result<A> {
    stream.set_read_timeout(Some(limit))?;
    stream.set_write_timeout(Some(limit))?;
    let mut line = serde_json::to_vec(question)?;
    line.push(b'\n');
    stream.write_all(&line)?;
    let mut answer = Vec::new();
    BufReader::new(stream).take(MAX_ANSWER_BYTES).read_until(b'\n', &mut answer)?;
    if answer.is_empty() {
        return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "it hung up without an answer"));
    }
    Ok(serde_json::from_slice(&answer)?)
}

/// Asks a VM's control socket; its refusal is an error.
pub fn control(guest: &str, path: &Path, request: &control::Request) -> Result<control::Reply, HostError> {
    control_within(guest, path, None, request, ANSWER_LIMIT)
}

/// As [`control`], with so long to answer. Where it is known which process the VM is, no other one is asked.
pub fn control_within(
    guest: &str,
    path: &Path,
    pid: Option<u32>,
    request: &control::Request,
    limit: Duration,
) -> Result<control::Reply, HostError> {
    let asked = connect(path, limit).and_then(|stream| {
        check_peer(&stream, pid)?;
        ask(stream, request, limit)
    });
    match asked {
        Ok(control::Reply::Error(answer)) => Err(HostError::Control { guest: guest.into(), answer }),
        Ok(reply) => Ok(reply),
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
}

impl Com2 {
    /// Connects to the COM2 socket of `guest`, whose VM is process `pid`.
    pub fn connect(guest: &str, path: &Path, pid: u32) -> io::Result<Self> {
        let stream = connect(path, ANSWER_LIMIT)?;
        check_peer(&stream, Some(pid))?;
        stream.set_read_timeout(Some(POLL))?;
        stream.set_write_timeout(Some(ANSWER_LIMIT))?;
        Ok(Self { guest: guest.into(), stream, reader: LineReader::new(), buffered: Vec::new() })
    }

    /// The next reply, or None after `POLL` without one. What is no reply is skipped: a guest may say anything.
    pub fn poll(&mut self) -> Result<Option<Reply>, HostError> {
        let failed = |source| HostError::socket(format!("COM2 of guest {}", self.guest), source);
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
                reply = Some(parsed);
                break;
            }
        }
        self.buffered.drain(..used);
        Ok(reply)
    }

    /// Sends a command and waits for its final reply. `step` sees progress and may end the wait by an error;
    /// it is also called, without progress, while the guest is silent, and says whether that is no fault of the guest's.
    /// Silence that is, is allowed for `limit`.
    pub fn command(
        &mut self,
        command: &Command,
        limit: Duration,
        step: &mut dyn FnMut(Option<(u64, u64)>) -> Result<bool, HostError>,
    ) -> Result<Reply, HostError> {
        let failed = |guest: &str, source| HostError::socket(format!("COM2 of guest {guest}"), source);
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
