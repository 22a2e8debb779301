//! How a VM ends, and what is said about an exit that cannot be gone on from.
#![expect(unsafe_code, reason = "reads the exit's data from the union in kvm_run")]

use std::fmt;
use std::io;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use kvm_ioctls::VcpuFd;
use vmm_sys_util::eventfd::EventFd;

use super::probe;
use memory::merge_log::{Before, MergeLog, Replaced};

/// KVM_INTERNAL_ERROR_EMULATION.
const EMULATION: u32 = 1;

/// What is said of a guest whose kernel has panicked, on standard error, behind its name.
pub const PANICKED: &str = "the guest's kernel panicked";

/// How a VM ended.
#[derive(Debug)]
pub enum Ending {
    /// The guest switched itself off.
    PowerOff,
    /// The guest asked for a reset.
    Reset,
    /// The guest's kernel has panicked: of what, where it said so.
    Panicked(Option<String>),
    /// It was stopped from outside.
    Stopped,
    /// It was asked to power off, had not within the limit, and was stopped.
    CutOff {
        /// How long it had.
        limit: Duration,
    },
    /// The guest, or KVM under it, cannot go on.
    Fault(Box<FaultReport>),
}

/// An exit that ends the VM.
#[derive(Debug)]
pub enum Fault {
    /// An exception while delivering an exception while delivering an exception.
    Triple,
    /// The guest said that it crashed.
    GuestCrash,
    /// The processor refused the vCPU's state.
    Entry {
        /// The hardware's reason code.
        reason: u64,
    },
    /// KVM gave up, most often on an instruction it cannot emulate.
    Internal,
    /// KVM could not back an access of the guest.
    Memory {
        /// Guest-physical address.
        gpa: u64,
        /// Length in bytes.
        bytes: u64,
    },
    /// An exit this VMM has no use for.
    Unhandled {
        /// Its name and data.
        exit: String,
    },
    /// KVM_RUN itself failed.
    Run {
        /// The error number.
        errno: i32,
    },
}

/// A fault with where the vCPU stood.
#[derive(Debug)]
pub struct FaultReport {
    fault: Fault,
    suberror: Option<u32>,
    instruction: Vec<u8>,
    registers: String,
    /// What was done to the guest's memory last, the latest at the end.
    merges: Vec<Replaced>,
    at: Instant,
    backend: String,
}

impl fmt::Display for FaultReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.fault {
            Fault::Triple => write!(f, "the guest ended in a triple fault")?,
            Fault::GuestCrash => write!(f, "the guest reported a crash")?,
            Fault::Entry { reason } => {
                write!(f, "the processor refused to enter the guest (reason {reason:#x})")?
            }
            Fault::Internal => {
                write!(
                    f,
                    "KVM cannot go on with this guest (suberror {})",
                    self.suberror.unwrap_or_default()
                )?;
            }
            Fault::Memory { gpa, bytes } => {
                write!(f, "KVM could not back {bytes} bytes at guest-physical {gpa:#x}")?;
            }
            Fault::Unhandled { exit } => write!(f, "KVM left the guest for a reason unknown here: {exit}")?,
            Fault::Run { errno } => write!(f, "KVM_RUN failed: {}", io::Error::from_raw_os_error(*errno))?,
        }
        if !self.instruction.is_empty() {
            write!(f, "\n  instruction bytes:")?;
            for b in &self.instruction {
                write!(f, " {b:02x}")?;
            }
        }
        write!(f, "\n{}", self.registers)?;
        if !self.merges.is_empty() {
            write!(f, "\n  guest pages replaced last:{}", Before(&self.merges, self.at))?;
        }
        write!(f, "\n  likely cause: {}", self.cause())
    }
}

