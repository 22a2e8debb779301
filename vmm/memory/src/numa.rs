//! Where on a NUMA host a VM's memory comes from, and where it runs.
//!
//! By the policy of the whole process (set_mempolicy) and not by mbind of guest RAM: ranges that
//! were discarded or merged are mapped anew and would lose theirs, and no neighbours of another
//! policy join into one mapping.
#![expect(unsafe_code, reason = "no crate of ours has set_mempolicy")]

use std::fmt;
use std::io;
use std::str::FromStr;

use kernel_view::numa;
use rustix::thread::CpuSet;
use serde::{Deserialize, Serialize};
use thiserror::Error;

/// From linux/mempolicy.h.
const MPOL_PREFERRED: libc::c_int = 1;
const MPOL_BIND: libc::c_int = 2;
/// Nodes that a mask has room for; the kernel's own most is 1024.
const MAX_NODES: usize = 1024;
const WORD_BITS: usize = libc::c_ulong::BITS as usize;

/// What holds when the node is full.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Policy {
    /// There is no more memory, as if the host had run out of it.
    Bind,
    /// Memory comes from other nodes.
    Prefer,
}

/// A node, and how strictly.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Said", into = "String")]
pub struct Placement {
    pub node: u32,
    pub policy: Policy,
}

/// As in a fleet file.
#[derive(Deserialize)]
#[serde(untagged, expecting = "a node's number, or text as in \"0,prefer\"")]
enum Said {
    Node(u32),
    Text(String),
}

/// Why memory cannot be placed so.
#[derive(Debug, Error)]
pub enum NumaError {
    /// The text is no placement.
    #[error("{0:?} is no NUMA node: expected NODE, or NODE,bind or NODE,prefer, as in 0,prefer")]
    NotANode(String),
    /// The kernel knows no nodes.
    #[error(
        "this host's kernel has no NUMA ({path} is missing): leave the node out",
        path = "/sys/devices/system/node"
    )]
    NoNuma(#[source] io::Error),
    /// No such node has memory.
    #[error("this host has no NUMA node {node} with memory: expected {known}")]
    NoNode {
        node: u32,
        /// Those that there are.
        known: String,
    },
    /// The kernel refused it.
    #[error("cannot take memory from NUMA node {node}: it may be outside of this process's cpuset")]
    Refused {
        node: u32,
        #[source]
        source: io::Error,
    },
    /// The kernel refused its processors.
    #[error("cannot run on the processors of NUMA node {node}: they may be outside of this process's cpuset")]
    Processors {
        node: u32,
        #[source]
        source: io::Error,
    },
}

impl Placement {
    /// Checks that this host has the node.
    ///
    /// # Errors
    /// It has not.
    pub fn check(self) -> Result<(), NumaError> {
        let known = numa::nodes().map_err(NumaError::NoNuma)?;
        match known.contains(&self.node) {
            true => Ok(()),
            false => {
                let known = known.iter().map(u32::to_string).collect::<Vec<_>>().join(", ");
                Err(NumaError::NoNode { node: self.node, known })
            }
        }
    }

    /// Has the calling thread, and all that it starts from now on, take memory from the node and
    /// run on its processors. A node that is memory alone leaves them where they run.
    ///
    /// # Errors
    /// This host has no such node, or the kernel refuses it.
    pub fn apply(self) -> Result<(), NumaError> {
        self.check()?;
        let (node, mut mask) = (self.node, [0 as libc::c_ulong; MAX_NODES / WORD_BITS]);
        let bit = self.node as usize;
        if let Some(word) = mask.get_mut(bit / WORD_BITS) {
            *word = 1 << (bit % WORD_BITS);
        }
        let mode = match self.policy {
            Policy::Bind => MPOL_BIND,
            Policy::Prefer => MPOL_PREFERRED,
        };
        // SAFETY: the kernel reads so many bits of the mask, which is ours and that long; no memory
        // of ours is changed.
        let done = unsafe { libc::syscall(libc::SYS_set_mempolicy, mode, mask.as_ptr(), MAX_NODES) };
        if done != 0 {
            return Err(NumaError::Refused { node, source: io::Error::last_os_error() });
        }
        let refused = |source| NumaError::Processors { node, source };
        let processors = numa::processors(node).map_err(refused)?;
        let mut set = CpuSet::new();
        for cpu in processors.into_iter().filter(|cpu| (*cpu as usize) < CpuSet::MAX_CPU) {
            set.set(cpu as usize);
        }
        match set.count() {
            0 => Ok(()),
            _ => rustix::thread::sched_setaffinity(None, &set).map_err(|errno| refused(errno.into())),
        }
    }
}

impl FromStr for Placement {
    type Err = NumaError;

    fn from_str(text: &str) -> Result<Self, NumaError> {
        let wrong = || NumaError::NotANode(text.into());
        let (node, policy) = match text.split_once(',') {
            None => (text, Policy::Bind),
            Some((node, "bind")) => (node, Policy::Bind),
            Some((node, "prefer")) => (node, Policy::Prefer),
            Some(_) => return Err(wrong()),
        };
        match node.parse() {
            Ok(node) if (node as usize) < MAX_NODES => Ok(Self { node, policy }),
            _ => Err(wrong()),
        }
    }
}

impl TryFrom<Said> for Placement {
    type Error = NumaError;

    fn try_from(said: Said) -> Result<Self, NumaError> {
        match said {
            Said::Node(node) => node.to_string().parse(),
            Said::Text(text) => text.parse(),
        }
    }
}

impl From<Placement> for String {
    fn from(placement: Placement) -> Self {
        placement.to_string()
    }
}

impl fmt::Display for Placement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let policy = match self.policy {
            Policy::Bind => "bind",
            Policy::Prefer => "prefer",
        };
        write!(f, "{},{policy}", self.node)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_placement_is_a_number_or_text() {
        let bind = Placement { node: 1, policy: Policy::Bind };
        for (json, placement) in [
            ("1", bind),
            ("\"1\"", bind),
            ("\"1,bind\"", bind),
            ("\"1,prefer\"", Placement { policy: Policy::Prefer, ..bind }),
        ] {
            let read: Placement = serde_json::from_str(json).unwrap();
            assert_eq!(read, placement);
            assert_eq!(placement.to_string().parse::<Placement>().unwrap(), placement);
        }
        for wrong in ["", "x", "0,", "0,strict", "-1", "1024", "0,bind,1"] {
            let error = wrong.parse::<Placement>().unwrap_err().to_string();
            assert!(error.contains("expected NODE"), "{error}");
        }
    }

    #[test]
    fn a_thread_is_placed_on_a_node_that_there_is() {
        let Ok(nodes) = numa::nodes() else {
            testing::skipped(module_path!(), "this kernel has no NUMA");
            return;
        };
        let node = nodes[0];
        // A thread of its own, for what is set stays.
        let thread = std::thread::spawn(move || {
            Placement { node, policy: Policy::Bind }.apply().unwrap();
            let set = rustix::thread::sched_getaffinity(None).unwrap();
            let near = numa::processors(node).unwrap();
            (0..CpuSet::MAX_CPU).filter(|cpu| set.is_set(*cpu)).all(|cpu| near.contains(&(cpu as u32)))
        });
        assert!(thread.join().unwrap());
        let error = Placement { node: 1023, policy: Policy::Bind }.apply().unwrap_err().to_string();
        assert!(error.contains("no NUMA node 1023 with memory: expected 0"), "{error}");
    }
}
