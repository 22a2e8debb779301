//! A trial of what this KVM can give back: the built-in guest is stopped in the middle of its work, and goes on in another VM.

use std::io::{self, Write};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use memory::ram::{Backing, Ram};
use thiserror::Error;

use crate::create::{create_vcpus, create_vm};
use crate::error::VmError;
use crate::machine::Machine;
use crate::platform::IDLE_PORT;
use crate::state::StateError;
use crate::state::chips::ChipsV1;
use crate::state::counters::{self, Reading};
pub use crate::state::msrs::Access;
use crate::state::msrs::Savable;
pub use crate::state::trace::Step;
use crate::state::trace::Trace;
use crate::state::vcpu::{Saved, VcpuV1, xsave_bytes};
use crate::{VmConfig, acpi, boot, registers};

/// Memory of the guest.
const MEMORY_BYTES: u64 = 32 << 20;
/// How long it may take for one command.
const LIMIT: Duration = Duration::from_secs(60);
/// Commands before the copy, with what the guest answers, and after it.
const BEFORE: &str = "fill seed=1 common=2 zero=10 common_pct=40 dup=10 unique=40 pages=4000";
const AFTER: &str = "verify";

/// Why there is no result.
#[derive(Debug, Error)]
pub enum TrialError {
    /// The VM could not be built.
    #[error(transparent)]
    Vm(#[from] VmError),
    /// Its state could not be taken or given back.
    #[error("after {} calls of KVM", steps.len())]
    State {
        /// What was done until then.
        steps: Vec<Step>,
        /// What went wrong.
        #[source]
        source: StateError,
    },
    /// The guest did not go on.
    #[error("the guest did not answer {command:?}: {said}")]
    Guest {
        /// What it was asked.
        command: &'static str,
        /// What happened instead.
        said: String,
    },
}

/// What was found.
#[derive(Clone, Debug, Default)]
pub struct Trial {
    /// Each call of KVM, in order: first those that read, then those that write.
    pub steps: Vec<Step>,
    /// The model-specific registers that cannot be both read and written.
    pub odd_msrs: Vec<(u32, Access)>,
    /// How many can.
    pub msrs: usize,
    /// What is different when it is read again, in words.
    pub differences: Vec<String>,
    /// The guest's answer in its second VM.
    pub answer: String,
}

/// Does it. Nothing is left of it.
pub fn run() -> Result<Trial, TrialError> {
    let ram = Ram::new(MEMORY_BYTES, Backing::Anonymous).map_err(VmError::from)?;
    let done = on(&ram);
    if let Err(ram) = ram.unmap() {
        tracing::warn!("{} bytes of RAM stay mapped", ram.bytes());
    }
    done
}

fn on(ram: &Ram) -> Result<Trial, TrialError> {
    let kvm = Kvm::new().map_err(VmError::kvm("open /dev/kvm"))?;
    let mut trace = Trace::on();
    let mut trial = Trial::default();
    let savable = fresh(&kvm, &mut trial, &mut trace)?;
    let saved = {
        let mut first = One::build(&kvm, ram)?;
        first.boot()?;
        first.ask(BEFORE)?;
        first.complete()?;
        let saved =
            VcpuV1::save(&first.vcpu, &savable, xsave_bytes(&first.vm), &mut trace).and_then(|vcpu| {
                let reading = Reading::take(&first.vm, &first.vcpu)?;
                let chips = ChipsV1::save(&first.vm, &mut trace)?;
                let mut vcpus = [vcpu];
                counters::pin(&mut vcpus, &[reading], chips.clock);
                let [vcpu] = vcpus;
                Ok((vcpu, chips))
            });
        saved.map_err(|source| TrialError::State { steps: trace.take(), source })?
    };
    let began = Instant::now();
    let mut second = One::build(&kvm, ram)?;
    trace.took("build the second VM", began, None);
    let again = second.become_(&saved, &savable, &mut trace);
    let again = again.map_err(|source| TrialError::State { steps: trace.take(), source })?;
    trial.differences = differences(&saved.0, &again);
    trial.steps = trace.take();
    trial.answer = second.ask(AFTER)?;
    Ok(trial)
}

/// What a vCPU on which nothing has run can read and write.
fn fresh(kvm: &Kvm, trial: &mut Trial, trace: &mut Trace) -> Result<Savable, TrialError> {
    let began = Instant::now();
    let vm = kvm.create_vm().map_err(VmError::kvm("create a VM"))?;
    trace.took("KVM_CREATE_VM", began, None);
    vm.create_irq_chip().map_err(VmError::kvm("create the interrupt controllers"))?;
    let began = Instant::now();
    let vcpus = create_vcpus(kvm, &vm, 1)?;
    trace.took("create a vCPU", began, None);
    let began = Instant::now();
    let found = Savable::find(kvm, &vcpus[0], &mut |index, access| {
        if access != Access::Both {
            trial.odd_msrs.push((index, access));
        }
    });
    trace.took("try each MSR", began, None);
    let savable = found.map_err(|source| TrialError::State { steps: trace.take(), source })?;
    trial.msrs = savable.len();
    Ok(savable)
}

fn differences(before: &VcpuV1, after: &VcpuV1) -> Vec<String> {
    let mut found = Vec::new();
    let mut part = |name: &str, same: bool| {
        if !same {
            found.push(name.to_owned());
        }
    };
    part("registers", before.registers == after.registers);
    part("system registers", before.system == after.system);
    part("XSAVE area", before.xsave == after.xsave);
    part("extended control registers", before.xcrs == after.xcrs);
    part("debug registers", before.debug == after.debug);
    part("local APIC", before.lapic == after.lapic);
    part("CPUID", before.cpuid == after.cpuid);
    part("events", before.events == after.events);
    part("MP state", before.mp_state == after.mp_state);
    for (index, value) in &before.msrs {
        match after.msrs.iter().find(|(other, _)| other == index) {
            Some((_, now)) if now == value => {}
            Some((_, now)) => found.push(format!("MSR {index:#x}: {value:#x}, then {now:#x}")),
            None => found.push(format!("MSR {index:#x}: {value:#x}, then none")),
        }
    }
    if let (Some(before), Some(after)) = (counters::tsc(before), counters::tsc(after))
        && after < before
    {
        found.push("the time stamp counter went back".into());
    }
    found
}

/// What the guest writes to COM2.
#[derive(Clone, Default)]
struct Said(Arc<Mutex<Vec<u8>>>);

impl Write for Said {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        os::lock(&self.0).extend(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A VM with one vCPU, run by this thread.
struct One {
    ram: Ram,
    vm: Arc<VmFd>,
    vcpu: VcpuFd,
    machine: Machine,
    said: Said,
    /// What the port has not taken yet.
    input: Vec<u8>,
}

impl One {
    fn build(kvm: &Kvm, ram: &Ram) -> Result<Self, VmError> {
        let vm = Arc::new(create_vm(kvm, ram)?);
        let said = Said::default();
        let machine =
            Machine::new(&vm, ram.memory(), Box::new(io::sink()), Box::new(said.clone()), Vec::new())?;
        let vcpu = create_vcpus(kvm, &vm, 1)?.pop();
        let vcpu = vcpu.ok_or(VmError::Vcpus { asked: 0 })?;
        Ok(Self { ram: ram.clone(), vm, vcpu, machine, said, input: Vec::new() })
    }

    fn boot(&mut self) -> Result<(), TrialError> {
        let memory = self.ram.memory();
        registers::write_tables(memory)?;
        let acpi = acpi::write(memory, 1, 0)?;
        let config = VmConfig { memory_bytes: self.ram.bytes(), ..VmConfig::default() };
        let entry = boot::load(memory, &config, "", acpi)?;
        registers::enter(&self.vcpu, entry, 0)?;
        self.until("ready", "ready ").map(drop)
    }

    /// Gives it what was saved, and reads all of it again.
    fn become_(
        &mut self,
        (vcpu, chips): &(VcpuV1, ChipsV1),
        savable: &Savable,
        trace: &mut Trace,
    ) -> Result<VcpuV1, StateError> {
        vcpu.restore(&self.vcpu, Saved::Anywhere, xsave_bytes(&self.vm), trace)?;
        chips.restore(&self.vm, trace)?;
        let (own, saved) = (std::slice::from_ref(&self.vcpu), std::slice::from_ref(vcpu));
        counters::align(&self.vm, own, saved, chips.clock, trace)?;
        let _ = trace.set("KVMCLOCK_CTRL (EINVAL: the guest has no kvmclock)", || self.vcpu.kvmclock_ctrl());
        VcpuV1::save(&self.vcpu, savable, xsave_bytes(&self.vm), &mut Trace::default())
    }

    fn ask(&mut self, command: &'static str) -> Result<String, TrialError> {
        os::lock(&self.said.0).clear();
        self.input = format!("{command}\n").into();
        self.until(command, "ok ")
    }

    /// Runs until the guest has said a line that begins so, and waits for the next.
    fn until(&mut self, command: &'static str, answer: &str) -> Result<String, TrialError> {
        let began = Instant::now();
        let failed = |said: String| TrialError::Guest { command, said };
        while began.elapsed() < LIMIT {
            let taken = os::lock(&self.machine.com2).input(&self.input);
            self.input.drain(..taken);
            match self.vcpu.run() {
                Ok(VcpuExit::IoOut(IDLE_PORT, _)) => {
                    let said = String::from_utf8_lossy(&os::lock(&self.said.0)).into_owned();
                    if let Some(line) = said.lines().find(|line| line.starts_with(answer)) {
                        return Ok(line.into());
                    }
                }
                Ok(VcpuExit::IoOut(port, data)) => _ = self.machine.pio.write(port.into(), data),
                Ok(VcpuExit::IoIn(port, data)) => _ = self.machine.pio.read(port.into(), data),
                Ok(VcpuExit::MmioRead(address, data)) => _ = self.machine.mmio.read(address, data),
                Ok(VcpuExit::MmioWrite(address, data)) => _ = self.machine.mmio.write(address, data),
                Ok(VcpuExit::Intr) => {}
                Ok(other) => return Err(failed(format!("{other:?}"))),
                Err(error) if error.errno() == libc::EINTR => {}
                Err(error) => return Err(failed(error.to_string())),
            }
        }
        Err(failed(format!("nothing within {} s", LIMIT.as_secs())))
    }

    /// Has KVM finish the access that the vCPU exited for, and run nothing.
    fn complete(&mut self) -> Result<(), TrialError> {
        self.vcpu.set_kvm_immediate_exit(1);
        let ran = self.vcpu.run().map(|exit| format!("{exit:?}"));
        self.vcpu.set_kvm_immediate_exit(0);
        match ran {
            Err(error) if error.errno() == libc::EINTR => Ok(()),
            other => Err(TrialError::Guest { command: "immediate exit", said: format!("{other:?}") }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_built_in_guest_goes_on_in_another_vm() {
        if Kvm::new().is_err() {
            return testing::skipped(module_path!(), "no usable /dev/kvm");
        }
        let trial = run().unwrap();
        assert_eq!(trial.answer, "ok command=verify checked=4000 mismatched=0 first=none");
        let counter = format!("MSR {:#x}", crate::state::msrs::TSC);
        let others: Vec<_> = trial.differences.iter().filter(|d| !d.starts_with(&counter)).collect();
        assert!(others.is_empty(), "{others:?}");
    }
}
