//! KVM's dirty log, cleared by hand and a part at a time (KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, all
//! pages set at first), and with it what the VMM itself writes. It has several readers, which know
//! nothing of each other: KVM has one bit for a page, and the reader that clears it leaves it to
//! the others as *pending*.
//!
//! Source: the kernel's Documentation/virt/kvm/api.rst, 4.8 (KVM_GET_DIRTY_LOG), 4.117
//! (KVM_CLEAR_DIRTY_LOG), 7.18.
#![expect(
    unsafe_code,
    reason = "kvm-ioctls has no call for KVM_CLEAR_DIRTY_LOG, and one for KVM_GET_DIRTY_LOG that allocates"
)]

use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex, Weak};

use kvm_bindings::{
    KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_DIRTY_LOG_INITIALLY_SET, KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE,
    kvm_clear_dirty_log, kvm_clear_dirty_log__bindgen_ty_1, kvm_dirty_log, kvm_dirty_log__bindgen_ty_1,
    kvm_enable_cap,
};
use kvm_ioctls::VmFd;

use super::slots;
use memory::page_set::WORD_PAGES;
use memory::ram::Ram;
use memory::written::{OwnWrites, WriteLog, words};
use memory::{PageRange, PageSet};

/// `_IOW(KVMIO, 0x42, struct kvm_dirty_log)`.
const KVM_GET_DIRTY_LOG: libc::c_ulong = 0x4010_ae42;
/// `_IOWR(KVMIO, 0xc0, struct kvm_clear_dirty_log)`.
const KVM_CLEAR_DIRTY_LOG: libc::c_ulong = 0xc018_aec0;
const _: () = assert!(size_of::<kvm_dirty_log>() == 16 && size_of::<kvm_clear_dirty_log>() == 24);

/// How KVM is to keep the log: it write-protects on request, and a log begins with every page set,
/// so that beginning one costs the guest nothing.
const PROTECT: u32 = KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | KVM_DIRTY_LOG_INITIALLY_SET;

/// Words cleared in one call, 2048 pages: KVM holds the lock meanwhile that vCPUs need for their
/// faults, up to 0.4 ms.
const MAX_SPAN_WORDS: usize = 32;
/// Words without a bit that are worth taking along: KVM passes over them, and each call flushes the
/// vCPUs' translations.
const GAP_WORDS: usize = 16;

/// A reader of the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reader {
    /// The agent of Samepage's own merging.
    Merging,
    /// Snapshots of what was written since the last one.
    Snapshots,
    /// A capture, of what was written since it began.
    Capture,
}

/// How many there are.
const READERS: usize = 3;

/// The log of one VM's writes, its vCPUs' and its devices', as one reader sees it: as if there were
/// no other. Clones are the same log. It keeps no VM alive: when the VM has ended, every call
/// fails.
#[derive(Clone)]
pub struct DirtyLog {
    log: Arc<Mutex<Log>>,
    reader: Reader,
}

struct Log {
    /// Only KVM's irqfds hang on this descriptor, and they are to go when the VM does.
    vm: Weak<VmFd>,
    ram: Ram,
    /// Which words are those of each slot, and how many pages it has.
    slots: Vec<(Range<usize>, u64)>,
    supported: bool,
    /// Of each reader that has it on: pages that were written since it cleared them, and whose bits
    /// another has cleared. KVM's log is on while one of them is.
    pending: [Option<PageSet>; READERS],
    own: OwnWrites,
    /// KVM's bitmap of one slot.
    buffer: Vec<u64>,
}

