//! The system calls about network interfaces.

use super::{Errno, Fd, IOCTL, O_CLOEXEC, syscall};

const SOCKET: usize = 41;
const AF_INET: u16 = 2;
const SOCK_DGRAM_CLOEXEC: usize = 2 | O_CLOEXEC;
const SIOCADDRT: usize = 0x890b;
const SIOCGIFNAME: usize = 0x8910;
const SIOCGIFFLAGS: usize = 0x8913;
const SIOCSIFFLAGS: usize = 0x8914;
const SIOCSIFADDR: usize = 0x8916;
const SIOCSIFNETMASK: usize = 0x891c;
const SIOCSIFHWADDR: usize = 0x8924;
const SIOCGIFHWADDR: usize = 0x8927;
const ARPHRD_ETHER: u16 = 1;
const IFF_UP: u8 = 1;
const RTF_UP_GATEWAY: u8 = 1 | 2;
/// Interfaces are numbered from 1 on; those that were added and removed have had numbers, too.
const MAX_INDEX: u32 = 64;

/// The way to the network interfaces: a socket.
#[derive(Clone, Copy)]
pub(crate) struct Interfaces(Fd);

/// Bytes of `struct ifreq`, a name and a union, and of `struct rtentry`.
const REQUEST_BYTES: usize = 40;
const NAME_BYTES: usize = 16;
const ROUTE_BYTES: usize = 120;

impl Interfaces {
    pub(crate) fn open() -> Result<Self, Errno> {
        // SAFETY: no memory is passed.
        unsafe { syscall(SOCKET, [AF_INET.into(), SOCK_DGRAM_CLOEXEC, 0, 0, 0, 0]) }
            .map(|fd| Self(Fd(fd as i32)))
    }

    pub(crate) fn set_address(self, name: &str, address: [u8; 4]) -> Result<(), Errno> {
        self.control(SIOCSIFADDR, &mut request(name, &socket_address(address)))
    }

    pub(crate) fn set_netmask(self, name: &str, mask: [u8; 4]) -> Result<(), Errno> {
        self.control(SIOCSIFNETMASK, &mut request(name, &socket_address(mask)))
    }

    pub(crate) fn bring_up(self, name: &str) -> Result<(), Errno> {
        let mut request = request(name, &[]);
        self.control(SIOCGIFFLAGS, &mut request)?;
        request[NAME_BYTES] |= IFF_UP;
        self.control(SIOCSIFFLAGS, &mut request)
    }

    pub(crate) fn add_default_route(self, gateway: [u8; 4]) -> Result<(), Errno> {
        // A number, then destination, gateway and mask, then flags.
        let mut route = [0; ROUTE_BYTES];
        for (at, address) in [(8, [0; 4]), (24, gateway), (40, [0; 4])] {
            route[at..at + 16].copy_from_slice(&socket_address(address));
        }
        route[56] = RTF_UP_GATEWAY;
        // SAFETY: the kernel reads one `struct rtentry`, whose device is null.
        unsafe { syscall(IOCTL, [self.0.0 as usize, SIOCADDRT, route.as_ptr() as usize, 0, 0, 0]) }
            .map(|_| ())
    }

    /// Gives each interface whose Ethernet address is `was` the address `is`. Returns how many there were.
    pub(crate) fn replace_address(self, was: [u8; 6], is: [u8; 6]) -> Result<u64, Errno> {
        let mut replaced = 0;
        for index in 1..=MAX_INDEX {
            let mut request = request("", &[]);
            request[NAME_BYTES..NAME_BYTES + 4].copy_from_slice(&index.to_ne_bytes());
            // There is none of this number, or it is gone by now.
            if self.control(SIOCGIFNAME, &mut request).is_err()
                || self.control(SIOCGIFHWADDR, &mut request).is_err()
            {
                continue;
            }
            let kind = u16::from_ne_bytes([request[NAME_BYTES], request[NAME_BYTES + 1]]);
            let address = NAME_BYTES + 2..NAME_BYTES + 8;
            if kind == ARPHRD_ETHER && request[address.clone()] == was {
                request[address].copy_from_slice(&is);
                self.control(SIOCSIFHWADDR, &mut request)?;
                replaced += 1;
            }
        }
        Ok(replaced)
    }

    pub(crate) fn close(self) {
        self.0.close();
    }

    fn control(self, call: usize, request: &mut [u8; REQUEST_BYTES]) -> Result<(), Errno> {
        // SAFETY: each of the calls reads and writes one `struct ifreq` without addresses in it.
        unsafe { syscall(IOCTL, [self.0.0 as usize, call, request.as_mut_ptr() as usize, 0, 0, 0]) }
            .map(|_| ())
    }
}

/// A request about the interface `name`, of which 15 bytes count.
fn request(name: &str, value: &[u8]) -> [u8; REQUEST_BYTES] {
    let mut request = [0; REQUEST_BYTES];
    for (to, from) in request.iter_mut().take(NAME_BYTES - 1).zip(name.bytes()) {
        *to = from;
    }
    for (to, from) in request[NAME_BYTES..].iter_mut().zip(value) {
        *to = *from;
    }
    request
}

/// A `struct sockaddr_in`.
fn socket_address(address: [u8; 4]) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..2].copy_from_slice(&AF_INET.to_ne_bytes());
    bytes[4..8].copy_from_slice(&address);
    bytes
}
