//! What a fleet needs, looked at before any VM starts: by `fleet up`, its dry run, and whatever else starts a fleet. All that can be known to fail
//! later is said now, everything at once, with the guest and the key of the fleet file.

use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use super::HostError;
use super::problem::Listed;
pub use super::problem::Problem;
use super::runtime::{FleetDir, SOCKET_PATH_BYTES};
use super::spec::{EngineName, FleetSpec, GuestSpec, MetricsAddress};
use image::vmlinux::{self, Unpack};
use machine::{check_cmdline, probe};
use memory::userfault;
use merge::EngineError;
use merge::ksm::{self, Availability};
use os::one_line;
use os::{limits, named_file};

/// Descriptors that the daemon has for itself, and at the least for each guest: COM2, its process, its agent.
const DESCRIPTORS: (u64, u64) = (32, 3);
/// And for each process that stands by for a clone: it, and the socket to it.
const OF_STANDBY: u64 = 2;

/// Looks at everything that `spec` needs in order to come up in `dir`.
pub fn problems(spec: &FleetSpec, dir: &FleetDir) -> Vec<Problem> {
    let mut found = Problems(Vec::new());
    found.fleet(spec, dir);
    let mut kernels = BTreeMap::new();
    for guest in &spec.guests {
        found.guest(guest, dir, &mut kernels);
    }
    found.same_images(&spec.guests);
    found.0
}

/// As [`problems`]; any is an error.
///
/// # Errors
/// There are some.
pub fn check(spec: &FleetSpec, dir: &FleetDir) -> Result<(), HostError> {
    match problems(spec, dir) {
        none if none.is_empty() => Ok(()),
        problems => Err(HostError::Preflight { problems: Listed(problems) }),
    }
}

/// What is known of a kernel that several guests have: whether it is one.
type Kernels<'a> = BTreeMap<(&'a Path, &'static str), Option<String>>;

struct Problems(Vec<Problem>);

impl Problems {
    fn add(&mut self, guest: Option<&GuestSpec>, key: Option<&'static str>, problem: impl Into<String>) {
        let guest = guest.map(|guest| guest.name.clone());
        self.0.push(Problem { guest, key, problem: problem.into() });
    }

    fn fleet(&mut self, spec: &FleetSpec, dir: &FleetDir) {
        if let Err(error) = probe::capabilities() {
            self.add(None, None, one_line(&error));
        }
        for socket in [dir.host_socket(), dir.merge_socket()] {
            if let Err(error) = socket {
                self.add(None, Some("name"), one_line(&error));
                break;
            }
        }
        match spec.engine {
            EngineName::Slab => {
                if let Err(source) = userfault::can_freeze() {
                    self.add(None, Some("engine"), one_line(&EngineError::NoUserfaultfd(source)));
                }
            }
            EngineName::Ksm => match ksm::available() {
                Availability::Full | Availability::AsItIs => {}
                Availability::Stopped => self.add(
                    None,
                    Some("engine"),
                    "KSM is stopped and this user may not start it: run as root, or have root write 1 to /sys/kernel/mm/ksm/run",
                ),
                Availability::Missing => {
                    self.add(None, Some("engine"), "this kernel has no KSM (CONFIG_KSM): use \"slab\" or \"off\"");
                }
            },
            EngineName::Off => {}
        }
        if let Some(MetricsAddress::Unix(path)) = &spec.metrics
            && path.as_os_str().len() > SOCKET_PATH_BYTES
        {
            self.add(None, Some("metrics"), one_line(&HostError::PathLength { path: path.clone() }));
        }
        let (own, each) = DESCRIPTORS;
        let standbys = OF_STANDBY * spec.pool as u64;
        let (needed, limit) = (own + each * spec.guests.len() as u64 + standbys, limits::descriptors());
        if needed > limit {
            self.add(
                None,
                None,
                format!(
                    "{} guests take {needed} descriptors or more, and this process may have {limit}: raise the limit (`ulimit -Hn`, or \
                     LimitNOFILE= of its service)",
                    spec.guests.len()
                ),
            );
        }
    }

