//! A TAP of which the frames for the service are taken out, and into which its answers are put.

use std::io;
use std::net::Ipv4Addr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use devices::virtio::net::{Offload, Tap};
use rustix::event::{EventfdFlags, epoll, eventfd};
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime,
};

use crate::service::Service;
use crate::stack::Stack;
use crate::{Config, Store};

/// Bytes of virtio-net's header before each frame.
const HEADER_BYTES: usize = 12;
/// Of Ethernet's.
const ETHERNET_BYTES: usize = 14;
/// Of an ARP packet for IPv4 over Ethernet, and the least of IPv4's header.
const ARP_BYTES: usize = 28;
const IPV4_BYTES: usize = 20;
const TYPE_IPV4: [u8; 2] = [0x08, 0x00];
const TYPE_ARP: [u8; 2] = [0x08, 0x06];
/// An ARP packet for IPv4 over Ethernet that asks, and one that answers, up to the operation.
const ARP_REQUEST: [u8; 8] = [0, 1, 8, 0, 6, 4, 0, 1];
const ARP_REPLY: [u8; 8] = [0, 1, 8, 0, 6, 4, 0, 2];
/// A timer that is set more often costs more than it is worth.
const LEAST_WAIT: Duration = Duration::from_millis(1);
/// The service's address on the segment; Firecracker's.
const MAC: [u8; 6] = [0x06, 0x01, 0x23, 0x45, 0x67, 0x01];

/// The TAP.
pub struct Detour {
    tap: Box<dyn Tap>,
    address: Ipv4Addr,
    stack: Stack,
    /// An answer to ARP that waits for the guest's buffers.
    arp: Option<Vec<u8>>,
    /// Where the guest is, by what it sent last.
    guest: [u8; 6],
    /// Readable when the TAP is, when there is an answer, and when the stack's time has come.
    readable: OwnedFd,
    answers: OwnedFd,
    /// Whether that has been written and not read.
    has_rung: bool,
    timer: OwnedFd,
    /// When it is the stack's time.
    due: Option<Instant>,
}

impl Detour {
    /// On the way to `tap`.
    pub fn new(tap: Box<dyn Tap>, config: Config, store: Store) -> io::Result<Self> {
        let service = Service::new(config, store).map_err(io::Error::other)?;
        let readable = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let answers = eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?;
        let flags = TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC;
        let timer = timerfd_create(TimerfdClockId::Monotonic, flags)?;
        for (n, fd) in [tap.readable(), answers.as_fd(), timer.as_fd()].into_iter().enumerate() {
            epoll::add(&readable, fd, epoll::EventData::new_u64(n as u64), epoll::EventFlags::IN)?;
        }
        let address = config.address;
        let stack = Stack::new(address, service, Instant::now());
        let (guest, has_rung, due) = ([0; 6], false, None);
        Ok(Self { tap, address, stack, arp: None, guest, readable, answers, has_rung, timer, due })
    }

    /// Whether it takes `frame`, which is for the service.
    fn take(&mut self, frame: &[u8]) -> bool {
        let Some(ethernet) = frame.get(HEADER_BYTES..) else { return false };
        let Some((head, packet)) = ethernet.split_first_chunk::<ETHERNET_BYTES>() else { return false };
        let [_, _, _, _, _, _, from @ .., a, b] = *head;
        let address = self.address.octets();
        match [a, b] {
            TYPE_ARP => {
                let is_for_us = packet.len() >= ARP_BYTES
                    && packet[..8] == ARP_REQUEST
                    && packet[24..28] == address
                    // Its own question whether an address is free is one for others, too.
                    && packet[14..18] != address;
                if is_for_us {
                    self.guest = from;
                    let reply = [&ARP_REPLY, &MAC[..], &address, &packet[8..18]].concat();
                    self.arp = Some(self.framed(TYPE_ARP, &reply));
                }
                is_for_us
            }
            TYPE_IPV4 => {
                let is_for_us = packet.len() >= IPV4_BYTES && packet[16..20] == address;
                if is_for_us {
                    self.guest = from;
                    self.stack.take(packet, Instant::now());
                }
                is_for_us
            }
            _ => false,
        }
    }

    /// A packet for the guest as a frame.
    fn framed(&self, kind: [u8; 2], packet: &[u8]) -> Vec<u8> {
        [&[0; HEADER_BYTES][..], &self.guest, &MAC, &kind, packet].concat()
    }

    /// The next answer, as a frame.
    fn next(&mut self) -> Option<Vec<u8>> {
        if let Some(arp) = self.arp.take() {
            return Some(arp);
        }
        if !self.stack.has_next() && self.due.is_some_and(|due| due <= Instant::now()) {
            self.stack.turn(Instant::now());
            self.schedule();
        }
        let packet = self.stack.next()?;
        Some(self.framed(TYPE_IPV4, &packet))
    }

    /// Sets the timer by the stack (which clears it, if its time had come), and has it looked at
    /// again if there is an answer.
    fn schedule(&mut self) {
        if self.arp.is_some() || self.stack.has_next() {
            // It fails only if it has been rung more often than it can count: then it is readable.
            let _ = rustix::io::write(&self.answers, &1u64.to_ne_bytes());
            self.has_rung = true;
        }
        let now = Instant::now();
        // Zero would be never.
        let wait = self.stack.wait(now).map(|wait| wait.max(LEAST_WAIT));
        let due = wait.and_then(|wait| now.checked_add(wait));
        if due.is_none() && self.due.is_none() {
            return;
        }
        self.due = due;
        let wait = wait.unwrap_or_default();
        let it_value = Timespec { tv_sec: wait.as_secs() as i64, tv_nsec: wait.subsec_nanos().into() };
        let once = Itimerspec { it_interval: Timespec { tv_sec: 0, tv_nsec: 0 }, it_value };
        let _ = timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &once);
    }
}

impl Tap for Detour {
    fn send(&mut self, frame: &[u8]) -> io::Result<()> {
        if !self.take(frame) {
            return self.tap.send(frame);
        }
        self.schedule();
        Ok(())
    }

    fn receive(&mut self, frame: &mut [u8]) -> io::Result<usize> {
        let Some(answer) = self.next() else {
            if std::mem::take(&mut self.has_rung) {
                let _ = rustix::io::read(&self.answers, &mut [0u8; 8]);
            }
            return self.tap.receive(frame);
        };
        let room = frame.get_mut(..answer.len());
        room.ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?.copy_from_slice(&answer);
        Ok(answer.len())
    }

    fn set_offload(&mut self, offload: Offload) -> io::Result<()> {
        self.tap.set_offload(offload)
    }

    fn readable(&self) -> BorrowedFd<'_> {
        self.readable.as_fd()
    }
}

#[cfg(test)]
mod tests;