impl FaultReport {
    fn cause(&self) -> &'static str {
        match &self.fault {
            Fault::Triple => {
                "the guest's kernel faulted before it could handle faults: a kernel for other hardware, or one that lacks memory"
            }
            Fault::Internal if self.suberror == Some(EMULATION) && self.backend == "pvm" => {
                "this KVM (PVM) emulates ring-0 code one instruction at a time and does not know this one; \
                 Linux guests need VMX or SVM here, as in the nested-paging lab (tests/lab)"
            }
            Fault::Internal if self.suberror == Some(EMULATION) => {
                "an instruction on a device's memory, or code that ran away, which KVM cannot emulate"
            }
            Fault::Entry { .. } => {
                "a register state the processor does not allow; a defect of this VMM or of KVM"
            }
            Fault::Memory { .. } => "the host has no memory left for this guest, or its mapping is damaged",
            Fault::GuestCrash => "the guest's own console says more",
            _ => "unknown; run with RUST_LOG=debug and compare with `samepage doctor`",
        }
    }
}

/// Reads everything worth knowing from a vCPU that stopped with `fault`, and of what was done to
/// its memory.
pub fn describe(vcpu: &mut VcpuFd, fault: Fault, merges: &MergeLog) -> FaultReport {
    let (at, merges) = (Instant::now(), merges.last());
    let (mut suberror, mut instruction) = (None, Vec::new());
    if matches!(fault, Fault::Internal) {
        let run = vcpu.get_kvm_run();
        // SAFETY: the exit reason is KVM_EXIT_INTERNAL_ERROR, for which KVM fills this member of
        // the union.
        let failure = unsafe { run.__bindgen_anon_1.emulation_failure };
        suberror = Some(failure.suberror);
        if failure.suberror == EMULATION && failure.ndata >= 3 && failure.flags & 1 != 0 {
            // SAFETY: flag bit 0 says that the instruction's size and bytes are there.
            let bytes = unsafe { failure.__bindgen_anon_1.__bindgen_anon_1 };
            let size = usize::from(bytes.insn_size).min(bytes.insn_bytes.len());
            instruction = bytes.insn_bytes[..size].to_vec();
        }
    }
    let registers = registers(vcpu);
    let backend = probe::backend_name().to_owned();
    FaultReport { fault, suberror, instruction, registers, merges, at, backend }
}

fn registers(vcpu: &VcpuFd) -> String {
    let (Ok(r), Ok(s)) = (vcpu.get_regs(), vcpu.get_sregs()) else {
        return "  registers: KVM does not give them".into();
    };
    format!(
        "  rip {:016x} rsp {:016x} rflags {:08x} cs {:04x} ring {}\n\
         \x20 rax {:016x} rbx {:016x} rcx {:016x} rdx {:016x}\n\
         \x20 rsi {:016x} rdi {:016x} rbp {:016x} r8  {:016x}\n\
         \x20 r9  {:016x} r10 {:016x} r11 {:016x} r12 {:016x}\n\
         \x20 r13 {:016x} r14 {:016x} r15 {:016x}\n\
         \x20 cr0 {:08x} cr2 {:016x} cr3 {:08x} cr4 {:08x} efer {:04x}",
        r.rip,
        r.rsp,
        r.rflags,
        s.cs.selector,
        s.cs.dpl,
        r.rax,
        r.rbx,
        r.rcx,
        r.rdx,
        r.rsi,
        r.rdi,
        r.rbp,
        r.r8,
        r.r9,
        r.r10,
        r.r11,
        r.r12,
        r.r13,
        r.r14,
        r.r15,
        s.cr0,
        s.cr2,
        s.cr3,
        s.cr4,
        s.efer
    )
}

/// Where the first thread that knows the VM's end puts it, and the event that says so.
#[derive(Clone)]
pub struct Outcome {
    ending: Arc<Mutex<Option<Ending>>>,
    set: Arc<EventFd>,
}

impl Outcome {
    /// An outcome that is not known yet.
    pub fn new() -> io::Result<Self> {
        Ok(Self { ending: Arc::default(), set: Arc::new(EventFd::new(libc::EFD_NONBLOCK)?) })
    }

    /// Sets the ending; the first one counts.
    pub fn tell(&self, ending: Ending) {
        os::lock(&self.ending).get_or_insert(ending);
        let _ = self.set.write(1);
    }

    /// Takes the ending.
    pub fn take(&self) -> Option<Ending> {
        os::lock(&self.ending).take()
    }

    /// Readable once an ending was set.
    pub fn event(&self) -> &EventFd {
        &self.set
    }
}
