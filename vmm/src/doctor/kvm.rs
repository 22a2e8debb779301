//! What doctor says of KVM.

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};

use super::finding::{Feature, Finding};
use machine::probe::{self, Backend, Capabilities, KVM_DEVICE, ProbeError};
use os::one_line;

/// What was found of KVM.
pub(super) struct Kvm {
    pub(super) findings: Vec<Finding>,
    pub(super) capabilities: Option<Capabilities>,
    /// Why no guest can run.
    pub(super) trouble: Option<String>,
    backend: Option<Backend>,
}

pub(super) fn look() -> Kvm {
    let backend = probe::backend();
    let mut findings = vec![processor(&fs::read_to_string("/proc/cpuinfo").unwrap_or_default())];
    findings.push(module(backend));
    let probed = probe::capabilities();
    findings.push(device(probed.as_ref().err()));
    let mut trouble = probed.as_ref().err().map(|error| one_line(error));
    if let Ok(found) = &probed {
        let capability = required(found);
        if capability.change.is_some() {
            trouble = Some(capability.found.clone());
        }
        findings.push(capability);
        findings.push(optional(found));
    }
    Kvm { findings, capabilities: probed.ok().filter(|_| trouble.is_none()), trouble, backend }
}

impl Kvm {
    pub(super) fn linux_guests(&self) -> Feature {
        let why = match (&self.trouble, self.backend) {
            (Some(trouble), _) => Some(trouble.clone()),
            (None, Some(backend)) if !backend.runs_stock_kernels() => Some(format!(
                "{} emulates ring 0 and lacks instructions a kernel needs; tests/lab runs them",
                backend.short_name()
            )),
            _ => None,
        };
        Feature { name: "Linux guests", works: why.is_none(), why }
    }
}

fn processor(cpuinfo: &str) -> Finding {
    let value = |key: &str| {
        let line =
            cpuinfo.lines().find(|line| line.split(':').next().is_some_and(|name| name.trim() == key))?;
        line.split_once(':').map(|(_, value)| value.trim())
    };
    let flags = value("flags").unwrap_or_default();
    let has = |flag: &str| flags.split_whitespace().any(|word| word == flag);
    let extension = match (has("vmx"), has("svm")) {
        (true, _) => "VMX",
        (_, true) => "SVM",
        _ => "neither VMX nor SVM",
    };
    let place = if has("hypervisor") { "inside a virtual machine (nested)" } else { "on the bare machine" };
    let model = value("model name").unwrap_or("unknown processor");
    Finding::ok("processor", format!("{model}, {extension}, {place}"))
}

fn module(backend: Option<Backend>) -> Finding {
    const NAME: &str = "KVM backend";
    match backend {
        Some(backend) if backend.nested_paging() => Finding::ok(NAME, backend.short_name()),
        Some(Backend::Pvm) => Finding::limited(
            NAME,
            "pvm: shadow paging, guest ring 0 is emulated",
            "for Linux guests use a host with VMX or SVM, or tests/lab",
        ),
        Some(backend) => Finding::limited(
            NAME,
            format!("{}: no nested paging, guest page faults are slow", backend.short_name()),
            "reload the KVM module with ept=1 (kvm_intel) or npt=1 (kvm_amd)",
        ),
        None => Finding::missing(
            NAME,
            "no KVM module is loaded",
            "switch virtualization on in the firmware (or nested virtualization in the cloud's settings), then \
             modprobe kvm_intel or kvm_amd",
        ),
    }
}

fn device(error: Option<&ProbeError>) -> Finding {
    let metadata = fs::metadata(KVM_DEVICE);
    let owner = match &metadata {
        Ok(metadata) => {
            let group = group_name(&fs::read_to_string("/etc/group").unwrap_or_default(), metadata.gid());
            format!("{KVM_DEVICE}, mode {:04o}, group {group}", metadata.mode() & 0o7777)
        }
        Err(error) => format!("{KVM_DEVICE}: {error}"),
    };
    let Some(error) = error else {
        return Finding::ok("KVM device", owner);
    };
    let change = match (&metadata, error) {
        (Err(_), _) => "load a KVM module; in a container, pass the device in (--device /dev/kvm)".to_owned(),
        (Ok(metadata), _) if !metadata.file_type().is_char_device() => {
            format!("{KVM_DEVICE} is not a device: remove it")
        }
        (Ok(metadata), ProbeError::Open(cause)) if cause.errno() == libc::EACCES => {
            permission(metadata.mode(), metadata.gid())
        }
        _ => "see the kernel's log (dmesg) for why".to_owned(),
    };
    Finding::missing("KVM device", format!("{owner}: {}", one_line(error)), change)
}

