//! TAP interfaces: Ethernet segments of the host's network whose other end is a descriptor
//! (Documentation/networking/tuntap.rst).
//!
//! One that is made here is gone with its descriptor, however this process ends. Everything is done
//! by that descriptor: an interface that takes the name meanwhile is not touched.
#![expect(unsafe_code, reason = "ioctl(2) of /dev/net/tun and of sockets")]

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;

use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, netdevice, socket_with};
use thiserror::Error;

/// Bytes of an interface's name, with the zero at its end.
const NAME_BYTES: usize = libc::IFNAMSIZ;
/// What interfaces that are made are called; the kernel counts.
const PATTERN: &str = "samepage%d";
/// Bytes of the header before each frame: `virtio_net_hdr_v1`.
const HEADER_BYTES: libc::c_int = 12;
/// linux/sockios.h: puts an interface on a bridge.
const SIOCBRADDIF: libc::Ioctl = 0x89a2;

/// Why there is no TAP.
#[derive(Debug, Error)]
pub enum TapError {
    /// No interface can be called so.
    #[error(
        "{0:?} cannot be the name of an interface: expected 1 to 15 bytes without blanks, slashes, colons and %"
    )]
    Name(String),
    /// The kernel has none.
    #[error("/dev/net/tun is not there, so this kernel has no TAPs: load its module (`modprobe tun`)")]
    NoTun,
    /// Its device is closed to this user.
    #[error(
        "/dev/net/tun may not be opened by this user: allow it (`chmod 666 /dev/net/tun`), or run as root"
    )]
    TunPermission,
    /// There is no such interface.
    #[error(
        "there is no interface {0}: make it (`ip tuntap add dev {0} mode tap user $USER`, then `ip link set {0} up`), or have \
         one made for the VM (auto)"
    )]
    Missing(String),
    /// Another process has it.
    #[error("the TAP {0} is in use: each guest needs one of its own; `ip -d link show {0}` shows it")]
    InUse(String),
    /// It is another kind of interface.
    #[error(
        "the interface {0} is no TAP with one queue, without which no guest can be on it: expected one made by \
         `ip tuntap add dev {0} mode tap`"
    )]
    Kind(String),
    /// It belongs to another user.
    #[error(
        "this user may not use the TAP {0}: have root make it for this user (`ip tuntap add dev {0} mode tap user $USER`)"
    )]
    NotOwner(String),
    /// Interfaces may not be made.
    #[error(
        "this user may not make a TAP (CAP_NET_ADMIN): have root make one for this user (`ip tuntap add dev tap0 mode tap user \
         $USER`, then `ip link set tap0 up`) and name it"
    )]
    MayNotMake,
    /// There is no such bridge.
    #[error(
        "{tap} cannot be put on the bridge {bridge}: expected the name of one (`ip link add {bridge} type bridge`)"
    )]
    Bridge {
        tap: String,
        bridge: String,
        #[source]
        source: io::Error,
    },
    /// Something else failed.
    #[error("cannot {what} the TAP {tap}")]
    Failed {
        what: &'static str,
        tap: String,
        #[source]
        source: io::Error,
    },
}

/// A TAP that this process has. Frames have a virtio header; nothing waits.
#[derive(Debug)]
pub struct Tap {
    file: File,
    name: String,
}

impl Tap {
    /// Takes the TAP `name`, which is there already and stays.
    pub fn open(name: &str) -> Result<Self, TapError> {
        look(name)?;
        let tap = Self::attach(name).map_err(|error| match error {
            Attach::Tap(error) => error,
            Attach::Call(error) => match error.raw_os_error() {
                Some(libc::EBUSY) => TapError::InUse(name.into()),
                Some(libc::EINVAL) => TapError::Kind(name.into()),
                Some(libc::EPERM) => TapError::NotOwner(name.into()),
                _ => failed("take", name)(error),
            },
        })?;
        // It was removed in between, and this one is new and goes.
        match tap.flags()? & libc::IFF_PERSIST as libc::c_short {
            0 => Err(TapError::Missing(name.into())),
            _ => Ok(tap),
        }
    }

