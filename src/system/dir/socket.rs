//! A listening socket in a directory.

use super::{Dir, DirError, Root, io, walk};
use nix::{
    errno::Errno,
    fcntl::AtFlags,
    sys::{
        socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket},
        stat::{FchmodatFlags, Mode, SFlag, fchmod, fchmodat, fstat, fstatat},
    },
    unistd::{Gid, fchownat},
};
use std::{
    os::{fd::AsRawFd as _, unix::net::UnixListener},
    path::Path,
};

/// To go through a directory without listing it, for group and others.
const PASS: u32 = 0o011;

impl Dir {
    /// Opens a directory of ours, made if need be, and lets everybody pass through it to a name that they know; what else
    /// its mode allows is left as it is. For a directory of links, sockets and directories that have rights of their
    /// own: a socket in it may be for another group than the files.
    ///
    /// # Errors
    /// As [`Dir::create`].
    pub fn passable(root: &Root, path: &Path) -> Result<Self, DirError> {
        let dir = walk::walk(root, path, true)?;
        let failed = |errno| io("set the mode of", &dir.path, errno);
        let mode = fstat(&dir.fd).map_err(failed)?.st_mode & 0o777;
        if mode & PASS != PASS {
            fchmod(&dir.fd, Mode::from_bits_truncate(mode | PASS)).map_err(failed)?;
        }
        Ok(dir)
    }

    /// Opens a directory for a socket that it shares with others, and leaves it as it is; where there is none, makes it,
    /// and lets everybody pass through it.
    ///
    /// # Errors
    /// As [`Dir::create`].
    pub fn shared(root: &Root, path: &Path) -> Result<Self, DirError> {
        if walk::walk(root, path, false).is_ok() { walk::walk(root, path, true) } else { Self::passable(root, path) }
    }

    /// Whether a program listens on `name`: a socket whose owner is gone refuses.
    pub fn is_served(&self, name: &str) -> bool {
        let path = self.path.join(name);
        let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
        let asked = socket(AddressFamily::Unix, SockType::Stream, flags, None)
            .and_then(|fd| connect(fd.as_raw_fd(), &UnixAddr::new(&path)?));
        // A queue that is full (EAGAIN), or one for somebody else (EACCES), has an owner as well.
        !matches!(asked, Err(Errno::ECONNREFUSED | Errno::ENOENT | Errno::ENOTSOCK | Errno::ENAMETOOLONG))
    }

    /// Listens on `name`, for the user that we run as and a group (0660; the group that we run as unless another is
    /// given, of which that user must be a member). It is bound beside its name and renamed: at no moment is it there
    /// with other rights, and what a killed daemon left behind is replaced.
    ///
    /// # Errors
    /// When something that is no socket has the name, or the system refuses.
    pub fn listen(&self, name: &str, group: Option<u32>) -> Result<UnixListener, DirError> {
        let beside = format!("{name}.new");
        for name in [name, &beside] {
            match fstatat(&self.fd, name, AtFlags::AT_SYMLINK_NOFOLLOW) {
                Ok(stat) if stat.st_mode & SFlag::S_IFMT.bits() == SFlag::S_IFSOCK.bits() => {}
                Ok(_) => return Err(DirError::InTheWay(self.path.join(name))),
                Err(Errno::ENOENT) => {}
                Err(errno) => return Err(self.error("look at", name, errno)),
            }
        }
        self.remove(&beside)?;
        // By its path, which nobody but root and we can change (that is what makes a Dir); the kernel takes no other.
        let path = self.path.join(&beside);
        let listener = UnixListener::bind(&path).map_err(|error| match error.raw_os_error() {
            Some(errno) => io("listen on", &path, Errno::from_raw(errno)),
            None => DirError::TooLong { path: path.clone(), limit: 107 },
        })?;
        if let Some(gid) = group {
            fchownat(&self.fd, beside.as_str(), None, Some(Gid::from_raw(gid)), AtFlags::AT_SYMLINK_NOFOLLOW).map_err(
                |errno| match errno {
                    Errno::EPERM => DirError::Group { path: path.clone(), gid },
                    errno => self.error("set the group of", &beside, errno),
                },
            )?;
        }
        let mode = Mode::from_bits_truncate(0o660);
        fchmodat(&self.fd, beside.as_str(), mode, FchmodatFlags::FollowSymlink)
            .map_err(|errno| self.error("set the mode of", &beside, errno))?;
        self.rename(&beside, name)?;
        Ok(listener)
    }
}
