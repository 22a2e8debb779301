//! A page of a VM process as the host's kernel has it: absent, on swap, on a frame; in a slab or
//! not; which other processes have the frame.

use serde::{Deserialize, Serialize};

use super::HostError;
use super::client::{ANSWER_LIMIT, ask_vm, connect};
use super::target::Target;
use kernel_view::pagemap::{FrameTable, Pagemap, PagemapEntry, Pfn};
use machine::control::{Reply, Request};
use memory::maps::{Maps, SlabMapping};
use memory::{Extent, Hva, PAGE_BYTES};
use os::{Peer, Process};

/// Pages that share a frame, named one by one.
const MAX_SHARERS: usize = 64;

/// Where a page is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Place {
    /// It has never been touched, or was given back: it reads as zeros.
    Absent,
    Swapped,
    /// On the zero page, which costs no frame.
    Zero,
    /// In a slab, which others may map, too.
    Slab {
        /// The slab's number in this kernel.
        inode: u64,
        /// Which page of it.
        page: u64,
    },
    /// On a frame of the kernel's own samepage merging.
    Ksm,
    /// On a frame of its own.
    Private,
    /// On a frame that is mapped more than once, or of a file.
    Shared,
}

/// A page of a guest's that has the same frame.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sharer {
    pub guest: String,
    /// Where the guest has it.
    pub gpa: u64,
}

/// A page of a VM process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostPage {
    /// The process.
    pub pid: u32,
    /// The page's address there.
    pub hva: u64,
    pub place: Place,
    /// The number of the frame, which the kernel shows to root alone.
    pub frame: Option<u64>,
    /// How many page table entries of the host map the frame; to root alone.
    pub mappings: Option<u64>,
    /// Userfaultfd watches for writes to it: merging looks at the page.
    pub is_write_watched: bool,
    /// Other pages on the frame, of this guest and of the others of its fleet.
    pub sharers: Vec<Sharer>,
    /// There are more.
    pub more_sharers: bool,
}

/// A VM process that is held while its page table is read.
pub(super) struct VmProcess {
    guest: String,
    process: Process,
    extents: Vec<Extent>,
    pagemap: Pagemap,
    maps: Maps,
}

impl VmProcess {
    /// The process that answers for `target`.
    pub fn find(target: &Target) -> Result<Self, HostError> {
        let guest = &target.guest;
        let peer = || format!("the VM of guest {guest}");
        let stream =
            connect(target.socket(), ANSWER_LIMIT).map_err(|source| HostError::socket(peer(), source))?;
        let process = Peer::process(&stream).map_err(|source| HostError::socket(peer(), source))?;
        let extents = match ask_vm(guest, stream, &Request::Status, ANSWER_LIMIT)? {
            Reply::Status(status) => status.extents,
            other => return Err(HostError::unexpected_of_vm(guest, &other)),
        };
        let pagemap = Pagemap::open(process.pid())?;
        let maps = Maps::of(process.pid()).map_err(|source| HostError::socket(peer(), source))?;
        // What was opened by its number was this process's: it had the number until now.
        match process.has_ended() {
            false => Ok(Self { guest: guest.clone(), process, extents, pagemap, maps }),
            true => Err(HostError::socket(peer(), std::io::Error::from(std::io::ErrorKind::NotConnected))),
        }
    }

    /// The page at an address of the process.
    pub fn page(&mut self, hva: u64) -> Result<HostPage, HostError> {
        let hva = Hva(hva).page();
        let mut entries = Vec::new();
        self.pagemap.read(hva, 1, &mut entries)?;
        let entry = entries.first().copied().unwrap_or_default();
        let frame = entry.pfn();
        let (mut mappings, mut flags) = (None, None);
        if let (Some(frame), Ok(mut table)) = (frame, FrameTable::open()) {
            let (mut counts, mut all) = (Vec::new(), Vec::new());
            table.counts(&[frame], &mut counts)?;
            table.flags(&[frame], &mut all)?;
            mappings = counts.first().copied();
            flags = all.first().copied().map(|flags| (flags.zero(), flags.ksm() && table.tells_ksm()));
        }
        let place = match self.slab_at(hva, entry) {
            _ if entry.swapped() => Place::Swapped,
            _ if !entry.present() => Place::Absent,
            Some((inode, page)) => Place::Slab { inode, page },
            None => match flags {
                Some((true, _)) => Place::Zero,
                Some((_, true)) => Place::Ksm,
                _ if entry.exclusive() => Place::Private,
                _ => Place::Shared,
            },
        };
        Ok(HostPage {
            pid: self.process.pid(),
            hva: hva.0,
            place,
            frame: frame.map(|Pfn(number)| number),
            mappings,
            is_write_watched: entry.write_protected(),
            sharers: Vec::new(),
            more_sharers: false,
        })
    }

