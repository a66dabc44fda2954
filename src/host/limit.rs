//! How many descriptors this process may have.

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use std::io;

/// Raises the limit on open descriptors as far as the host allows (getrlimit(2)); systemd starts services with 1,024, which
/// is for programs that use select(2). Returns the new limit.
///
/// # Errors
/// When the kernel refuses.
pub fn raise_descriptor_limit() -> io::Result<u64> {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
    Ok(hard)
}

/// The limit on open descriptors that is in force.
pub fn descriptor_limit() -> u64 {
    getrlimit(Resource::RLIMIT_NOFILE).map_or(1024, |(soft, _)| soft)
}