    /// Makes one that goes with this value, and brings it up: for packets of `mtu` bytes, on
    /// `bridge`.
    pub fn make(mtu: Option<u16>, bridge: Option<&str>) -> Result<Self, TapError> {
        let tap = Self::attach(PATTERN).map_err(|error| match error {
            Attach::Tap(error) => error,
            Attach::Call(error) if error.raw_os_error() == Some(libc::EPERM) => TapError::MayNotMake,
            Attach::Call(error) => failed("make", PATTERN)(error),
        })?;
        tap.bring_up(mtu, bridge)?;
        Ok(tap)
    }

    /// What the host calls it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Whether it is up, without which it takes and gives no frames.
    pub fn is_up(&self) -> bool {
        let mut request = request(&self.name);
        let up = any_socket().and_then(|socket| control(&socket, libc::SIOCGIFFLAGS, &mut request));
        // SAFETY: the kernel has written the flags; the union has no other kind of bytes there than
        // integers.
        up.is_ok() && unsafe { request.ifr_ifru.ifru_flags } & libc::IFF_UP as libc::c_short != 0
    }

    /// Says what frames for this end may be left with: `TUN_F_CSUM` and so on.
    pub fn set_offload(&self, flags: libc::c_uint) -> io::Result<()> {
        // SAFETY: the argument is a number; the kernel takes no address from it.
        done(unsafe { libc::ioctl(self.file.as_raw_fd(), libc::TUNSETOFFLOAD, libc::c_ulong::from(flags)) })
    }

    /// Gives a frame to the host.
    pub fn send(&self, frame: &[u8]) -> io::Result<()> {
        (&self.file).write(frame).map(drop)
    }

    /// Takes a frame from the host.
    pub fn receive(&self, frame: &mut [u8]) -> io::Result<usize> {
        (&self.file).read(frame)
    }

    fn attach(name: &str) -> Result<Self, Attach> {
        let opened =
            OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK).open("/dev/net/tun");
        let file = opened.map_err(|error| match error.raw_os_error() {
            Some(libc::ENOENT | libc::ENODEV | libc::ENXIO) => TapError::NoTun,
            Some(libc::EACCES | libc::EPERM) => TapError::TunPermission,
            _ => failed("open /dev/net/tun for", name)(error),
        });
        let file = file.map_err(Attach::Tap)?;
        let mut request = request(name);
        request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as libc::c_short;
        control(&file, libc::TUNSETIFF, &mut request).map_err(Attach::Call)?;
        let bytes = request.ifr_name.iter().map(|c| *c as u8).take_while(|byte| *byte != 0);
        let name = String::from_utf8_lossy(&bytes.collect::<Vec<_>>()).into_owned();
        let bytes = HEADER_BYTES;
        // SAFETY: the kernel reads one integer, which lives until it returns.
        let sized = done(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETVNETHDRSZ, &raw const bytes) });
        sized.map_err(Attach::Call)?;
        Ok(Self { file, name })
    }

    fn flags(&self) -> Result<libc::c_short, TapError> {
        let mut request = request(&self.name);
        control(&self.file, libc::TUNGETIFF, &mut request).map_err(failed("look at", &self.name))?;
        // SAFETY: the kernel has written the flags; the union has no other kind of bytes there than
        // integers.
        Ok(unsafe { request.ifr_ifru.ifru_flags })
    }

    fn bring_up(&self, mtu: Option<u16>, bridge: Option<&str>) -> Result<(), TapError> {
        let what = "bring up";
        let socket = any_socket().map_err(failed(what, &self.name))?;
        if let Some(mtu) = mtu {
            let mut request = request(&self.name);
            request.ifr_ifru.ifru_mtu = mtu.into();
            control(&socket, libc::SIOCSIFMTU, &mut request).map_err(failed("set the MTU of", &self.name))?;
        }
        if let Some(bridge) = bridge {
            check_name(bridge)?;
            let joined = netdevice::name_to_index(&socket, &self.name).map_err(io::Error::from);
            let joined = joined.and_then(|index| {
                let mut request = request(bridge);
                request.ifr_ifru.ifru_ifindex = index as libc::c_int;
                control(&socket, SIOCBRADDIF, &mut request)
            });
            joined.map_err(|source| TapError::Bridge {
                tap: self.name.clone(),
                bridge: bridge.into(),
                source,
            })?;
        }
        let mut request = request(&self.name);
        control(&socket, libc::SIOCGIFFLAGS, &mut request).map_err(failed(what, &self.name))?;
        // SAFETY: the kernel has written the flags; the union has no other kind of bytes there than
        // integers.
        let flags = unsafe { request.ifr_ifru.ifru_flags };
        request.ifr_ifru.ifru_flags = flags | libc::IFF_UP as libc::c_short;
        control(&socket, libc::SIOCSIFFLAGS, &mut request).map_err(failed(what, &self.name))
    }
}

