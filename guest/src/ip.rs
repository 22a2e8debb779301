//! The kernel's parameter `ip=` (Documentation/admin-guide/nfs/nfsroot.rst), for kernels that have
//! no driver for a network before there is a process: `ip=ADDRESS::GATEWAY:NETMASK::DEVICE`, of
//! which all but the address may be left out. What the kernel would ask a server for is not
//! supported.

use core::fmt;

/// Bytes of an interface's name, with the zero at its end.
const NAME_BYTES: usize = 16;
/// What is configured unless it is named.
const FIRST: &str = "eth0";
/// What stands for no automatic configuration, besides nothing.
const MANUAL: [&str; 3] = ["", "off", "none"];

/// How an interface is configured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ip<'a> {
    pub address: [u8; 4],
    /// Where everything else goes, if it goes anywhere.
    pub gateway: Option<[u8; 4]>,
    pub netmask: [u8; 4],
    pub device: &'a str,
}

/// Why it is not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IpError<'a> {
    Address(&'a str),
    Device(&'a str),
    /// By DHCP and the like.
    Automatic(&'a str),
}

impl fmt::Display for IpError<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Address(text) => {
                write!(f, "{text:?} is no IPv4 address: expected four numbers, as in 10.0.0.2")
            }
            Self::Device(text) => write!(f, "{text:?} is no name of an interface: expected 1 to 15 bytes"),
            Self::Automatic(text) => write!(f, "{text:?} is not supported: expected an address, or off"),
        }
    }
}

impl<'a> Ip<'a> {
    /// All that `cmdline` says.
    pub fn all(cmdline: &'a str) -> impl Iterator<Item = Result<Self, IpError<'a>>> {
        cmdline.split_ascii_whitespace().filter_map(|word| word.strip_prefix("ip=")).map(Self::parse)
    }

    fn parse(text: &'a str) -> Result<Self, IpError<'a>> {
        let mut parts = text.split(':');
        let mut part = || parts.next().unwrap_or_default();
        let (first, _server, gateway, netmask, _host, device, how) =
            (part(), part(), part(), part(), part(), part(), part());
        if !MANUAL.contains(&how) {
            return Err(IpError::Automatic(how));
        }
        let address = address(first)?;
        let gateway = if gateway.is_empty() { None } else { Some(self::address(gateway)?) };
        let netmask = match netmask {
            // As the kernel guesses, by the classes of old.
            "" => match address[0] {
                ..128 => [255, 0, 0, 0],
                128..192 => [255, 255, 0, 0],
                _ => [255, 255, 255, 0],
            },
            given => self::address(given)?,
        };
        let device = if device.is_empty() { FIRST } else { device };
        match device.len() {
            1..NAME_BYTES => Ok(Self { address, gateway, netmask, device }),
            _ => Err(IpError::Device(device)),
        }
    }
}

fn address(text: &str) -> Result<[u8; 4], IpError<'_>> {
    let wrong = IpError::Address(text);
    let mut address = [0; 4];
    let mut parts = text.split('.');
    for byte in &mut address {
        let part = parts.next().filter(|part| part.bytes().all(|byte| byte.is_ascii_digit())).ok_or(wrong)?;
        *byte = part.parse().map_err(|_| wrong)?;
    }
    match parts.next() {
        None => Ok(address),
        Some(_) => Err(wrong),
    }
}

#[cfg(test)]
mod tests {
    use std::vec::Vec;

    use super::*;

    #[test]
    fn what_a_command_line_says() {
        let all: Vec<_> =
            Ip::all("quiet ip=10.0.0.2::10.0.0.1:255.255.255.0::eth1:off zip=1 ip=192.168.7.2").collect();
        let first = Ip {
            address: [10, 0, 0, 2],
            gateway: Some([10, 0, 0, 1]),
            netmask: [255, 255, 255, 0],
            device: "eth1",
        };
        let second =
            Ip { address: [192, 168, 7, 2], gateway: None, netmask: [255, 255, 255, 0], device: "eth0" };
        assert_eq!(all, [Ok(first), Ok(second)]);
        assert_eq!(Ip::all("quiet").count(), 0);
    }

    #[test]
    fn what_is_wrong_is_said() {
        for (text, error) in [
            ("ip=dhcp", IpError::Address("dhcp")),
            ("ip=", IpError::Address("")),
            ("ip=1.2.3", IpError::Address("1.2.3")),
            ("ip=1.2.3.4.5", IpError::Address("1.2.3.4.5")),
            ("ip=1.2.3.256", IpError::Address("1.2.3.256")),
            ("ip=1.2.3.+4", IpError::Address("1.2.3.+4")),
            ("ip=1.2.3.4::x", IpError::Address("x")),
            ("ip=1.2.3.4:::::a-name-that-is-too-long", IpError::Device("a-name-that-is-too-long")),
            ("ip=:::::eth0:dhcp", IpError::Automatic("dhcp")),
        ] {
            assert_eq!(Ip::all(text).next(), Some(Err(error)), "{text}");
        }
    }
}
