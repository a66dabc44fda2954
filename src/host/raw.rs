//! The few lines that the compiler cannot check: what the kernel offers and no library here wraps. Nothing else in this
//! crate is unsafe.

#![allow(unsafe_code)]

use nix::{errno::Errno, libc};
use std::{
    alloc::{GlobalAlloc, Layout, System},
    io,
    os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
    sync::atomic::{AtomicBool, Ordering},
};

/// More supplementary groups than this the kernel gives nobody (`NGROUPS_MAX`).
const MAX_GROUPS: usize = 65_536;

/// Bytes; what is as large comes from the kernel and goes back there, where nothing in the heap fits ([`spare_memory`]).
pub(crate) const LARGE: usize = 16 << 10;

/// The system's allocator, but what is given back is wiped first: no secret outlives its owner, whichever library had a copy
/// of it and let go. Large blocks, too: glibc takes them from where others have been as readily as from the kernel.
#[derive(Debug)]
pub struct Wiping;

// SAFETY: each block is the system's, with the layout that it was asked for with. What is wiped is all of a block that its
// owner has given up, before the system has it back. Growing is left to the trait: a new block, and this one given back.
unsafe impl GlobalAlloc for Wiping {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        unsafe {
            libc::explicit_bzero(block.cast(), layout.size());
            System.dealloc(block, layout);
        }
    }
}

/// Asks the allocator to hold no memory that is not used (mallopt(3)); glibc alone knows how. Left to itself, it takes a
/// buffer from where a larger one has been, so that every page of it stays dirty, and `h2` has one of 16 KiB for each
/// connection of which it needs the first lines. To be called before there is another thread.
pub(crate) fn spare_memory() {
    #[cfg(target_env = "gnu")]
    for (option, value) in [(libc::M_MMAP_THRESHOLD, LARGE), (libc::M_TRIM_THRESHOLD, LARGE), (libc::M_TOP_PAD, 0)] {
        // SAFETY: it takes two numbers and no pointer; what it does not like it refuses, and all stays as it was.
        unsafe { libc::mallopt(option, libc::c_int::try_from(value).unwrap_or(libc::c_int::MAX)) };
    }
}

/// Takes over the descriptors that a service manager left open for this process (sd_listen_fds(3)), with their names.
/// Only the first call gives any: nobody owns a descriptor twice. To be called before anything else opens one, for a
/// manager that counts wrongly would give away what is somebody's already.
///
/// # Errors
/// When the environment says what cannot be, or a descriptor is not open.
pub(crate) fn inherited() -> io::Result<Vec<(String, OwnedFd)>> {
    static TAKEN: AtomicBool = AtomicBool::new(false);
    if TAKEN.swap(true, Ordering::SeqCst) {
        return Ok(Vec::new());
    }
    let found: Vec<(RawFd, String)> = sd_notify::listen_fds_with_names()?.collect();
    // SAFETY: `LISTEN_PID` is this process, so the descriptors were left to it; each is open (its flags could be set),
    // listed once, and, by the guard above, has no other owner here.
    Ok(found.into_iter().map(|(fd, name)| (name, unsafe { OwnedFd::from_raw_fd(fd) })).collect())
}

/// The supplementary groups that the process at the other end had when it connected (`SO_PEERGROUPS`, Linux 4.13).
///
/// # Errors
/// When the socket is no connected unix socket, or the kernel is older.
pub(crate) fn peer_groups(socket: BorrowedFd<'_>) -> io::Result<Vec<u32>> {
    let mut groups: Vec<libc::gid_t> = vec![0; 32];
    loop {
        let mut size = libc::socklen_t::try_from(size_of_val(groups.as_slice())).map_err(io::Error::other)?;
        // SAFETY: the kernel writes at most `size` bytes, which is the size of `groups`, and then `size` itself.
        let done = unsafe {
            libc::getsockopt(
                socket.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_PEERGROUPS,
                groups.as_mut_ptr().cast(),
                &raw mut size,
            )
        };
        let count = size as usize / size_of::<libc::gid_t>();
        match Errno::result(done) {
            Ok(_) => {
                groups.truncate(count);
                return Ok(groups);
            }
            // Too few places: `size` says how many there must be.
            Err(Errno::ERANGE) if count > groups.len() && count <= MAX_GROUPS => groups.resize(count, 0),
            Err(errno) => return Err(errno.into()),
        }
    }
}

/// How many bytes were sent that the far end has not acknowledged (`SIOCOUTQ`, tcp(7)).
///
/// # Errors
/// When it is no socket.
pub(crate) fn unacknowledged(socket: BorrowedFd<'_>) -> io::Result<usize> {
    let mut bytes: libc::c_int = 0;
    // SAFETY: the kernel writes one `int`, which `bytes` is.
    Errno::result(unsafe { libc::ioctl(socket.as_raw_fd(), libc::TIOCOUTQ, &raw mut bytes) })?;
    usize::try_from(bytes).map_err(io::Error::other)
}

/// A descriptor of the process that has the id now (pidfd_open(2), Linux 5.3).
///
/// # Errors
/// When there is no such process, or the kernel is older.
pub(crate) fn pidfd_open(pid: i32) -> io::Result<OwnedFd> {
    // SAFETY: two integers go in, and what comes out is a new descriptor (close-on-exec) or -1.
    let fd = Errno::result(unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) })?;
    let fd = RawFd::try_from(fd).map_err(io::Error::other)?;
    // SAFETY: the kernel has just made it for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