impl AsFd for Tap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// Why a descriptor is not that of an interface.
enum Attach {
    Tap(TapError),
    /// The kernel's answer to TUNSETIFF, which means different things.
    Call(io::Error),
}

fn failed(what: &'static str, tap: &str) -> impl FnOnce(io::Error) -> TapError {
    let tap = tap.to_owned();
    move |source| TapError::Failed { what, tap, source }
}

/// Whether there is an interface of this name.
pub fn look(name: &str) -> Result<(), TapError> {
    check_name(name)?;
    let socket = any_socket().map_err(failed("find", name))?;
    match netdevice::name_to_index(&socket, name) {
        Ok(_) => Ok(()),
        Err(Errno::NODEV) => Err(TapError::Missing(name.into())),
        Err(error) => Err(failed("find", name)(error.into())),
    }
}

/// Whether an interface that is there could be called so.
pub fn check_name(name: &str) -> Result<(), TapError> {
    let allowed = |byte: u8| byte.is_ascii_graphic() && !b"/:%".contains(&byte);
    match (1..NAME_BYTES).contains(&name.len()) && name.bytes().all(allowed) && !matches!(name, "." | "..") {
        true => Ok(()),
        false => Err(TapError::Name(name.into())),
    }
}

/// A socket of no use but for asking about interfaces.
fn any_socket() -> io::Result<rustix::fd::OwnedFd> {
    Ok(socket_with(AddressFamily::INET, SocketType::DGRAM, SocketFlags::CLOEXEC, None)?)
}

/// A request about the interface `name`, of at most 15 bytes.
fn request(name: &str) -> libc::ifreq {
    // SAFETY: it is integers and addresses, all of which may be zeros; the kernel reads all of it.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().take(NAME_BYTES - 1).zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    request
}

fn control(to: impl AsFd, call: libc::Ioctl, request: &mut libc::ifreq) -> io::Result<()> {
    // SAFETY: each of the calls reads and writes one `ifreq`, which this is, and which lives until
    // it returns.
    done(unsafe { libc::ioctl(to.as_fd().as_raw_fd(), call, &raw mut *request) })
}

fn done(returned: libc::c_int) -> io::Result<()> {
    match returned {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_no_interface_can_be_called_is_refused_before_anything_is_done() {
        for name in ["", "a b", "a/b", "a:1", "tap%d", ".", "..", "a-name-of-16-byt", "t\u{e4}p"] {
            assert!(matches!(Tap::open(name), Err(TapError::Name(_))), "{name:?}");
        }
        assert!(check_name("tap0").is_ok() && check_name("a-name-of-15-by").is_ok());
    }

    #[test]
    fn a_name_that_is_cut_is_whole_at_its_end() {
        let request = request("a-name-that-is-far-too-long");
        assert_eq!(request.ifr_name[NAME_BYTES - 1], 0);
    }
}
