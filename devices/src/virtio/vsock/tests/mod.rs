use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

use tempfile::TempDir;
use virtio_bindings::bindings::virtio_mmio as reg;
use vm_memory::{Bytes, GuestAddress};

use super::connection::BUFFER_BYTES;
use super::packet::{HOST_CID, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, STREAM, op};
use super::*;
use crate::virtio::TRANSPORT_FEATURES;
use crate::virtio::testing::*;

mod fuzz;

const CID: u32 = 7;
const GUEST_PORT: u32 = 1024;
const SLOT_BYTES: u64 = 0x2000;

struct Guest {
    driver: Driver,
    rings: Vec<Ring>,
    dir: TempDir,
    /// Buffers offered to receive, and used ones that were looked at.
    offered: u16,
    seen: u16,
}

impl Guest {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("v.sock");
        let listener = UnixListener::bind(&path).unwrap();
        let dial: Dial = Box::new(move |port| UnixStream::connect(format!("{}_{port}", path.display())));
        let driver = Driver::new(Vsock::new(CID, listener, dial).unwrap());
        let mut guest = Self { driver, rings: Vec::new(), dir, offered: 0, seen: 0 };
        guest.start();
        guest
    }

    fn start(&mut self) {
        self.driver.negotiate(TRANSPORT_FEATURES);
        self.rings = (0..3).map(|queue| self.driver.add_queue(queue, 16)).collect();
        self.driver.add_status(DRIVER_OK);
        (self.offered, self.seen) = (0, 0);
        assert_eq!(self.driver.status() & (DRIVER_OK | NEEDS_RESET), DRIVER_OK);
    }

    fn path(&self, port: u32) -> PathBuf {
        self.dir.path().join(format!("v.sock_{port}"))
    }

    fn connect(&self) -> UnixStream {
        let host = UnixStream::connect(self.dir.path().join("v.sock")).unwrap();
        host.set_nonblocking(true).unwrap();
        host
    }

    /// Sends a packet with this data.
    fn send(&mut self, header: Header, data: &[u8]) {
        let header =
            Header { src_cid: CID.into(), dst_cid: HOST_CID, kind: STREAM, len: data.len() as u32, ..header };
        self.send_as_it_is(header, data);
    }

    fn send_as_it_is(&mut self, header: Header, data: &[u8]) {
        let packet = [&header.bytes()[..], data].concat();
        self.driver.memory.write_slice(&packet, GuestAddress(HIGH_RAM_START)).unwrap();
        self.rings[TRANSMIT].descriptor(0, (HIGH_RAM_START, packet.len() as u32, 0, 0));
        self.rings[TRANSMIT].offer(0);
        self.driver.kick(TRANSMIT as u32);
    }

    /// The next packet for the guest, if there is one.
    fn receive(&mut self) -> Option<(Header, Vec<u8>)> {
        while self.offered < self.seen + 4 {
            let at = BUFFERS + SLOT_BYTES * u64::from(self.offered % 16);
            self.rings[RECEIVE].descriptor(self.offered % 16, (at, SLOT_BYTES as u32, WRITE, 0));
            self.rings[RECEIVE].offer(self.offered % 16);
            self.offered += 1;
        }
        for _ in 0..100 {
            if self.driver.transport.notify(RECEIVE) == Progress::Idle {
                break;
            }
        }
        if self.rings[RECEIVE].used_idx() == self.seen {
            return None;
        }
        let (head, len) = self.rings[RECEIVE].used(self.seen);
        self.seen += 1;
        let bytes = self.driver.bytes(BUFFERS + SLOT_BYTES * u64::from(head), len as usize);
        let (header, data) = bytes.split_first_chunk().unwrap();
        let header = Header::parse(header);
        assert_eq!((header.src_cid, header.dst_cid), (HOST_CID, CID.into()));
        // What is of another type is refused as that.
        assert!(header.kind == STREAM || header.op == op::RST, "{header:?}");
        assert_eq!(header.len as usize, data.len());
        Some((header, data.to_vec()))
    }

    fn operation(&mut self) -> Option<u16> {
        self.receive().map(|(header, _)| header.op)
    }

    /// A connection that the host has made to the guest, and its port.
    fn connected(&mut self, room: u32) -> (UnixStream, u32) {
        let mut host = self.connect();
        host.write_all(format!("CONNECT {GUEST_PORT}\n").as_bytes()).unwrap();
        let (request, _) = self.receive().unwrap();
        assert_eq!((request.op, request.dst_port), (op::REQUEST, GUEST_PORT));
        self.send(Header { op: op::RESPONSE, ..about(request.src_port, room, 0) }, &[]);
        let mut ok = [0; 32];
        let read = host.read(&mut ok).unwrap();
        assert_eq!(&ok[..read], format!("OK {}\n", request.src_port).as_bytes());
        (host, request.src_port)
    }
}