impl DirtyLog {
    /// The log of `vm`, whose memory slots are those of `ram`, as merging sees it. It is off, and
    /// is to be made before anything else is logged there.
    pub(super) fn new(vm: &Arc<VmFd>, ram: &Ram) -> Self {
        let known = vm.check_extension_raw(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2.into());
        let mut protect = kvm_enable_cap { cap: KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, ..Default::default() };
        protect.args[0] = PROTECT.into();
        let supported = known as u32 & PROTECT == PROTECT && known > 0 && vm.enable_cap(&protect).is_ok();
        let pages = ram.stretches().map(|stretch| stretch.pages().pages());
        let log = Arc::new(Mutex::new(Log {
            vm: Arc::downgrade(vm),
            ram: ram.clone(),
            slots: words(ram).into_iter().zip(pages).collect(),
            supported,
            pending: [const { None }; READERS],
            own: OwnWrites::new(ram),
            buffer: Vec::new(),
        }));
        Self { log, reader: Reader::Merging }
    }

    /// The same log as another reader sees it.
    pub fn seen_by(&self, reader: Reader) -> Self {
        Self { log: self.log.clone(), reader }
    }

    fn with<T>(&self, work: impl FnOnce(&mut Log, &VmFd) -> io::Result<T>) -> io::Result<T> {
        let mut log = os::lock(&self.log);
        let vm = log.vm.upgrade();
        let vm = vm.ok_or_else(|| io::Error::new(io::ErrorKind::NotConnected, "the VM has ended"))?;
        work(&mut log, &vm)
    }
}

impl WriteLog for DirtyLog {
    fn start(&mut self) -> io::Result<()> {
        self.with(|log, vm| log.start(vm, self.reader))
    }

    fn stop(&mut self) -> io::Result<()> {
        self.with(|log, vm| log.stop(vm, self.reader))
    }

    fn read(&mut self, written: &mut PageSet) -> io::Result<()> {
        self.with(|log, vm| {
            log.read(vm, written)?;
            written.union_with(log.pending(self.reader)?);
            // KVM's bitmaps are whole words.
            let end = log.ram.pages().end();
            written.remove_range(PageRange::between(end, end + WORD_PAGES));
            Ok(())
        })
    }

    fn clear_in_parts(&mut self, pages: &PageSet, between: &mut dyn FnMut()) -> io::Result<()> {
        self.with(|log, vm| log.clear_for(vm, self.reader, pages, between))
    }
}

impl Log {
    fn start(&mut self, vm: &VmFd, reader: Reader) -> io::Result<()> {
        if self.pending[reader as usize].is_some() {
            return Ok(());
        }
        if !self.others(reader).any(|pending| pending.is_some()) {
            self.switch_on(vm)?;
        }
        self.pending[reader as usize] = Some(PageSet::all(self.ram.pages().pages()));
        Ok(())
    }

    fn switch_on(&mut self, vm: &VmFd) -> io::Result<()> {
        if !self.supported {
            return Err(io::Error::new(
                io::ErrorKind::Unsupported,
                "this KVM has no dirty log that is cleared by hand (KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 with \
                 KVM_DIRTY_LOG_INITIALLY_SET): expected Linux 5.7 or later",
            ));
        }
        self.own.start()?;
        if let Err(error) = slots::set(vm, &self.ram, true) {
            // Not half of it.
            let _ = slots::set(vm, &self.ram, false);
            self.own.stop()?;
            return Err(error.into());
        }
        Ok(())
    }

    fn stop(&mut self, vm: &VmFd, reader: Reader) -> io::Result<()> {
        if self.pending[reader as usize].is_some() {
            if !self.others(reader).any(|pending| pending.is_some()) {
                slots::set(vm, &self.ram, false)?;
                self.buffer = Vec::new();
                self.own.stop()?;
            }
            self.pending[reader as usize] = None;
        }
        Ok(())
    }

    /// What is pending for the others.
    fn others(&mut self, reader: Reader) -> impl Iterator<Item = &mut Option<PageSet>> {
        self.pending
            .iter_mut()
            .enumerate()
            .filter(move |(n, _)| *n != reader as usize)
            .map(|(_, other)| other)
    }

    fn pending(&self, reader: Reader) -> io::Result<&PageSet> {
        self.pending[reader as usize]
            .as_ref()
            .ok_or_else(|| io::Error::other("the log of written pages is off: start it first"))
    }

