//! The memory of this process: who may see it, and how much of it there is.

use super::raw;
use nix::sys::prctl;
use std::io;

/// Hides the memory of this process, in which keys are, from everybody but root (prctl(2), `PR_SET_DUMPABLE`): nobody else
/// reads or traces it, and no core file is written. `LimitCORE=0` alone is not enough, for the kernel does not heed it where
/// `core_pattern` is a pipe (core(5)). The files in `/proc` about this process belong to root from then on, its commands are
/// what they were.
///
/// # Errors
/// When the kernel refuses.
pub fn hide_memory() -> io::Result<()> {
    Ok(prctl::set_dumpable(false)?)
}

/// Prefers little memory over few system calls, for a process that rests most of the time. To be called before there is
/// another thread.
pub fn spare_memory() {
    raw::spare_memory();
}
