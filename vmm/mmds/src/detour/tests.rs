//! A guest's stack on one side, a TAP on the other.

use std::os::unix::net::UnixDatagram;

use proptest::prelude::*;
use rustix::event::{PollFd, PollFlags, poll};
use serde_json::json;
use smoltcp::iface::{Config as IfaceConfig, Interface, SocketHandle, SocketSet};
use smoltcp::phy::{self, Device, DeviceCapabilities, Medium};
use smoltcp::socket::tcp::{Socket, SocketBuffer, State};
use smoltcp::time::Instant as StackInstant;
use smoltcp::wire::{HardwareAddress, IpCidr};

use super::*;
use crate::{ADDRESS, SIZE_LIMIT, Version};

const GUEST_MAC: [u8; 6] = [2, 0, 0, 0, 0, 7];
const GUEST: [u8; 4] = [10, 0, 0, 2];
const MAX_FRAME: usize = 65_600;

struct Segment(UnixDatagram);

impl Tap for Segment {
    fn send(&mut self, frame: &[u8]) -> io::Result<()> {
        self.0.send(frame).map(drop)
    }

    fn receive(&mut self, frame: &mut [u8]) -> io::Result<usize> {
        self.0.recv(frame)
    }

    fn set_offload(&mut self, _: Offload) -> io::Result<()> {
        Ok(())
    }

    fn readable(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

fn detour(contents: serde_json::Value) -> (Detour, UnixDatagram) {
    let (ours, host) = UnixDatagram::pair().unwrap();
    ours.set_nonblocking(true).unwrap();
    host.set_nonblocking(true).unwrap();
    let store = Store::default();
    store.put(contents, SIZE_LIMIT).unwrap();
    let config = Config { version: Version::V1, address: ADDRESS, imds_compat: false };
    (Detour::new(Box::new(Segment(ours)), config, store).unwrap(), host)
}

fn is_readable(detour: &Detour) -> bool {
    let readable = detour.readable();
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    poll(&mut [PollFd::new(&readable, PollFlags::IN)], Some(&now)).unwrap() > 0
}

fn received(detour: &mut Detour) -> Option<Vec<u8>> {
    let mut frame = vec![0; MAX_FRAME];
    let bytes = detour.receive(&mut frame).ok()?;
    frame.truncate(bytes);
    Some(frame)
}

fn frame(kind: [u8; 2], packet: &[u8]) -> Vec<u8> {
    [&[0; HEADER_BYTES][..], &MAC, &GUEST_MAC, &kind, packet].concat()
}

/// The guest's link: its packets become frames for the detour, and the other way round.
struct Link<'a>(&'a mut Detour);
struct Came(Vec<u8>);
struct Goes<'a>(&'a mut Detour);

impl Device for Link<'_> {
    type RxToken<'b>
        = Came
    where
        Self: 'b;
    type TxToken<'b>
        = Goes<'b>
    where
        Self: 'b;

    fn receive(&mut self, _: StackInstant) -> Option<(Came, Goes<'_>)> {
        let came = received(self.0)?;
        assert_eq!(came[HEADER_BYTES..HEADER_BYTES + 6], GUEST_MAC);
        assert_eq!(came[HEADER_BYTES + 6..HEADER_BYTES + 14], [&MAC[..], &TYPE_IPV4].concat());
        Some((Came(came[HEADER_BYTES + ETHERNET_BYTES..].to_vec()), Goes(self.0)))
    }

    fn transmit(&mut self, _: StackInstant) -> Option<Goes<'_>> {
        Some(Goes(self.0))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ip;
        capabilities.max_transmission_unit = 1500;
        capabilities
    }
}

impl phy::RxToken for Came {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(&self.0)
    }
}

impl phy::TxToken for Goes<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, bytes: usize, f: F) -> R {
        let mut packet = vec![0; bytes];
        let result = f(&mut packet);
        self.0.send(&frame(TYPE_IPV4, &packet)).unwrap();
        result
    }
}

struct Guest {
    interface: Interface,
    sockets: SocketSet<'static>,
    start: Instant,
    next_port: u16,
}

