//! Who runs where.

use anyhow::Context;
use nix::{
    sched::{CpuSet, sched_getaffinity, sched_setaffinity},
    unistd::Pid,
};

/// The last core is the contestants', all others are the client's and the application's.
pub(crate) struct Cores {
    ours: CpuSet,
    theirs: CpuSet,
}

impl Cores {
    /// Moves this thread to ours, and with it those that it starts.
    pub(crate) fn split() -> anyhow::Result<Self> {
        let (mut ours, mut theirs) = (sched_getaffinity(Pid::from_raw(0))?, CpuSet::new());
        let all: Vec<_> = (0..CpuSet::count()).filter(|core| ours.is_set(*core) == Ok(true)).collect();
        let last = *all.last().context("no core")?;
        theirs.set(last)?;
        if all.len() > 1 {
            ours.unset(last)?;
        }
        sched_setaffinity(Pid::from_raw(0), &ours)?;
        Ok(Self { ours, theirs })
    }

    /// Starts a process on theirs.
    pub(crate) fn apart<T>(&self, start: impl FnOnce() -> anyhow::Result<T>) -> anyhow::Result<T> {
        sched_setaffinity(Pid::from_raw(0), &self.theirs)?;
        let started = start();
        sched_setaffinity(Pid::from_raw(0), &self.ours)?;
        started
    }
}
