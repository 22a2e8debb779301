//! How far saving and reading have come, for those that wait.

use std::collections::BTreeMap;
use std::sync::Mutex;

use os::lock;
use serde::{Deserialize, Serialize};

/// What is done with a checkpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum WorkKind {
    /// Its pages are written.
    Save,
    /// Its pages are read.
    Restore,
}

/// How far it has come.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Work {
    /// What is done.
    pub kind: WorkKind,
    /// The checkpoint.
    pub name: String,
    /// Pages so far.
    pub done: u64,
    /// Of so many.
    pub total: u64,
}

/// All that is going on.
#[derive(Debug, Default)]
pub struct Works(Mutex<(u64, BTreeMap<u64, Work>)>);

/// One of them, until this is dropped.
pub struct Running<'a> {
    works: &'a Works,
    number: u64,
}

impl Works {
    /// Begins one.
    pub fn begin(&self, kind: WorkKind, name: &str) -> Running<'_> {
        let mut works = lock(&self.0);
        works.0 += 1;
        let number = works.0;
        works.1.insert(number, Work { kind, name: name.into(), done: 0, total: 0 });
        Running { works: self, number }
    }

    /// All of them.
    pub fn all(&self) -> Vec<Work> {
        lock(&self.0).1.values().cloned().collect()
    }
}

impl Running<'_> {
    /// It has come so far.
    pub fn tell(&self, done: u64, total: u64) {
        if let Some(work) = lock(&self.works.0).1.get_mut(&self.number) {
            (work.done, work.total) = (done, total);
        }
    }
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        lock(&self.works.0).1.remove(&self.number);
    }
}