impl Guest {
    fn new(detour: &mut Detour) -> Self {
        let mut interface =
            Interface::new(IfaceConfig::new(HardwareAddress::Ip), &mut Link(detour), StackInstant::ZERO);
        interface.update_ip_addrs(|all| all.push(IpCidr::new(Ipv4Addr::from(GUEST).into(), 24)).unwrap());
        interface.routes_mut().add_default_ipv4_route(Ipv4Addr::new(10, 0, 0, 1)).unwrap();
        Self { interface, sockets: SocketSet::new(Vec::new()), start: Instant::now(), next_port: 40_000 }
    }

    fn poll(&mut self, detour: &mut Detour) {
        let now = StackInstant::from_micros(self.start.elapsed().as_micros() as i64);
        self.interface.poll(now, &mut Link(detour), &mut self.sockets);
    }

    fn connect(&mut self) -> SocketHandle {
        let buffer = || SocketBuffer::new(vec![0; 4096]);
        let mut socket = Socket::new(buffer(), buffer());
        self.next_port += 1;
        socket
            .connect(self.interface.context(), (Ipv4Addr::from(ADDRESS.octets()), 80), self.next_port)
            .unwrap();
        self.sockets.add(socket)
    }

    /// Sends a request and reads until the connection ends.
    fn ask(&mut self, detour: &mut Detour, request: &str) -> String {
        let handle = self.connect();
        let (mut sent, mut answer) = (0, Vec::new());
        let until = Instant::now() + Duration::from_secs(60);
        loop {
            self.poll(detour);
            let socket = self.sockets.get_mut::<Socket<'_>>(handle);
            if socket.can_send() && sent < request.len() {
                sent += socket.send_slice(&request.as_bytes()[sent..]).unwrap();
            }
            if socket.can_recv() {
                socket.recv(|bytes| (bytes.len(), answer.extend_from_slice(bytes))).unwrap();
            } else if !socket.may_recv() && sent == request.len() && socket.state() != State::SynSent {
                socket.close();
                break;
            }
            assert!(Instant::now() < until, "no answer: {}", String::from_utf8_lossy(&answer));
        }
        for _ in 0..10 {
            self.poll(detour);
        }
        self.sockets.remove(handle);
        String::from_utf8(answer).unwrap()
    }
}

fn closing(path: &str) -> String {
    format!("GET {path} HTTP/1.1\r\nHost: 169.254.169.254\r\nConnection: close\r\n\r\n")
}

#[test]
fn a_guest_reads_its_metadata_whatever_its_size() {
    let long: String = (0..40_000).map(|n| char::from(b'a' + (n % 26) as u8)).collect();
    let (mut detour, host) = detour(json!({"short": "hello", "long": long}));
    let mut guest = Guest::new(&mut detour);
    // More than there may be connections at a time.
    for n in 0..30 {
        let (path, body) = if n % 3 == 0 { ("/long", long.as_str()) } else { ("/short", "hello") };
        let answer = guest.ask(&mut detour, &closing(path));
        assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{n}: {answer:.80}");
        assert_eq!(answer.split_once("\r\n\r\n").unwrap().1, body, "{n}");
    }
    assert!(host.recv(&mut [0; 100]).is_err(), "the host sees nothing of it");
}

#[test]
fn arp_is_answered_and_other_frames_pass() {
    let (mut detour, host) = detour(json!({"a": "b"}));
    let ask = |target: [u8; 4]| {
        let packet = [&ARP_REQUEST[..], &GUEST_MAC, &GUEST, &[0; 6], &target].concat();
        frame(TYPE_ARP, &packet)
    };
    assert!(!is_readable(&detour));
    detour.send(&ask(ADDRESS.octets())).unwrap();
    assert!(is_readable(&detour));
    let reply = received(&mut detour).unwrap();
    let expected = [&ARP_REPLY[..], &MAC, &ADDRESS.octets(), &GUEST_MAC, &GUEST].concat();
    assert_eq!(reply[HEADER_BYTES..HEADER_BYTES + 14], [&GUEST_MAC[..], &MAC, &TYPE_ARP].concat());
    assert_eq!(reply[HEADER_BYTES + ETHERNET_BYTES..], expected);
    assert!(received(&mut detour).is_none() && !is_readable(&detour));
    // What is for others, and what is cut off, is the host's.
    let ours = ask(ADDRESS.octets());
    let mut passed = vec![ask([10, 0, 0, 1]), frame(TYPE_IPV4, &[0x45; 40])];
    passed.extend((1..HEADER_BYTES + ETHERNET_BYTES + ARP_BYTES).map(|end| ours[..end].to_vec()));
    for sent in passed {
        detour.send(&sent).unwrap();
        let mut got = vec![0; MAX_FRAME];
        let bytes = host.recv(&mut got).unwrap();
        assert_eq!(&got[..bytes], sent);
    }
    host.send(&frame(TYPE_IPV4, &[1; 60])).unwrap();
    assert!(is_readable(&detour));
    assert_eq!(received(&mut detour), Some(frame(TYPE_IPV4, &[1; 60])));
}