fn about(host_port: u32, room: u32, taken: u32) -> Header {
    Header { src_port: GUEST_PORT, dst_port: host_port, buf_alloc: room, fwd_cnt: taken, ..Header::default() }
}

fn read(host: &mut UnixStream) -> Result<Vec<u8>, ErrorKind> {
    let mut bytes = vec![0; 1 << 17];
    let read = host.read(&mut bytes).map_err(|error| error.kind())?;
    bytes.truncate(read);
    Ok(bytes)
}

#[test]
fn the_host_connects_and_bytes_go_both_ways() {
    let mut guest = Guest::new();
    assert_eq!(guest.driver.read(reg::VIRTIO_MMIO_DEVICE_ID), 19);
    let (mut host, port) = guest.connected(1 << 16);
    host.write_all(b"hello").unwrap();
    let (header, data) = guest.receive().unwrap();
    assert_eq!((header.op, header.src_port, data.as_slice()), (op::RW, port, &b"hello"[..]));
    assert_eq!((header.buf_alloc, header.fwd_cnt), (BUFFER_BYTES, 0));
    guest.send(Header { op: op::RW, ..about(port, 1 << 16, 5) }, b"world");
    assert_eq!(read(&mut host), Ok(b"world".to_vec()));
    // The host's end of writing is the guest's end of reading, and the guest's is the host's.
    host.shutdown(std::net::Shutdown::Write).unwrap();
    let (header, _) = guest.receive().unwrap();
    assert_eq!((header.op, header.flags, header.fwd_cnt), (op::SHUTDOWN, SHUTDOWN_SEND, 5));
    let flags = SHUTDOWN_SEND | SHUTDOWN_RECEIVE;
    guest.send(Header { op: op::SHUTDOWN, flags, ..about(port, 1 << 16, 5) }, &[]);
    assert_eq!(guest.operation(), Some(op::RST));
    assert_eq!(read(&mut host), Ok(vec![]));
    assert_eq!(guest.operation(), None);
}

#[test]
fn the_guest_connects_to_who_listens_and_to_none_else() {
    let mut guest = Guest::new();
    let request = Header { op: op::REQUEST, ..about(52, 4096, 0) };
    guest.send(request, &[]);
    assert_eq!(guest.operation(), Some(op::RST));
    let listener = UnixListener::bind(guest.path(52)).unwrap();
    guest.send(request, &[]);
    assert_eq!(guest.operation(), Some(op::RESPONSE));
    let (mut host, _) = listener.accept().unwrap();
    guest.send(Header { op: op::RW, ..about(52, 4096, 0) }, b"abc");
    assert_eq!(read(&mut host), Ok(b"abc".to_vec()));
    // It ends with the host's program.
    drop(host);
    assert_eq!(guest.operation(), Some(op::SHUTDOWN));
    guest.send(Header { op: op::RW, ..about(52, 4096, 0) }, b"abc");
    assert_eq!(guest.operation(), Some(op::RST));
    // And a reset of the device is the host's end of file.
    guest.send(request, &[]);
    let (mut host, _) = listener.accept().unwrap();
    guest.start();
    assert_eq!(read(&mut host), Ok(vec![]));
}

#[test]
fn no_more_is_sent_than_the_guest_has_room_for() {
    let mut guest = Guest::new();
    let (mut host, port) = guest.connected(100);
    host.write_all(&[7; 250]).unwrap();
    let (header, data) = guest.receive().unwrap();
    assert_eq!((header.op, data), (op::RW, vec![7; 100]));
    assert_eq!((guest.operation(), guest.operation()), (Some(op::CREDIT_REQUEST), None));
    guest.send(Header { op: op::CREDIT_UPDATE, ..about(port, 100, 60) }, &[]);
    assert_eq!(guest.receive().unwrap().1.len(), 60);
    assert_eq!((guest.operation(), guest.operation()), (Some(op::CREDIT_REQUEST), None));
    // A guest that takes room back, or has taken what was never sent, gets nothing, and no harm
    // comes of it.
    guest.send(Header { op: op::CREDIT_UPDATE, ..about(port, 1, 0) }, &[]);
    assert_eq!((guest.operation(), guest.operation()), (Some(op::CREDIT_REQUEST), None));
    guest.send(Header { op: op::CREDIT_UPDATE, ..about(port, u32::MAX, 160) }, &[]);
    assert_eq!(guest.receive().unwrap().1.len(), 90);
}

