//! Stderr, which need not wait for whoever reads it.

use nix::{
    errno::Errno,
    fcntl::{OFlag, open},
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::{
        socket::{MsgFlags, send},
        stat::{Mode, SFlag, fstat},
    },
    unistd,
};
use std::{
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
};

/// Whether a line may wait for its reader.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Patience {
    None,
    Endless,
}

/// Where lines go.
pub(super) struct Stderr {
    fd: OwnedFd,
    way: Way,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    /// A socket, say one of the journal: each call says that it does not wait.
    Socket,
    /// A file, which has no reader to wait for; or a pipe, a terminal, opened once more: what is shared with other
    /// processes stays as they know it, and ours does not wait.
    Direct,
    /// What is not ours to open: a write may wait.
    Waits,
}

impl Stderr {
    /// Writes to what `fd` is open for.
    ///
    /// # Errors
    /// When it is not open, or no descriptor is left.
    pub(super) fn of(fd: BorrowedFd<'_>) -> io::Result<Self> {
        let kind = SFlag::from_bits_truncate(fstat(fd)?.st_mode) & SFlag::S_IFMT;
        let way = match kind {
            SFlag::S_IFSOCK => Way::Socket,
            SFlag::S_IFREG => Way::Direct,
            _ => {
                let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
                let how = OFlag::O_WRONLY | OFlag::O_NONBLOCK | OFlag::O_NOCTTY | OFlag::O_CLOEXEC;
                match open(path.as_str(), how, Mode::empty()) {
                    Ok(fd) => return Ok(Self { fd, way: Way::Direct }),
                    Err(_) => Way::Waits,
                }
            }
        };
        Ok(Self { fd: fd.try_clone_to_owned()?, way })
    }

    /// Writes on; whether the line is done with. It is, too, when nobody will ever take it: that is not our business.
    pub(super) fn write(&self, line: &mut Vec<u8>, patience: Patience) -> bool {
        while !line.is_empty() {
            match patience {
                Patience::Endless => self.wait(),
                Patience::None if self.way == Way::Waits => return false,
                Patience::None => {}
            }
            let written = match self.way {
                Way::Socket => send(self.fd.as_raw_fd(), line, MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL),
                Way::Direct | Way::Waits => unistd::write(&self.fd, line),
            };
            match written {
                Ok(size) => drop(line.drain(..size)),
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) if patience == Patience::None => return false,
                Err(Errno::EAGAIN) => {}
                Err(_) => return true,
            }
        }
        true
    }

    /// Waits until there is room, or an error to be had.
    fn wait(&self) {
        let _ = poll(&mut [PollFd::new(self.fd.as_fd(), PollFlags::POLLOUT)], PollTimeout::NONE);
    }

    /// One that can only be written to with a wait.
    #[cfg(test)]
    pub(super) fn waiting(fd: OwnedFd) -> Self {
        Self { fd, way: Way::Waits }
    }
}