/// One that opens connections and says nothing has them until they are given up, and then others
/// are served.
#[test]
fn connections_are_bounded() {
    let (mut detour, _host) = detour(json!({"a": "b"}));
    let mut guest = Guest::new(&mut detour);
    let all: Vec<_> = (0..20).map(|_| guest.connect()).collect();
    for _ in 0..50 {
        guest.poll(&mut detour);
    }
    let open =
        |guest: &Guest| all.iter().filter(|one| guest.sockets.get::<Socket<'_>>(**one).may_send()).count();
    assert!((1..=8).contains(&open(&guest)), "{}", open(&guest));
    // Time passes for the service alone.
    detour.stack.turn(Instant::now() + Duration::from_secs(11));
    detour.stack.turn(Instant::now() + Duration::from_secs(12));
    for _ in 0..50 {
        guest.poll(&mut detour);
    }
    assert_eq!(open(&guest), 0);
    assert!(guest.ask(&mut detour, &closing("/a")).ends_with("\r\n\r\nb"));
}

/// A packet of the guest's as Linux would send it: a SYN to the service.
fn syn() -> Vec<u8> {
    let tcp = [0x9c, 0x40, 0, 80, 0, 0, 0, 1, 0, 0, 0, 0, 0x50, 2, 0xff, 0xff, 0, 0, 0, 0];
    let mut ip = vec![0x45, 0, 0, 40, 0, 1, 0x40, 0, 64, 6, 0, 0];
    ip.extend(GUEST.iter().chain(&ADDRESS.octets()));
    let sum: u32 = ip.chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(pair[1])).sum();
    let sum = !((sum & 0xffff) + (sum >> 16)) as u16;
    ip[10..12].copy_from_slice(&sum.to_be_bytes());
    frame(TYPE_IPV4, &[ip, tcp.to_vec()].concat())
}

#[test]
fn packets_of_every_length_are_survived() {
    let (mut detour, host) = detour(json!({"a": "b"}));
    let whole = syn();
    for end in 0..=whole.len() {
        detour.send(&whole[..end]).unwrap_or_default();
        while received(&mut detour).is_some() {}
        while host.recv(&mut [0; 100]).is_ok() {}
    }
    // And what claims to be longer, or has much behind it.
    for bytes in [60, 1500, 65_000] {
        let mut long = whole.clone();
        long.resize(HEADER_BYTES + ETHERNET_BYTES + bytes, 0xaa);
        for total in [0, 19, 20, 40, 41, 0xffff_u16] {
            long[HEADER_BYTES + ETHERNET_BYTES + 2..][..2].copy_from_slice(&total.to_be_bytes());
            detour.send(&long).unwrap();
            while received(&mut detour).is_some() {}
        }
    }
    let mut guest = Guest::new(&mut detour);
    assert!(guest.ask(&mut detour, &closing("/a")).ends_with("\r\n\r\nb"));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Frames with bytes changed, after which a good guest is served.
    #[test]
    fn rubbish_is_survived(
        changes in prop::collection::vec(prop::collection::vec((12usize..66, any::<u8>()), 0..6), 1..60),
        tails in prop::collection::vec(0usize..3000, 1..60),
    ) {
        let (mut detour, host) = detour(json!({"a": "b"}));
        for (change, tail) in changes.iter().zip(tails.iter().cycle()) {
            let mut sent = syn();
            for (at, byte) in change {
                sent[*at] = *byte;
            }
            sent.resize(sent.len() + tail, 0x45);
            let _ = detour.send(&sent);
            // A guest that takes its time, or nothing.
            if tail % 3 > 0 {
                while received(&mut detour).is_some() {}
            }
            while host.recv(&mut [0; 100]).is_ok() {}
        }
        while received(&mut detour).is_some() {}
        detour.stack.turn(Instant::now() + Duration::from_secs(100));
        detour.stack.turn(Instant::now() + Duration::from_secs(200));
        while received(&mut detour).is_some() {}
    }
}