    /// The slab and the page of it that lies at `hva`. A page that was written lies in a slab's
    /// mapping, but no longer in the slab.
    fn slab_at(&self, hva: Hva, entry: PagemapEntry) -> Option<(u64, u64)> {
        if !entry.file_or_shared() {
            return None;
        }
        let mapping = self.maps.slab_at(hva)?;
        Some((mapping.inode, mapping.slab_page(hva).0.into()))
    }

    /// Calls `found` with the guest's address of each page that has the frame of `page`; that
    /// returns false when it has enough.
    fn each_like(&mut self, page: &HostPage, mut found: impl FnMut(u64) -> bool) {
        let mut entries = Vec::new();
        match page.place {
            Place::Slab { inode, page } => {
                let lies = |mapping: &&SlabMapping| {
                    let first = u64::from(mapping.first.0);
                    let end = first + (mapping.hvas.end - mapping.hvas.start) / PAGE_BYTES;
                    mapping.inode == inode && (first..end).contains(&page)
                };
                let hva = |mapping: &SlabMapping| {
                    mapping.hvas.start + (page - u64::from(mapping.first.0)) * PAGE_BYTES
                };
                let hvas: Vec<Hva> = self.maps.slabs.iter().filter(lies).map(hva).collect();
                for hva in hvas {
                    let read = self.pagemap.read(hva, 1, &mut entries);
                    let is_slab = entries.first().is_some_and(|entry| entry.file_or_shared());
                    if read.is_ok() && is_slab && gpa_of(&self.extents, hva).is_some_and(|gpa| !found(gpa)) {
                        return;
                    }
                }
            }
            Place::Ksm | Place::Shared => {
                let Some(frame) = page.frame.map(Pfn) else { return };
                let extents = &self.extents;
                // An error is the end of the process, or of the search.
                let _ = self.pagemap.each(extents.iter().map(Extent::hvas), |hva, entry| {
                    let enough =
                        entry.pfn() == Some(frame) && gpa_of(extents, hva).is_some_and(|gpa| !found(gpa));
                    if enough { Err(HostError::Interrupted) } else { Ok(()) }
                });
            }
            Place::Absent | Place::Swapped | Place::Zero | Place::Private => {}
        }
    }
}

/// Where the guest has an address of the process; None outside RAM.
fn gpa_of(extents: &[Extent], hva: Hva) -> Option<u64> {
    extents.iter().find_map(|extent| extent.gpa_of(hva)).map(|gpa| gpa.0)
}

impl HostPage {
    /// Looks for its frame in `vms`, of which the first is its own.
    pub(super) fn find_sharers(&mut self, vms: &mut [VmProcess]) {
        let (own, page) = (self.pid, self.clone());
        let (mut sharers, mut more) = (Vec::new(), false);
        for vm in vms {
            let is_own = vm.process.pid() == own;
            let own_gpa = if is_own { gpa_of(&vm.extents, Hva(self.hva)) } else { None };
            let guest = vm.guest.clone();
            vm.each_like(&page, |gpa| {
                if Some(gpa) == own_gpa {
                    return true;
                }
                more = sharers.len() == MAX_SHARERS;
                if !more {
                    sharers.push(Sharer { guest: guest.clone(), gpa });
                }
                !more
            });
        }
        sharers.sort_by(|a, b| (&a.guest, a.gpa).cmp(&(&b.guest, b.gpa)));
        (self.sharers, self.more_sharers) = (sharers, more);
    }
}
