//! TCP/IP for the service: smoltcp on IP packets. The guest is the only other host; frames and ARP
//! are [`crate::detour`]'s.

use std::collections::VecDeque;
use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use smoltcp::iface::{Config as IfaceConfig, Interface, SocketHandle, SocketSet};
use smoltcp::phy::{self, Checksum, Device, DeviceCapabilities, Medium};
use smoltcp::socket::tcp::{Socket, SocketBuffer, State};
use smoltcp::time::Instant as StackInstant;
use smoltcp::wire::{HardwareAddress, IpCidr};

use crate::service::{MAX_REQUEST_BYTES, Served, Service};

const HTTP_PORT: u16 = 80;
/// Connections at a time; one more is refused.
const MAX_CONNECTIONS: usize = 8;
/// What is on its way on one of them, to the service and from it.
const RECEIVE_BYTES: usize = MAX_REQUEST_BYTES;
const SEND_BYTES: usize = 8192;
/// Packets that wait for the guest's buffers.
const MAX_WAITING: usize = 64;
/// How long one may take for a request, and for its answer.
const PATIENCE: Duration = Duration::from_secs(10);
/// Bytes of a packet: a link of 1500, which every guest has or may have.
const MTU: usize = 1500;

/// The stack, with the service behind it.
pub struct Stack {
    service: Service,
    interface: Interface,
    sockets: SocketSet<'static>,
    link: Link,
    connections: Vec<Connection>,
    start: Instant,
}

struct Connection {
    socket: SocketHandle,
    /// What has come of a request.
    request: Vec<u8>,
    /// What has not been sent of its answer.
    answer: VecDeque<u8>,
    /// Whether it ends after that.
    is_last: bool,
    /// When it is given up.
    until: Option<Instant>,
}

impl Stack {
    pub fn new(address: Ipv4Addr, service: Service, now: Instant) -> Self {
        let mut link = Link::default();
        let mut config = IfaceConfig::new(HardwareAddress::Ip);
        // Sequence numbers that a guest cannot guess protect it from itself only.
        config.random_seed = u64::from(address.to_bits());
        let mut interface = Interface::new(config, &mut link, StackInstant::ZERO);
        interface.update_ip_addrs(|addresses| _ = addresses.push(IpCidr::new(address.into(), 32)));
        let mut sockets = SocketSet::new(Vec::new());
        let connections = (0..MAX_CONNECTIONS).map(|_| {
            let buffer = |bytes| SocketBuffer::new(vec![0; bytes]);
            let socket = sockets.add(Socket::new(buffer(RECEIVE_BYTES), buffer(SEND_BYTES)));
            Connection { socket, request: Vec::new(), answer: VecDeque::new(), is_last: false, until: None }
        });
        let connections = connections.collect();
        let mut stack = Self { service, interface, sockets, link, connections, start: now };
        stack.serve(now);
        stack
    }

    /// Takes a packet of the guest's to [`Stack::new`]'s address.
    pub fn take(&mut self, packet: &[u8], now: Instant) {
        self.link.arrived = Some(packet.to_vec());
        self.turn(now);
    }

    /// A packet for the guest.
    pub fn next(&mut self) -> Option<Vec<u8>> {
        self.link.waiting.pop_front()
    }

    pub fn has_next(&self) -> bool {
        !self.link.waiting.is_empty()
    }

    /// Does what is due: what came is answered, what was lost is sent again, what takes too long
    /// ends.
    pub fn turn(&mut self, now: Instant) {
        // What came is in the sockets after the first poll, and what is answered leaves by the
        // second.
        for _ in 0..2 {
            let at = self.at(now);
            self.interface.poll(at, &mut self.link, &mut self.sockets);
            self.serve(now);
        }
        let at = self.at(now);
        self.interface.poll(at, &mut self.link, &mut self.sockets);
        self.link.arrived = None;
    }

    /// When [`Stack::turn`] is due next, if nothing comes before.
    pub fn wait(&mut self, now: Instant) -> Option<Duration> {
        let at = self.at(now);
        let stack = self.interface.poll_delay(at, &self.sockets).map(Duration::from);
        let patience = self.connections.iter().filter_map(|connection| connection.until).min();
        let patience = patience.map(|until| until.saturating_duration_since(now));
        [stack, patience].into_iter().flatten().min()
    }

