//! A guest's addresses: through its page tables, and on to the host's frames.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::HostError;
use super::client::control;
use super::host_page::{HostPage, VmProcess};
use super::runtime::FleetDir;
use super::target::Target;
use machine::control::{Reply, Request};
use machine::paging::{Paging, Rights, Run};
use machine::walk::{TablePart, Tables, Walked};

/// Parts of page tables that are asked for, of some ten thousand entries each: a guest whose tables
/// point at themselves maps without end.
const MAX_PARTS: usize = 4096;
/// Ranges that an audit names for each finding.
const MAX_NAMED: usize = 16;

/// What a guest's page tables hold, and what in it is a weakness.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TableAudit {
    pub paging: Paging,
    /// Bytes mapped, by the size of the pages.
    pub mapped_bytes: BTreeMap<u64, u64>,
    /// Kernel memory that can be written and executed.
    pub writable_and_executable: Finding,
    /// User memory that the kernel would execute: none where SMEP is on.
    pub executable_by_kernel: Finding,
    /// Whether the page at address 0 is mapped.
    pub maps_null: bool,
    /// The tables were not read to their end: they point at themselves, or the guest changes them
    /// faster.
    pub is_partial: bool,
}

/// Memory that is as it should not be.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Finding {
    pub bytes: u64,
    /// The first ranges of it.
    pub ranges: Vec<Run>,
}

impl Finding {
    fn add(&mut self, run: Run) {
        self.bytes = self.bytes.saturating_add(run.bytes);
        if self.ranges.len() < MAX_NAMED {
            self.ranges.push(run);
        }
    }
}

impl TableAudit {
    fn new(paging: Paging) -> Self {
        Self {
            paging,
            mapped_bytes: BTreeMap::new(),
            writable_and_executable: Finding::default(),
            executable_by_kernel: Finding::default(),
            maps_null: false,
            is_partial: false,
        }
    }

    fn add(&mut self, run: Run) {
        let Rights { writable, user, executable } = run.rights;
        let bytes = self.mapped_bytes.entry(run.page_bytes).or_default();
        *bytes = bytes.saturating_add(run.bytes);
        // A read-only page is no such to a kernel that may ignore that.
        if executable && !user && (writable || !self.paging.write_protect) {
            self.writable_and_executable.add(run);
        }
        if executable && user && !self.paging.smep {
            self.executable_by_kernel.add(run);
        }
        self.maps_null |= run.start == 0;
    }
}

impl Target {
    /// The way of `address` through the guest's page tables.
    pub fn walk(&self, address: u64, Tables { vcpu, root }: Tables) -> Result<Walked, HostError> {
        match control(&self.guest, self.socket(), &Request::Walk { address, vcpu, root })? {
            Reply::Walked(walked) => Ok(*walked),
            other => Err(HostError::unexpected_of_vm(&self.guest, &other)),
        }
    }

    /// Reads all of the guest's page tables. `goes_on` is asked between two parts, with the address
    /// reached.
    pub fn audit_tables(
        &self,
        tables: Tables,
        goes_on: &mut dyn FnMut(u64) -> bool,
    ) -> Result<TableAudit, HostError> {
        let TablePart { paging, mut part } = self.table_part(0, tables)?;
        // Of one process: the guest may be in another one by the next part.
        let tables = Tables { root: Some(paging.root), ..tables };
        let mut audit = TableAudit::new(paging);
        for _ in 0..MAX_PARTS {
            part.runs.iter().for_each(|run| audit.add(*run));
            let Some(next) = part.next else { return Ok(audit) };
            if !goes_on(next) {
                break;
            }
            part = self.table_part(next, tables)?.part;
        }
        audit.is_partial = true;
        Ok(audit)
    }

    fn table_part(&self, from: u64, Tables { vcpu, root }: Tables) -> Result<TablePart, HostError> {
        match control(&self.guest, self.socket(), &Request::PageTable { from, vcpu, root })? {
            Reply::PageTable(part) => Ok(*part),
            other => Err(HostError::unexpected_of_vm(&self.guest, &other)),
        }
    }

    /// What the host has at an address of the VM process, and which guests of the fleet have the
    /// same frame.
    pub fn host_page(&self, hva: u64) -> Result<HostPage, HostError> {
        let mut own = VmProcess::find(self)?;
        let mut page = own.page(hva)?;
        let mut all = vec![own];
        if let Some(fleet) = &self.fleet {
            let others = FleetDir::of(fleet).control_sockets();
            let others = others.into_iter().filter(|socket| socket != self.socket()).filter_map(|socket| {
                let guest = socket.file_stem()?.to_str()?.to_owned();
                // One that is just ending has no frames to speak of.
                VmProcess::find(&Self { guest, fleet: None, socket }).ok()
            });
            all.extend(others);
        }
        page.find_sharers(&mut all);
        Ok(page)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_audit_names_what_is_weak_by_the_rules_that_hold() {
        let paging =
            Paging { root: 0, levels: 4, no_execute: true, write_protect: true, smep: true, smap: true };
        let rights = |writable, user, executable| Rights { writable, user, executable };
        let run = |start, rights| Run { start, bytes: 8192, page_bytes: 4096, rights };
        let runs = [
            run(0, rights(true, true, true)),
            run(1 << 47, rights(true, false, true)),
            run(2 << 47, rights(false, false, true)),
            run(3 << 47, rights(true, false, false)),
        ];
        let audit = |paging| {
            let mut audit = TableAudit::new(paging);
            runs.iter().for_each(|run| audit.add(*run));
            (audit.writable_and_executable.bytes, audit.executable_by_kernel.bytes, audit.maps_null)
        };
        assert_eq!(audit(paging), (8192, 0, true));
        assert_eq!(audit(Paging { smep: false, write_protect: false, ..paging }), (16384, 8192, true));
    }
}
