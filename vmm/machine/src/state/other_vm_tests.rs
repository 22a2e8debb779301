//! The built-in guest is stopped in the middle of its work, and goes on in another VM: what this
//! KVM can give back.

use std::io::{self, Write};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use memory::ram::{Backing, Ram};

use super::StateError;
use super::chips::ChipsV1;
use super::counters::{self, Reading};
use super::msrs::{self, Savable};
use super::vcpu::{Saved, VcpuV1, xsave_bytes};
use crate::create::{create_vcpus, create_vm};
use crate::machine::Machine;
use crate::platform::IDLE_PORT;
use crate::{VmConfig, acpi, boot, registers};

/// Memory of the guest.
const MEMORY_BYTES: u64 = 32 << 20;
/// How long it may take for one command.
const LIMIT: Duration = Duration::from_secs(60);

#[test]
fn the_built_in_guest_goes_on_in_another_vm() {
    let Ok(kvm) = Kvm::new() else { return testing::skipped(module_path!(), "no usable /dev/kvm") };
    let ram = Ram::new(MEMORY_BYTES, Backing::Anonymous).unwrap();
    let savable = {
        let vm = kvm.create_vm().unwrap();
        vm.create_irq_chip().unwrap();
        Savable::find(&kvm, &create_vcpus(&kvm, &vm, 1).unwrap()[0]).unwrap()
    };
    let (vcpu, chips) = {
        let mut first = One::build(&kvm, &ram);
        first.boot();
        first.ask("fill seed=1 common=2 zero=10 common_pct=40 dup=10 unique=40 pages=4000");
        first.complete();
        first.save(&savable).unwrap()
    };
    let mut second = One::build(&kvm, &ram);
    second.restore(&vcpu, &chips).unwrap();
    let again = VcpuV1::save(&second.vcpu, &savable, xsave_bytes(&second.vm)).unwrap();
    assert_same(&vcpu, &again);
    assert_eq!(second.ask("verify"), "ok command=verify checked=4000 mismatched=0 first=none");
    drop(second);
    assert!(ram.unmap().is_ok());
}

/// All is as it was, but for the time stamp counter, which went on.
fn assert_same(before: &VcpuV1, after: &VcpuV1) {
    let (then, now) = (counters::tsc(before).unwrap(), counters::tsc(after).unwrap());
    assert!(now >= then, "the time stamp counter went back from {then} to {now}");
    let but_tsc = |vcpu: &VcpuV1| {
        let mut vcpu = vcpu.clone();
        vcpu.msrs.retain(|(index, _)| *index != msrs::TSC);
        vcpu
    };
    assert_eq!(but_tsc(before), but_tsc(after));
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
    fn build(kvm: &Kvm, ram: &Ram) -> Self {
        let vm = Arc::new(create_vm(kvm, ram).unwrap());
        let said = Said::default();
        let (com1, com2) = (Box::new(io::sink()), Box::new(said.clone()));
        let machine = Machine::new(&vm, ram.memory(), com1, com2, Vec::new()).unwrap();
        let vcpu = create_vcpus(kvm, &vm, 1).unwrap().pop().unwrap();
        Self { ram: ram.clone(), vm, vcpu, machine, said, input: Vec::new() }
    }

    fn boot(&mut self) {
        let memory = self.ram.memory();
        registers::write_tables(memory).unwrap();
        let acpi = acpi::write(memory, 1, 0).unwrap();
        let config = VmConfig { memory_bytes: self.ram.bytes(), ..VmConfig::default() };
        let entry = boot::load(memory, &config, "", acpi).unwrap();
        registers::enter(&self.vcpu, entry, 0).unwrap();
        self.until("ready ");
    }

    fn save(&self, savable: &Savable) -> Result<(VcpuV1, ChipsV1), StateError> {
        let mut vcpus = [VcpuV1::save(&self.vcpu, savable, xsave_bytes(&self.vm))?];
        let reading = Reading::take(&self.vm, &self.vcpu)?;
        let chips = ChipsV1::save(&self.vm)?;
        counters::pin(&mut vcpus, &[reading], chips.clock);
        let [vcpu] = vcpus;
        Ok((vcpu, chips))
    }

    fn restore(&self, vcpu: &VcpuV1, chips: &ChipsV1) -> Result<(), StateError> {
        vcpu.restore(&self.vcpu, Saved::Anywhere, xsave_bytes(&self.vm))?;
        chips.restore(&self.vm)?;
        let (own, saved) = (std::slice::from_ref(&self.vcpu), std::slice::from_ref(vcpu));
        counters::align(&self.vm, own, saved, chips.clock)
    }

    /// The guest's answer to a command.
    fn ask(&mut self, command: &str) -> String {
        os::lock(&self.said.0).clear();
        self.input = format!("{command}\n").into();
        self.until("ok ")
    }

    /// Runs until the guest has said a line that begins so, and waits for the next.
    fn until(&mut self, answer: &str) -> String {
        let began = Instant::now();
        while began.elapsed() < LIMIT {
            let taken = os::lock(&self.machine.com2).input(&self.input);
            self.input.drain(..taken);
            match self.vcpu.run() {
                Ok(VcpuExit::IoOut(IDLE_PORT, _)) => {
                    let said = String::from_utf8_lossy(&os::lock(&self.said.0)).into_owned();
                    if let Some(line) = said.lines().find(|line| line.starts_with(answer)) {
                        return line.into();
                    }
                }
                Ok(VcpuExit::IoOut(port, data)) => _ = self.machine.pio.write(port.into(), data),
                Ok(VcpuExit::IoIn(port, data)) => _ = self.machine.pio.read(port.into(), data),
                Ok(VcpuExit::MmioRead(address, data)) => _ = self.machine.mmio.read(address, data),
                Ok(VcpuExit::MmioWrite(address, data)) => _ = self.machine.mmio.write(address, data),
                Ok(VcpuExit::Intr) => {}
                Err(error) if error.errno() == libc::EINTR => {}
                other => panic!("{answer:?} is awaited: {other:?}"),
            }
        }
        panic!("no {answer:?} within {LIMIT:?}")
    }

    /// Has KVM finish the access that the vCPU exited for, and run nothing.
    fn complete(&mut self) {
        self.vcpu.set_kvm_immediate_exit(1);
        let ran = self.vcpu.run().map(|exit| format!("{exit:?}"));
        self.vcpu.set_kvm_immediate_exit(0);
        assert!(matches!(ran, Err(error) if error.errno() == libc::EINTR));
    }
}