    fn at(&self, now: Instant) -> StackInstant {
        let micros = now.saturating_duration_since(self.start).as_micros();
        StackInstant::from_micros(i64::try_from(micros).unwrap_or(i64::MAX))
    }

    fn serve(&mut self, now: Instant) {
        for connection in &mut self.connections {
            let socket = self.sockets.get_mut::<Socket<'static>>(connection.socket);
            connection.serve(socket, &self.service, now);
        }
    }
}

impl Connection {
    fn serve(&mut self, socket: &mut Socket<'static>, service: &Service, now: Instant) {
        if self.until.is_some_and(|until| until <= now) {
            // The next poll informs the guest; then the socket listens again.
            socket.abort();
            return self.clear();
        }
        match socket.state() {
            State::TimeWait => {
                socket.abort();
                return self.listen(socket);
            }
            State::Closed => return self.listen(socket),
            State::Listen => return self.clear(),
            _ => _ = self.until.get_or_insert(now + PATIENCE),
        }
        let room = MAX_REQUEST_BYTES - self.request.len().min(MAX_REQUEST_BYTES);
        if room > 0 && socket.can_recv() {
            let _ = socket.recv(|bytes| {
                let taken = bytes.len().min(room);
                self.request.extend_from_slice(&bytes[..taken]);
                (taken, ())
            });
        }
        // One answer at a time: a guest that does not read has its next request wait.
        if self.answer.is_empty()
            && !self.is_last
            && !self.request.is_empty()
            && let Served::Answered { bytes, answer, keep_alive } = service.serve(&self.request, now)
        {
            self.request.drain(..bytes.min(self.request.len()));
            self.answer = answer.into();
            self.is_last = !keep_alive;
            self.until = Some(now + PATIENCE);
        }
        if !self.answer.is_empty() && socket.can_send() {
            let (front, _) = self.answer.as_slices();
            let sent = socket.send_slice(front).unwrap_or(0);
            self.answer.drain(..sent);
        }
        if self.answer.is_empty()
            && (self.is_last || self.request.is_empty() && socket.state() == State::CloseWait)
        {
            socket.close();
        }
    }

    fn listen(&mut self, socket: &mut Socket<'static>) {
        self.clear();
        // It fails for a port of 0 only.
        let _ = socket.listen(HTTP_PORT);
    }

    fn clear(&mut self) {
        self.request.clear();
        self.answer.clear();
        (self.is_last, self.until) = (false, None);
    }
}

/// The link to the guest.
#[derive(Default)]
struct Link {
    arrived: Option<Vec<u8>>,
    waiting: VecDeque<Vec<u8>>,
}

struct Arrived(Vec<u8>);

struct Leaving<'a>(&'a mut VecDeque<Vec<u8>>);

impl Device for Link {
    type RxToken<'a> = Arrived;
    type TxToken<'a> = Leaving<'a>;

    fn receive(&mut self, _: StackInstant) -> Option<(Arrived, Leaving<'_>)> {
        let arrived = self.arrived.take()?;
        Some((Arrived(arrived), Leaving(&mut self.waiting)))
    }

    fn transmit(&mut self, _: StackInstant) -> Option<Leaving<'_>> {
        (self.waiting.len() < MAX_WAITING).then_some(Leaving(&mut self.waiting))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ip;
        capabilities.max_transmission_unit = MTU;
        // A guest leaves checksums to its interface, and none is wrong on the way here.
        capabilities.checksum.tcp = Checksum::Tx;
        capabilities
    }
}

impl phy::RxToken for Arrived {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(&self.0)
    }
}

impl phy::TxToken for Leaving<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, bytes: usize, f: F) -> R {
        let mut packet = vec![0; bytes];
        let result = f(&mut packet);
        // An answer to what arrived is sent without asking whether there is room.
        if self.0.len() < MAX_WAITING {
            self.0.push_back(packet);
        }
        result
    }
}