    /// What was written since one of the readers cleared it.
    fn read(&mut self, vm: &VmFd, written: &mut PageSet) -> io::Result<()> {
        // Says so if the log is off.
        self.own.read(written)?;
        for (slot, (words, _)) in (0..).zip(&self.slots) {
            self.buffer.resize(words.len(), 0);
            let buffer = kvm_dirty_log__bindgen_ty_1 { dirty_bitmap: self.buffer.as_mut_ptr().cast() };
            let log = kvm_dirty_log { slot, padding1: 0, __bindgen_anon_1: buffer };
            // SAFETY: KVM fills a bitmap of the slot's pages in whole words, which `buffer` has
            // room for.
            check(unsafe { libc::ioctl(vm.as_raw_fd(), KVM_GET_DIRTY_LOG, &log) })?;
            let slot = written.words_mut().get_mut(words.clone()).unwrap_or_default();
            slot.iter_mut().zip(&self.buffer).for_each(|(written, guest)| *written |= guest);
        }
        Ok(())
    }

    fn clear_for(
        &mut self,
        vm: &VmFd,
        reader: Reader,
        pages: &PageSet,
        between: &mut dyn FnMut(),
    ) -> io::Result<()> {
        // Says so if the log is off for this one.
        let (found, expected) = (pages.words().len(), self.pending(reader)?.words().len());
        if found != expected {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("a bitmap of {found} words was to be cleared: expected {expected}"),
            ));
        }
        if !self.others(reader).any(|pending| pending.is_some()) {
            self.clear(vm, pages, between)?;
        } else {
            // Those whose bits are set now stay set until they are cleared here. A bit that is set
            // from now on stays as it is, for both.
            let mut written = PageSet::default();
            self.read(vm, &mut written)?;
            written.intersect(pages);
            // Before they are cleared: if that fails half way, nothing is lost.
            self.others(reader).flatten().for_each(|pending| pending.union_with(&written));
            self.clear(vm, &written, between)?;
        }
        if let Some(pending) = &mut self.pending[reader as usize] {
            pending.subtract(pages);
        }
        Ok(())
    }

    fn clear(&mut self, vm: &VmFd, pages: &PageSet, between: &mut dyn FnMut()) -> io::Result<()> {
        self.own.clear(pages)?;
        for (slot, (words, slot_pages)) in (0..).zip(&self.slots) {
            let words = pages.words().get(words.clone()).unwrap_or_default();
            let mut from = 0;
            while let Some(span) = next_span(words, from) {
                from = span.end;
                let first_page = span.start as u64 * WORD_PAGES;
                // Whole words, but at the end of the slot.
                let count = (span.len() as u64 * WORD_PAGES).min(slot_pages - first_page);
                let bits = words[span].as_ptr().cast_mut().cast();
                let clear = kvm_clear_dirty_log {
                    slot,
                    num_pages: count as u32,
                    first_page,
                    __bindgen_anon_1: kvm_clear_dirty_log__bindgen_ty_1 { dirty_bitmap: bits },
                };
                // SAFETY: KVM reads, and only reads, one bit for each of `num_pages` pages, in
                // whole words, which the span has.
                check(unsafe { libc::ioctl(vm.as_raw_fd(), KVM_CLEAR_DIRTY_LOG, &clear) })?;
                between();
            }
        }
        Ok(())
    }
}

/// The next words from `from` on that are cleared in one call: they begin and end with words that
/// have bits.
fn next_span(words: &[u64], from: usize) -> Option<Range<usize>> {
    let start = from + words.get(from..)?.iter().position(|word| *word != 0)?;
    let mut end = start + 1;
    for (at, word) in words.iter().enumerate().take(start + MAX_SPAN_WORDS).skip(end) {
        if *word != 0 {
            end = at + 1;
        } else if at - end >= GAP_WORDS {
            break;
        }
    }
    Some(start..end)
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests;
