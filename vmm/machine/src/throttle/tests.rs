use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::thread;

use devices::reclaim::Gpa;
use kvm_bindings::kvm_mp_state;
use kvm_ioctls::{Kvm, VcpuFd};
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::create::{create_vcpus, create_vm};
use crate::exit::Outcome;
use crate::registers;
use crate::vcpu::{Shared, Vcpus};
use memory::PAGE_BYTES;
use memory::ram::{Backing, Ram};
use memory::resident::page_count;

const CODE_GPA: u64 = 1 << 20;
/// Writes to each page from the address in rdi up to the one in rsi, and stays there.
const CODE: [u8; 16] = [
    0x88, 0x07, // mov [rdi], al
    0x48, 0x81, 0xc7, 0x00, 0x10, 0x00, 0x00, // add rdi, 4096
    0x48, 0x39, 0xf7, // cmp rdi, rsi
    0x72, 0xf2, // jb to the first
    0xeb, 0xfe, // jmp to itself
];
const VCPUS: u8 = 4;
/// Pages that each vCPU touches, from the second half of its part of RAM on.
const EACH_PAGES: u64 = 5000;
const PART_BYTES: u64 = 64 << 20;

fn vcpu(kvm_vcpu: &VcpuFd, number: u64) {
    registers::enter(kvm_vcpu, CODE_GPA, 0).unwrap();
    let mut regs = kvm_vcpu.get_regs().unwrap();
    regs.rdi = number * PART_BYTES + PART_BYTES / 2;
    regs.rsi = regs.rdi + EACH_PAGES * PAGE_BYTES;
    kvm_vcpu.set_regs(&regs).unwrap();
    // All but the first would wait for a start signal.
    kvm_vcpu.set_mp_state(kvm_mp_state::default()).unwrap();
}

#[test]
fn without_a_rate_no_vcpu_looks_and_with_one_it_is_stated_how_far_ahead_is_possible() {
    let throttle = Throttle::new(4);
    assert_eq!((throttle.look(), throttle.status()), (None, Throttled::default()));
    assert!(matches!(throttle.set(Some(0)), Err(ThrottleError::Zero)));
    throttle.set(Some(1_000_000)).unwrap();
    assert!(throttle.look().is_some());
    let status = throttle.status();
    assert_eq!(status.pages_per_second, Some(1_000_000));
    assert!(status.ahead_pages.is_some_and(|pages| pages <= 1_000_000), "{status:?}");
    throttle.set(None).unwrap();
    assert_eq!((throttle.look(), throttle.status().pages_per_second), (None, None));
}

/// Four vCPUs that do nothing but touch new pages, beside as many threads that do nothing but spin:
/// at no moment is there more than the rate has brought, and a second's worth.
#[test]
fn four_vcpus_beside_busy_threads_are_never_a_second_ahead() {
    const RATE: u64 = 6000;
    let Ok(kvm) = Kvm::new() else {
        testing::skipped(module_path!(), "no usable /dev/kvm");
        return;
    };
    let ram = Ram::new(u64::from(VCPUS) * PART_BYTES, Backing::Anonymous).unwrap();
    // A huge page would be 512 at once, and soon all.
    let _ = ram.set_huge_pages(false);
    registers::write_tables(ram.memory()).unwrap();
    ram.memory().write_slice(&CODE, GuestAddress(CODE_GPA)).unwrap();
    let vm = create_vm(&kvm, &ram).unwrap();
    let vcpus = create_vcpus(&kvm, &vm, VCPUS).unwrap();
    (0..).zip(&vcpus).for_each(|(n, kvm_vcpu)| vcpu(kvm_vcpu, n));
    let nothing = Box::new(|| false);
    let outcome = Outcome::new().unwrap();
    let merges = ram.merges().clone();
    let shared =
        Shared::new(VCPUS, Default::default(), nothing, Box::new(|| false), outcome, merges, Arc::default());
    let parts: Vec<_> = (0..u64::from(VCPUS))
        .map(|n| Gpa(n * PART_BYTES + PART_BYTES / 2)..Gpa((n + 1) * PART_BYTES))
        .collect();
    let touched = || page_count(&ram.resident(&parts).unwrap());
    let done = Arc::new(AtomicBool::new(false));
    let spinners = (0..VCPUS).map(|_| {
        let done = done.clone();
        thread::spawn(move || while !done.load(Ordering::Relaxed) {})
    });
    let spinners: Vec<_> = spinners.collect();

    let begin = Instant::now();
    shared.throttle.set(Some(RATE)).unwrap();
    assert!(shared.throttle.status().ahead_pages.is_some_and(|pages| pages <= RATE));
    let mut vcpus = Vcpus::start(shared.clone(), vcpus, None).unwrap();
    let mut looks = 0;
    loop {
        let pages = touched();
        // Read after, so that they were touched before.
        let due = (begin.elapsed().as_secs_f64() * RATE as f64) as u64;
        assert!(pages <= due + RATE, "{pages} pages where {due} were due");
        looks += 1;
        if pages == u64::from(VCPUS) * EACH_PAGES {
            break;
        }
        assert!(begin.elapsed() < Duration::from_secs(120), "{pages} pages only");
        thread::sleep(Duration::from_millis(5));
    }
    done.store(true, Ordering::Relaxed);
    vcpus.stop();
    spinners.into_iter().for_each(|spinner| spinner.join().unwrap());
    assert!(
        looks > 10 && shared.throttle.status().held_ms > 500,
        "{looks} looks, {:?}",
        shared.throttle.status()
    );
}
