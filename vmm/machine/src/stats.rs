//! KVM's own binary statistics (KVM_GET_STATS_FD): faults, mappings, TLB flushes, exits by kind.
#![expect(unsafe_code, reason = "kvm-ioctls has no call for KVM_GET_STATS_FD")]

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::FileExt;
use std::sync::OnceLock;

use kvm_ioctls::{VcpuFd, VmFd};

/// `_IO(KVMIO, 0xce)`.
const KVM_GET_STATS_FD: libc::c_ulong = 0xaece;
/// Bits of a descriptor's flags that hold its type.
const TYPE_MASK: u32 = 0xf;
/// Types up to this one (cumulative, instant, peak) are plain values; the others are histograms.
const TYPE_PEAK: u32 = 2;
/// Bounds on what a KVM may announce, far above what any does.
const MAX_DESCRIPTORS: u32 = 4096;
const MAX_NAME_BYTES: u32 = 1024;

/// Named values; those of vCPUs are sums over all vCPUs.
pub type Values = BTreeMap<String, u64>;

/// Open statistics of a VM and its vCPUs. Empty where KVM is older than 5.14.
pub struct KvmStats {
    vm: Option<Source>,
    vcpus: Vec<Source>,
}

impl KvmStats {
    /// Opens the statistics of `vm` and `vcpus`.
    pub fn open(vm: &VmFd, vcpus: &[VcpuFd]) -> Self {
        let vcpus = vcpus.iter().filter_map(|v| Source::open(v.as_raw_fd()).ok()).collect();
        Self { vm: Source::open(vm.as_raw_fd()).ok(), vcpus }
    }

    /// Reads all values as they are now.
    pub fn read(&self) -> io::Result<Values> {
        let mut all = Values::new();
        for source in self.vm.iter().chain(&self.vcpus) {
            source.add_to(&mut all)?;
        }
        Ok(all)
    }
}

struct Source {
    file: File,
    /// What is in it; read when it is first asked for, for few VMs are.
    form: OnceLock<Form>,
}

struct Form {
    data_offset: u64,
    /// Name and offset into the data of each plain value.
    values: Vec<(String, u64)>,
}

impl Source {
    fn open(of: i32) -> io::Result<Self> {
        // SAFETY: the call takes no argument and returns a new descriptor or -1.
        let fd = unsafe { libc::ioctl(of, KVM_GET_STATS_FD, 0) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor was just made for us and is owned nowhere else.
        Ok(Self { file: unsafe { File::from_raw_fd(fd) }, form: OnceLock::new() })
    }

    fn form(&self) -> io::Result<&Form> {
        if let Some(known) = self.form.get() {
            return Ok(known);
        }
        let file = &self.file;
        let mut header = [0u8; 24];
        file.read_exact_at(&mut header, 0)?;
        let [_, name_bytes, count, _, descriptors, data] = words(&header);
        if count > MAX_DESCRIPTORS || name_bytes > MAX_NAME_BYTES {
            return Err(io::Error::other("KVM announces more statistics than can be"));
        }
        let each = 16 + name_bytes as usize;
        let mut bytes = vec![0u8; each * count as usize];
        file.read_exact_at(&mut bytes, descriptors.into())?;
        let values = bytes.chunks_exact(each).filter_map(plain_value).collect();
        Ok(self.form.get_or_init(|| Form { data_offset: data.into(), values }))
    }

    fn add_to(&self, all: &mut Values) -> io::Result<()> {
        let form = self.form()?;
        for (name, offset) in &form.values {
            let mut value = [0u8; 8];
            self.file.read_exact_at(&mut value, form.data_offset + offset)?;
            *all.entry(name.clone()).or_default() += u64::from_le_bytes(value);
        }
        Ok(())
    }
}

fn words<const N: usize>(bytes: &[u8]) -> [u32; N] {
    let mut all = [0; N];
    for (word, b) in all.iter_mut().zip(bytes.chunks_exact(4)) {
        *word = u32::from_le_bytes([b[0], b[1], b[2], b[3]]);
    }
    all
}

/// Name and offset of a descriptor's value, unless it is a histogram.
fn plain_value(descriptor: &[u8]) -> Option<(String, u64)> {
    let [flags, _, offset, _] = words(&descriptor[..16]);
    let name = descriptor[16..].split(|b| *b == 0).next()?;
    (flags & TYPE_MASK <= TYPE_PEAK).then(|| (String::from_utf8_lossy(name).into_owned(), offset.into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_name_plain_values_and_histograms_are_left_out() {
        let mut d = vec![0u8; 32];
        d[8] = 24;
        d[16..21].copy_from_slice(b"exits");
        assert_eq!(plain_value(&d), Some(("exits".into(), 24)));
        d[0] = 4;
        assert_eq!(plain_value(&d), None);
    }

    #[test]
    fn a_vm_on_this_kvm_has_statistics() {
        let Ok(kvm) = kvm_ioctls::Kvm::new() else {
            testing::skipped(module_path!(), "no usable /dev/kvm");
            return;
        };
        let vm = kvm.create_vm().unwrap();
        let stats = KvmStats::open(&vm, &[]).read().unwrap();
        if stats.is_empty() {
            testing::skipped(module_path!(), "this KVM has no binary statistics");
            return;
        }
        assert!(stats.contains_key("remote_tlb_flush"), "{stats:?}");
    }
}
