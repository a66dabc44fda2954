//! The memory of this process: who may see it, how much of it there is, and what is left in it of keys and tokens.
//!
//! The bytes of a key have one owner, `spiffe::PrivateKey`, which lends them out; all of TLS shares what signs with it. What
//! anybody copies on the way (PEM, PKCS#12, messages, requests, libraries that know nothing of secrets) is wiped when it is
//! freed, by the program's allocator ([`Wiping`](super::Wiping)), and aws-lc wipes its own. So a secret is in memory as long as
//! somebody holds it: a key while its certificate is in use or is the one to fall back on, a token during a call. What this
//! does not reach, and why:
//!
//! - Registers and stacks keep what the last call left there until the next one writes over it; nobody can wipe another's.
//! - The token of the last call is in `h2`'s buffer for what it writes, in HPACK's spelling, until the next call or the end of
//!   the connection; so is the end of a message with a key, when flow control cuts it less than 256 bytes before its end. What
//!   is longer, `h2` sends from the memory of its owner.
//! - The kernel has what is in sockets and in files, and a reader of ours has what it was given.
//! - Swap. The unit forbids it (`MemorySwapMax=`); without the unit, a key that is swapped out is on this host's disk as it is in
//!   `/var/lib/we-agent`. Locking all memory would also lock stacks that are never used, and leave out the files in `/run`.

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