#[test]
fn a_host_that_never_reads_stops_its_own_connection_only() {
    let mut guest = Guest::new();
    let (mut deaf, port) = guest.connected(1 << 16);
    let (mut other, other_port) = guest.connected(1 << 16);
    let (mut sent, mut room) = (0u32, (BUFFER_BYTES, 0u32));
    // A good driver keeps within the room that it is told of.
    while sent.wrapping_sub(room.1) + 4096 <= room.0 {
        guest.send(Header { op: op::RW, ..about(port, 1 << 16, 0) }, &[1; 4096]);
        sent += 4096;
        while let Some((header, _)) = guest.receive() {
            assert_eq!((header.op, header.src_port), (op::CREDIT_UPDATE, port));
            room = (header.buf_alloc, header.fwd_cnt);
        }
        assert!(sent < 1 << 24, "it never ends");
    }
    guest.send(Header { op: op::RW, ..about(other_port, 1 << 16, 0) }, b"still here");
    assert_eq!(read(&mut other), Ok(b"still here".to_vec()));
    // All of it arrives as soon as it is read.
    let mut got = 0;
    while got < sent as usize {
        match read(&mut deaf) {
            Ok(bytes) => got += bytes.len(),
            Err(ErrorKind::WouldBlock) => while guest.receive().is_some() {},
            Err(error) => panic!("{error}"),
        }
    }
    // One that sends beyond its room is cut off.
    for _ in 0..600 {
        guest.send(Header { op: op::RW, ..about(other_port, 1 << 16, 0) }, &[2; 4096]);
    }
    let mut operations = std::iter::from_fn(|| guest.operation());
    assert!(operations.any(|operation| operation == op::RST));
}

#[test]
fn what_makes_no_sense_is_answered_or_dropped() {
    let mut guest = Guest::new();
    let header = Header { src_cid: CID.into(), dst_cid: HOST_CID, kind: STREAM, ..about(9, 0, 0) };
    for (header, answer) in [
        (Header { op: op::RW, ..header }, Some(op::RST)),
        (Header { op: op::RST, ..header }, None),
        (Header { op: 77, ..header }, Some(op::RST)),
        (Header { src_cid: 3, op: op::REQUEST, ..header }, None),
        (Header { dst_cid: 3, op: op::REQUEST, ..header }, None),
        (Header { op: op::RW, len: 1, ..header }, None),
        (Header { op: op::RW, len: u32::MAX, ..header }, None),
    ] {
        guest.send_as_it_is(header, &[]);
        assert_eq!(guest.operation(), answer, "{header:?}");
    }
    // Greetings that are none.
    for text in
        ["CONNECT\n", "CONNECT x\n", "GET / HTTP/1.1\r\n\r\n", "CONNECT 4294967296\n", &"x".repeat(100)]
    {
        let mut host = guest.connect();
        host.write_all(text.as_bytes()).unwrap();
        assert_eq!(guest.operation(), None, "{text:?}");
        let ended = read(&mut host);
        assert!(
            matches!(&ended, Ok(bytes) if bytes.is_empty()) || ended == Err(ErrorKind::ConnectionReset),
            "{ended:?}"
        );
    }
    // One that comes in pieces is one.
    let mut host = guest.connect();
    for text in ["CON", "NECT 10", "24\n"] {
        assert_eq!(guest.operation(), None);
        host.write_all(text.as_bytes()).unwrap();
    }
    assert_eq!(guest.operation(), Some(op::REQUEST));
}

#[test]
fn connections_are_bounded() {
    let mut guest = Guest::new();
    let hosts: Vec<UnixStream> = (0..mux::MAX_CONNECTIONS + 20)
        .map(|_| {
            let host = guest.connect();
            guest.operation();
            host
        })
        .collect();
    let ended = hosts.into_iter().filter_map(|mut host| read(&mut host).ok()).count();
    assert_eq!(ended, 20);
}

#[test]
fn a_driver_that_goes_on_elsewhere_is_told_that_its_connections_are_gone() {
    let mut guest = Guest::new();
    let _ = guest.connected(4096);
    let saved = guest.driver.transport.save();
    let mut copy = Guest::new();
    let (from, to) = (guest.driver.memory.clone(), copy.driver.memory.clone());
    let mut all = vec![0; LOW_RAM as usize];
    from.read_slice(&mut all, GuestAddress(0)).unwrap();
    to.write_slice(&all, GuestAddress(0)).unwrap();
    let listener = UnixListener::bind(copy.dir.path().join("other")).unwrap();
    let device = Vsock::new(CID + 1, listener, Box::new(|_| Err(ErrorKind::NotFound.into()))).unwrap();
    copy.driver = Driver::over(to, device);
    copy.driver.transport.restore(&saved).unwrap();
    let mut events = Ring::new(&copy.driver.memory, EVENTS, 16);
    events.descriptor(0, (BUFFERS + 0xf000, 8, WRITE, 0));
    copy.driver.memory.write_slice(&[7; 8], GuestAddress(BUFFERS + 0xf000)).unwrap();
    events.offer(0);
    copy.driver.transport.notify(EVENTS);
    assert_eq!(copy.driver.bytes(BUFFERS + 0xf000, 8), [0, 0, 0, 0, 7, 7, 7, 7]);
    assert_eq!((copy.driver.read(0x100), copy.driver.read(0x104)), (CID + 1, 0));
}
