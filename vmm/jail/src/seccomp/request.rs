//! Numbers of ioctl(2)'s requests, from the kernel's headers: `linux/kvm.h`, `linux/userfaultfd.h`,
//! `linux/fs.h`, `linux/if_tun.h`, `asm-generic/ioctls.h`. That each is right is seen by a VM's
//! life under its filters: with a wrong one the life would end.

/// `_IO`, `_IOW`, `_IOR` and `_IOWR` of `asm-generic/ioctl.h`: number `nr` of the device `kind`,
/// which copies `bytes` bytes.
const fn none(kind: u8, nr: u8) -> u64 {
    ((kind as u64) << 8) | nr as u64
}

const fn write(kind: u8, nr: u8, bytes: u64) -> u64 {
    (1 << 30) | (bytes << 16) | none(kind, nr)
}

const fn read(kind: u8, nr: u8, bytes: u64) -> u64 {
    (2 << 30) | (bytes << 16) | none(kind, nr)
}

const fn both(kind: u8, nr: u8, bytes: u64) -> u64 {
    (3 << 30) | (bytes << 16) | none(kind, nr)
}

const KVM: u8 = 0xae;
const UFFD: u8 = 0xaa;

/// Running a vCPU, and reading what it has: for a capture, and for the report of a fault.
pub(super) const VCPU: &[u64] = &[
    // KVM_RUN: first, for it is by far the most frequent.
    none(KVM, 0x80),
    // KVM_GET_REGS, KVM_GET_SREGS, KVM_GET_MP_STATE
    read(KVM, 0x81, 144),
    read(KVM, 0x83, 312),
    read(KVM, 0x98, 4),
    // KVM_GET_XSAVE, KVM_GET_XSAVE2, KVM_GET_XCRS, KVM_GET_DEBUGREGS
    read(KVM, 0xa4, 4096),
    read(KVM, 0xcf, 4096),
    read(KVM, 0xa6, 392),
    read(KVM, 0xa1, 128),
    // KVM_GET_LAPIC, KVM_GET_VCPU_EVENTS, KVM_GET_MSRS, KVM_GET_CPUID2
    read(KVM, 0x8e, 1024),
    read(KVM, 0x9f, 64),
    both(KVM, 0x88, 8),
    both(KVM, 0x91, 8),
    // KVM_GET_TSC_KHZ, KVM_GET_DEVICE_ATTR (the TSC's offset)
    none(KVM, 0xa3),
    write(KVM, 0xe2, 24),
    // KVM_CHECK_EXTENSION (the size of the XSAVE area), KVM_GET_CLOCK (read with the TSC)
    none(KVM, 0x03),
    read(KVM, 0x7c, 48),
];

/// Reading what the VM has besides its vCPUs, for a capture.
pub(super) const CHIPS: &[u64] = &[
    // KVM_GET_IRQCHIP, KVM_GET_PIT2, KVM_GET_CLOCK
    both(KVM, 0x62, 520),
    read(KVM, 0x9f, 112),
    read(KVM, 0x7c, 48),
    // KVM_CHECK_EXTENSION
    none(KVM, 0x03),
];

/// Learning which registers can be saved here, from a vCPU that is made for it and never runs.
pub(super) const FRESH_VCPU: &[u64] = &[
    // KVM_GET_API_VERSION, KVM_CREATE_VM, KVM_CHECK_EXTENSION, KVM_GET_VCPU_MMAP_SIZE
    none(KVM, 0x00),
    none(KVM, 0x01),
    none(KVM, 0x03),
    none(KVM, 0x04),
    // KVM_GET_MSR_INDEX_LIST, KVM_GET_SUPPORTED_CPUID
    both(KVM, 0x02, 4),
    both(KVM, 0x05, 8),
    // KVM_CREATE_VCPU, KVM_CREATE_IRQCHIP, KVM_CREATE_PIT2
    none(KVM, 0x41),
    none(KVM, 0x60),
    write(KVM, 0x77, 64),
    // KVM_SET_TSS_ADDR, KVM_SET_IDENTITY_MAP_ADDR
    none(KVM, 0x47),
    write(KVM, 0x48, 8),
    // KVM_SET_CPUID2, KVM_GET_MSRS, KVM_SET_MSRS, KVM_SET_FPU, KVM_GET_LAPIC, KVM_SET_LAPIC
    write(KVM, 0x90, 8),
    both(KVM, 0x88, 8),
    write(KVM, 0x89, 8),
    write(KVM, 0x8d, 416),
    read(KVM, 0x8e, 1024),
    write(KVM, 0x8f, 1024),
];

/// An interrupt that is a level: that of the power button.
pub(super) const INTERRUPT: &[u64] = &[
    // KVM_IRQ_LINE
    write(KVM, 0x61, 8),
];

/// The log of the pages that vCPUs write.
pub(super) const WRITE_LOG: &[u64] = &[
    // KVM_GET_DIRTY_LOG, KVM_CLEAR_DIRTY_LOG, KVM_SET_USER_MEMORY_REGION
    write(KVM, 0x42, 16),
    both(KVM, 0xc0, 24),
    write(KVM, 0x46, 32),
];

/// Freezing, parking and waking pages.
pub(super) const PAGES: &[u64] = &[
    // UFFDIO_REGISTER, UFFDIO_UNREGISTER, UFFDIO_WAKE, UFFDIO_COPY, UFFDIO_WRITEPROTECT
    both(UFFD, 0x00, 32),
    read(UFFD, 0x01, 16),
    read(UFFD, 0x02, 16),
    both(UFFD, 0x03, 40),
    both(UFFD, 0x06, 24),
    // PAGEMAP_SCAN
    both(b'f', 16, 96),
];

/// FICLONE: a memory file's base, where the file system shares blocks.
pub(super) const CLONE_FILE: &[u64] = &[write(0x94, 9, 4)];

/// TUNSETOFFLOAD: what the driver of a network device has accepted.
pub(super) const TAP: &[u64] = &[write(b'T', 208, 4)];

/// FIONBIO: a socket that does not wait.
pub(super) const SOCKET: &[u64] = &[0x5421];

/// TCGETS, TCSETS, TCSETSW, TCSETSF, TCFLSH, TIOCGPGRP, TIOCGSID; TCGETS2, TCSETS2, TCSETSW2,
/// TCSETSF2.
pub(super) const TERMINAL: &[u64] = &[
    0x5401,
    0x5402,
    0x5403,
    0x5404,
    0x540b,
    0x540f,
    0x5429,
    read(b'T', 0x2a, 44),
    write(b'T', 0x2b, 44),
    write(b'T', 0x2c, 44),
    write(b'T', 0x2d, 44),
];