    fn guest<'a>(&mut self, guest: &'a GuestSpec, dir: &FleetDir, kernels: &mut Kernels<'a>) {
        if let Err(error) = dir.com2(&guest.name).and_then(|_| dir.control(&guest.name)) {
            self.add(Some(guest), Some("name"), one_line(&error));
        }
        if let Some(path) = &guest.vm.kernel {
            // Unpacked once, however many guests have it.
            let wrong = kernels
                .entry((path, guest.vm.unpack.name()))
                .or_insert_with(|| unusable(path, guest.vm.unpack));
            if let Some(wrong) = wrong.clone() {
                self.add(Some(guest), Some("kernel"), wrong);
            }
        }
        if let Some(path) = &guest.vm.initrd {
            match named_file::regular(path) {
                Err(error) => {
                    self.add(
                        Some(guest),
                        Some("initrd"),
                        format!("{} cannot be read: {error}", path.display()),
                    );
                }
                Ok((_, meta)) if meta.len() == 0 => {
                    self.add(Some(guest), Some("initrd"), format!("{} is empty", path.display()));
                }
                Ok((_, meta)) if meta.len() >= guest.vm.memory_bytes => self.add(
                    Some(guest),
                    Some("initrd"),
                    format!(
                        "{} has {} MiB, and the guest's memory {} MiB: give it more",
                        path.display(),
                        meta.len().div_ceil(1 << 20),
                        guest.vm.memory_bytes >> 20
                    ),
                ),
                Ok(_) => {}
            }
        }
        if let Some(Err(error)) = guest.vm.cmdline.as_deref().map(check_cmdline) {
            self.add(Some(guest), Some("cmdline"), one_line(&error));
        }
        for drive in &guest.vm.drives {
            if let Err(error) = drive.check() {
                self.add(Some(guest), Some("drives"), one_line(&error));
            }
        }
        for pmem in &guest.vm.pmem {
            if let Err(error) = pmem.check() {
                self.add(Some(guest), Some("pmem"), one_line(&error));
            }
        }
        for interface in &guest.vm.net {
            if let Err(error) = interface.look() {
                self.add(Some(guest), Some("net"), one_line(&error));
            }
        }
    }

    /// A file has many names: links, and paths that differ in their letters only. The fleet file's check sees the same path twice.
    fn same_images(&mut self, guests: &[GuestSpec]) {
        let mut users: BTreeMap<(u64, u64), (&GuestSpec, &Path, bool)> = BTreeMap::new();
        for guest in guests {
            for (path, read_only) in guest.vm.images() {
                let Ok(meta) = std::fs::metadata(path) else { continue };
                let Some((first, its, also_read_only)) =
                    users.insert((meta.dev(), meta.ino()), (guest, path, read_only))
                else {
                    continue;
                };
                if !(read_only && also_read_only) {
                    let problem = format!(
                        "{} is the same file as {} of guest {}, and not both only read it: give each a copy, or both read_only = true, or overlay = true",
                        path.display(),
                        its.display(),
                        first.name
                    );
                    self.add(Some(guest), Some("drives"), problem);
                }
            }
        }
    }
}

fn unusable(path: &Path, unpack: Unpack) -> Option<String> {
    vmlinux::open(path, unpack).err().map(|error| one_line(&error))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn everything_that_is_wrong_is_said_at_once() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        fs::write(at("disk.img"), [0; 1024]).unwrap();
        fs::hard_link(at("disk.img"), at("same.img")).unwrap();
        fs::write(at("odd.img"), [0; 1000]).unwrap();
        fs::write(at("kernel"), "#!/bin/sh\n").unwrap();
        fs::write(at("empty"), "").unwrap();
        rustix::fs::mknodat(rustix::fs::CWD, at("fifo"), rustix::fs::FileType::Fifo, 0o600.into(), 0)
            .unwrap();
        let cmdline = "x".repeat(3000);
        let text = format!(
            r#"
            name = "f"
            engine = "off"
            [[guest]]
            name = "right"
            drives = [{{ path = "disk.img" }}]
            [[guest]]
            name = "twin"
            drives = [{{ path = "same.img", read_only = true }}, {{ path = "odd.img" }}, {{ path = "none.img" }}]
            [[guest]]
            name = "linux"
            kernel = "kernel"
            initrd = "fifo"
            cmdline = "{cmdline}"
            [[guest]]
            name = "bare"
            net = [{{ tap = "samepage-none" }}]
            kernel = "fifo"
            initrd = "empty"
            "#
        );
        let spec = FleetSpec::parse(&text, dir.path()).unwrap();
        let found = problems(&spec, &FleetDir::of("f"));
        let said = |guest: &str, key: &str, text: &str| {
            let one = |p: &Problem| {
                p.guest.as_deref() == Some(guest) && p.key == Some(key) && p.problem.contains(text)
            };
            assert!(found.iter().any(one), "{guest} {key} {text}: {found:#?}");
        };
        assert!(!found.iter().any(|p| p.guest.as_deref() == Some("right")), "{found:#?}");
        said("twin", "drives", "is the same file as");
        said("twin", "drives", "has 1000 bytes");
        said("twin", "drives", "none.img cannot be opened");
        said("linux", "kernel", "it looks like a script");
        said("linux", "initrd", "it is a FIFO");
        said("linux", "cmdline", "3000 bytes");
        said("bare", "kernel", "is not a regular file");
        said("bare", "initrd", "is empty");
        said("bare", "net", "there is no interface samepage-none");
        let error = check(&spec, &FleetDir::of("f")).unwrap_err().to_string();
        assert!(error.lines().count() > 8, "{error}");
    }

    #[test]
    fn sockets_that_could_not_be_made_are_told_of() {
        let name = "n".repeat(32);
        let text =
            format!("name = \"f\"\nengine = \"off\"\n[[guest]]\nname = \"{name}\"\n[[guest]]\nname = \"a\"");
        let spec = FleetSpec::parse(&text, Path::new("/")).unwrap();
        let dir = FleetDir::at(format!("/{}", "d".repeat(80)).into());
        let found = problems(&spec, &dir);
        let names: Vec<_> = found.iter().filter(|p| p.key == Some("name")).map(|p| p.guest.clone()).collect();
        assert_eq!(names, [Some(name)], "{found:#?}");
    }
}