fn permission(mode: u32, gid: u32) -> String {
    if mode & 0o060 == 0o060 && gid != 0 {
        let group = group_name(&fs::read_to_string("/etc/group").unwrap_or_default(), gid);
        format!("join the group: usermod -aG {group} $USER, then log in again; or run as root")
    } else {
        format!("run as root, or have root do: chgrp kvm {KVM_DEVICE} && chmod 660 {KVM_DEVICE}")
    }
}

/// The name of group `gid` in the text of /etc/group; its number if it has none.
fn group_name(groups: &str, gid: u32) -> String {
    let gid = gid.to_string();
    let name = groups.lines().find_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        (fields.nth(1)? == gid).then(|| name.to_owned())
    });
    name.unwrap_or(gid)
}

fn required(found: &Capabilities) -> Finding {
    const NAME: &str = "KVM capabilities";
    let missing: Vec<_> =
        found.required().into_iter().filter(|(_, there)| !there).map(|(name, _)| name).collect();
    if missing.is_empty() {
        let Capabilities { api_version, max_vcpus, memslots, .. } = found;
        return Finding::ok(
            NAME,
            format!("API {api_version}, {max_vcpus} vCPUs, {memslots} memslots, irqchip, irqfd, ioeventfd"),
        );
    }
    Finding::missing(NAME, format!("KVM lacks {}", missing.join(", ")), "use a kernel of 5.10 or later")
}

fn optional(found: &Capabilities) -> Finding {
    const NAME: &str = "KVM extras";
    let ring = found.dirty_ring_bytes > 0;
    let extras = [
        ("manual dirty log", found.manual_dirty_log),
        ("dirty ring", ring),
        ("binary statistics", found.stats_fd),
        ("TSC control", found.tsc_control),
    ];
    let list = |wanted: bool| {
        let names: Vec<_> =
            extras.iter().filter(|(_, there)| *there == wanted).map(|(name, _)| *name).collect();
        names.join(", ")
    };
    match (found.manual_dirty_log && found.stats_fd, list(false).as_str()) {
        (true, "") => Finding::ok(NAME, list(true)),
        (true, absent) => Finding::ok(NAME, format!("{}; not needed and absent: {absent}", list(true))),
        (false, absent) => Finding::limited(
            NAME,
            format!("absent: {absent}"),
            "dirty pages and VM statistics need a kernel of 5.14 or later",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::super::Level;
    use super::*;

    #[test]
    fn the_processor_line_says_nested_or_not() {
        let inside = "processor\t: 0\nmodel name\t: AMD EPYC\nflags\t\t: fpu svm hypervisor npt\n";
        assert_eq!(processor(inside).found, "AMD EPYC, SVM, inside a virtual machine (nested)");
        let bare = "model name\t: Xeon\nflags\t\t: fpu vmx ept\n";
        assert_eq!(processor(bare).found, "Xeon, VMX, on the bare machine");
        assert!(processor("").found.contains("unknown"));
    }

    #[test]
    fn groups_are_found_by_number() {
        let groups = "root:x:0:\nkvm:x:104:alice,bob\n";
        assert_eq!(group_name(groups, 104), "kvm");
        assert_eq!(group_name(groups, 999), "999");
        assert!(permission(0o600, 0).contains("root"));
    }

    #[test]
    fn each_backend_has_its_level() {
        assert_eq!(module(Some(Backend::Vmx { ept: true })).level, Level::Ok);
        assert_eq!(module(Some(Backend::Svm { npt: false })).level, Level::Limited);
        assert_eq!(module(Some(Backend::Pvm)).level, Level::Limited);
        assert_eq!(module(None).level, Level::Missing);
    }

    #[test]
    fn a_missing_capability_is_named() {
        let found = Capabilities { irqchip: true, user_memory: true, irqfd: true, ..Capabilities::default() };
        assert_eq!(required(&found).found, "KVM lacks ioeventfd, immediate exit");
        assert_eq!(optional(&found).level, Level::Limited);
    }
}
