//! Who is at the other end of a unix socket.
//!
//! The kernel notes user, group and process of a peer when it connects, and never again: a process that gives up its
//! rights later, or hands the socket on, stays who it was. The number of a process is used again after its end, so what
//! is said about the process is tied to a descriptor of it (pidfd); [`Peer::of`] says how far that goes on old kernels.

use super::raw;
use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::socket::{getsockopt, sockopt::PeerPidfd},
    unistd::{Group, User},
};
use std::{
    fmt, io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};
use tokio::net::UnixStream;

/// What the kernel shows instead of a user or a group that does not exist in our user namespace
/// (`/proc/sys/kernel/overflowuid`): it may be anybody, so it is nobody whom one can allow.
const UNMAPPED: u32 = 65_534;

/// The process at the other end, as it was when it connected.
#[derive(Debug)]
pub struct Peer {
    /// Its effective user.
    pub uid: u32,
    /// Its effective group.
    pub gid: u32,
    /// All its groups: the effective one first, then the supplementary ones.
    pub groups: Vec<u32>,
    /// Its number in our namespace; none when it has none there.
    pub pid: Option<i32>,
    process: Process,
}

/// What holds the process fast.
#[derive(Debug)]
enum Process {
    /// Its number means nobody else while this is open.
    Pinned(OwnedFd),
    /// It has ended.
    Gone,
    /// The system has no descriptors of processes, or no number for this one.
    Unpinned,
}

impl Peer {
    /// Asks the kernel about the peer of a connection that was accepted. To be called right after `accept`.
    ///
    /// Since Linux 6.5 the process that has connected is what is held. Before, it is whoever has its number now. That leaves
    /// a number no time to be used again, unless nobody accepted when it connected: on a listener that the service manager
    /// kept while we were away, the process may have ended since, its connection left to somebody, and its number given to
    /// a process of another unit, whose unit is then told for it. User and groups are those of who connected in any case.
    /// It cannot be found out here: no kernel tells since when a connection waits, and `ProtectProc=invisible` hides from
    /// us when other processes began and whose they are. The README tells it where units are let in.
    ///
    /// # Errors
    /// When the kernel does not answer, or descriptors have run out.
    pub fn of(stream: &UnixStream) -> io::Result<Self> {
        let credentials = stream.peer_cred()?;
        let pid = credentials.pid().filter(|pid| *pid > 0);
        let (uid, gid) = (credentials.uid(), credentials.gid());
        let mut groups = raw::peer_groups(stream.as_fd())?;
        groups.insert(0, gid);
        Ok(Self { uid, gid, groups, pid, process: Process::of(stream, pid)? })
    }

    /// A descriptor of the process, when there is one.
    pub fn pidfd(&self) -> Option<BorrowedFd<'_>> {
        match &self.process {
            Process::Pinned(fd) => Some(fd.as_fd()),
            Process::Gone | Process::Unpinned => None,
        }
    }

    /// Whether the process that connected is known to have ended: whoever holds its socket now is somebody else.
    pub fn has_gone(&self) -> bool {
        match &self.process {
            Process::Pinned(fd) => has_ended(fd.as_fd()),
            Process::Gone => true,
            Process::Unpinned => false,
        }
    }
}

/// `uid 1000, gid 100, pid 4711`.
impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "uid {}, gid {}", self.uid, self.gid)?;
        self.pid.map_or(Ok(()), |pid| write!(f, ", pid {pid}"))
    }
}

impl Process {
    fn of(stream: &UnixStream, pid: Option<i32>) -> io::Result<Self> {
        match getsockopt(stream, PeerPidfd) {
            Ok(fd) => Ok(Self::Pinned(fd)),
            // Which of the two it is depends on the kernel.
            Err(Errno::ESRCH | Errno::EINVAL) => Ok(Self::Gone),
            // An older kernel, or a process that has no number here.
            Err(Errno::ENOPROTOOPT | Errno::ENODATA) => Self::by_number(pid),
            Err(errno) => Err(errno.into()),
        }
    }

    /// For kernels before 6.5.
    fn by_number(pid: Option<i32>) -> io::Result<Self> {
        let Some(pid) = pid else { return Ok(Self::Unpinned) };
        match raw::pidfd_open(pid) {
            Ok(fd) => Ok(Self::Pinned(fd)),
            Err(error) => match error.raw_os_error().map(Errno::from_raw) {
                Some(Errno::ESRCH) => Ok(Self::Gone),
                // A kernel before 5.3, or a filter that keeps it from us.
                Some(Errno::ENOSYS | Errno::EPERM) => Ok(Self::Unpinned),
                _ => Err(error),
            },
        }
    }
}

/// A pidfd is readable from the end of its process on.
fn has_ended(pidfd: BorrowedFd<'_>) -> bool {
    let mut look = [PollFd::new(pidfd, PollFlags::POLLIN)];
    // A look that fails shows no living process.
    !matches!(poll(&mut look, PollTimeout::ZERO), Ok(0))
}

/// A user or a group, as the configuration has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Account {
    /// By its number.
    Id(u32),
    /// By its name, which the system is asked for each time: its directory may not be up yet at boot.
    Name(String),
}

/// Whom the configuration lets in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Allow {
    /// Processes of this user.
    User(Account),
    /// Processes that have this group, as their own or as one more.
    Group(Account),
    /// Processes of this systemd unit, by its full name.
    Unit(String),
}

impl Allow {
    /// Whether it lets a peer in by the number of its user or of one of its groups. A name lets nobody in before it was
    /// [resolved](Allow::resolved); a unit is not decided here.
    pub fn fits(&self, uid: u32, groups: &[u32]) -> bool {
        match self {
            Self::User(Account::Id(allowed)) => *allowed == uid && uid != UNMAPPED,
            Self::Group(Account::Id(allowed)) => groups.contains(allowed) && *allowed != UNMAPPED,
            Self::User(Account::Name(_)) | Self::Group(Account::Name(_)) | Self::Unit(_) => false,
        }
    }

    /// Whether it says a name, whose number the system knows.
    pub fn is_by_name(&self) -> bool {
        matches!(self, Self::User(Account::Name(_)) | Self::Group(Account::Name(_)))
    }

    /// The same by number, as the system knows it now. May block for as long as the system's directory takes.
    #[must_use]
    pub fn resolved(&self) -> Self {
        match self {
            Self::User(user) => Self::User(user.resolved(user_id)),
            Self::Group(group) => Self::Group(group.resolved(group_id)),
            Self::Unit(_) => self.clone(),
        }
    }
}

impl Account {
    fn resolved(&self, look_up: impl Fn(&str) -> Option<u32>) -> Self {
        match self {
            Self::Name(name) => look_up(name).map_or_else(|| self.clone(), Self::Id),
            Self::Id(_) => self.clone(),
        }
    }
}

/// The name of a user; none when it has none. May block, as [`Allow::resolved`].
pub fn user_name(uid: u32) -> Option<String> {
    User::from_uid(uid.into()).ok().flatten().map(|user| user.name)
}

fn user_id(name: &str) -> Option<u32> {
    User::from_name(name).ok().flatten().map(|user| user.uid.as_raw())
}

fn group_id(name: &str) -> Option<u32> {
    Group::from_name(name).ok().flatten().map(|group| group.gid.as_raw())
}

#[cfg(test)]
mod tests;
