//! The root file system that a kernel's command line asks for: `root=`, `rootfstype=`, `ro` and
//! `rw`, `init=`.

/// Where it is and how it is mounted. The last of each word counts, as in the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Root<'a> {
    /// A device's path.
    pub device: &'a str,
    /// The kind of file system; None to try those there are.
    pub kind: Option<&'a str>,
    pub is_writable: bool,
    /// The first program.
    pub init: Option<&'a str>,
}

/// A `root=` that only a distribution's initramfs understands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NotADevice<'a>(pub &'a str);

impl<'a> Root<'a> {
    /// The one that `cmdline` asks for, if it does.
    pub fn of(cmdline: &'a str) -> Option<Result<Self, NotADevice<'a>>> {
        let (mut device, mut kind, mut is_writable, mut init) = (None, None, false, None);
        // What follows is for init.
        for word in cmdline.split_ascii_whitespace().take_while(|word| *word != "--") {
            match word.split_once('=') {
                Some(("root", value)) => device = Some(value),
                Some(("rootfstype", value)) => kind = Some(value),
                Some(("init", value)) => init = Some(value),
                None if word == "rw" => is_writable = true,
                None if word == "ro" => is_writable = false,
                _ => {}
            }
        }
        let device = device?;
        Some(match device.starts_with("/dev/") {
            true => Ok(Self { device, kind, is_writable, init }),
            false => Err(NotADevice(device)),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_command_line_asks_for() {
        assert_eq!(Root::of("console=ttyS0 rw quiet"), None);
        let plain = Root { device: "/dev/vda", kind: None, is_writable: false, init: None };
        assert_eq!(Root::of("root=/dev/vda"), Some(Ok(plain)));
        assert_eq!(Root::of("root=/dev/vdb ro quiet root=/dev/vda -- rw init=x"), Some(Ok(plain)));
        let all = "rw rootfstype=ext4 init=/bin/sh root=/dev/vda1\n";
        let expected =
            Root { device: "/dev/vda1", kind: Some("ext4"), is_writable: true, init: Some("/bin/sh") };
        assert_eq!(Root::of(all), Some(Ok(expected)));
        assert_eq!(Root::of("root=PARTUUID=1-2"), Some(Err(NotADevice("PARTUUID=1-2"))));
    }
}
