//! A listening socket in a directory.

use super::{Dir, DirError, io, walk};
use crate::files::Root;
use nix::{
    errno::Errno,
    fcntl::AtFlags,
    libc,
    sys::{
        socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket},
        stat::{FchmodatFlags, FileStat, Mode, SFlag, fchmod, fchmodat, fstat, fstatat},
    },
    unistd::{Gid, fchownat, getegid, geteuid},
};
use std::{
    fs, io as std_io,
    os::{
        fd::AsRawFd as _,
        unix::{
            fs::{FileTypeExt as _, MetadataExt as _},
            net::UnixListener,
        },
    },
    path::Path,
};

/// To go through a directory without listing it, for group and others.
const PASS: u32 = 0o011;
/// The user that we run as and a group.
const MODE: u32 = 0o660;

/// The name that a socket of ours is bound to; then it gets its own, but the kernel goes on telling this one.
pub(crate) fn beside(name: &str) -> String {
    format!("{name}.new")
}

/// What tells the socket that has a name from those that had it before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SocketId {
    device: u64,
    inode: u64,
    /// When it was made: numbers of inodes are used again.
    made: (i64, i64),
}

impl SocketId {
    /// Of the socket that `path` leads to; none when there is no socket. That of a socket unit may have a link to it.
    ///
    /// # Errors
    /// When it cannot be told.
    pub fn at(path: &Path) -> std_io::Result<Option<Self>> {
        match fs::metadata(path) {
            Ok(found) if found.file_type().is_socket() => {
                let made = (found.mtime(), found.mtime_nsec());
                Ok(Some(Self { device: found.dev(), inode: found.ino(), made }))
            }
            Ok(_) => Ok(None),
            Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENOTDIR | libc::ELOOP)) => Ok(None),
            Err(error) => Err(error),
        }
    }
}

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

    /// Listens on `name`, without blocking, for the user that we run as and a group (0660; the group that we run as unless another is
    /// given, of which that user must be a member). It is bound beside its name and renamed: at no moment is it there
    /// with other rights, and what a killed daemon left behind is replaced.
    ///
    /// # Errors
    /// When something that is no socket has the name, or the system refuses.
    pub fn listen(&self, name: &str, group: Option<u32>) -> Result<UnixListener, DirError> {
        let beside = beside(name);
        for name in [name, &beside] {
            match fstatat(&self.fd, name, AtFlags::AT_SYMLINK_NOFOLLOW) {
                Ok(stat) if is_socket(&stat) => {}
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
        listener.set_nonblocking(true).map_err(|error| DirError::refused("listen on", &path, &error))?;
        if let Some(gid) = group {
            self.give_socket(&beside, gid)?;
        }
        self.open_to_group(&beside)?;
        self.rename(&beside, name)?;
        Ok(listener)
    }

    /// Whether the socket `name` was made by the user that we run as.
    ///
    /// # Errors
    /// When it cannot be told.
    pub fn has_own_socket(&self, name: &str) -> Result<bool, DirError> {
        match fstatat(&self.fd, name, AtFlags::AT_SYMLINK_NOFOLLOW) {
            Ok(stat) => Ok(is_socket(&stat) && stat.st_uid == geteuid().as_raw()),
            Err(Errno::ENOENT) => Ok(false),
            Err(errno) => Err(self.error("look at", name, errno)),
        }
    }

    /// Gives a socket of ours the group and the mode that [`Dir::listen`] would give a new one. A call that would change
    /// nothing is not made.
    ///
    /// # Errors
    /// When the system refuses.
    pub fn open_socket_to(&self, name: &str, group: Option<u32>) -> Result<(), DirError> {
        let look = |errno| self.error("look at", name, errno);
        let stat = fstatat(&self.fd, name, AtFlags::AT_SYMLINK_NOFOLLOW).map_err(look)?;
        let own = fstat(&self.fd).map_err(look)?;
        // A directory with the set-group-id bit gives its group to what is made in it.
        let inherited = if own.st_mode & Mode::S_ISGID.bits() == 0 { getegid().as_raw() } else { own.st_gid };
        let gid = group.unwrap_or(inherited);
        if stat.st_gid != gid {
            self.give_socket(name, gid)?;
        }
        if stat.st_mode & 0o777 != MODE { self.open_to_group(name) } else { Ok(()) }
    }

    /// Removes a socket of ours on which nobody listens any more; anything else stays. Whether it was there.
    ///
    /// # Errors
    /// When the system refuses.
    pub fn remove_dead_socket(&self, name: &str) -> Result<bool, DirError> {
        let dead = self.has_own_socket(name)? && !self.is_served(name);
        if dead {
            self.remove(name)?;
        }
        Ok(dead)
    }

    fn give_socket(&self, name: &str, gid: u32) -> Result<(), DirError> {
        let given = fchownat(&self.fd, name, None, Some(Gid::from_raw(gid)), AtFlags::AT_SYMLINK_NOFOLLOW);
        given.map_err(|errno| match errno {
            Errno::EPERM => DirError::Group { path: self.path.join(name), gid },
            errno => self.error("set the group of", name, errno),
        })
    }

    /// A link of that name would be followed, but nobody but root and we can make one here.
    fn open_to_group(&self, name: &str) -> Result<(), DirError> {
        fchmodat(&self.fd, name, Mode::from_bits_truncate(MODE), FchmodatFlags::FollowSymlink)
            .map_err(|errno| self.error("set the mode of", name, errno))
    }
}

fn is_socket(stat: &FileStat) -> bool {
    stat.st_mode & SFlag::S_IFMT.bits() == SFlag::S_IFSOCK.bits()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn rights_that_are_right_are_left_alone_and_others_put_right() {
        let host = tempfile::tempdir().unwrap();
        let dir = Dir::passable(&Root::new(host.path()), Path::new("/a")).unwrap();
        let _listener = dir.listen("a.sock", None).unwrap();
        let facts = || fs::symlink_metadata(dir.path().join("a.sock")).unwrap();
        let changed = || (facts().ctime(), facts().ctime_nsec());
        let before = (changed(), SocketId::at(&dir.path().join("a.sock")).unwrap());
        dir.open_socket_to("a.sock", None).unwrap();
        assert_eq!(changed(), before.0);
        fs::set_permissions(dir.path().join("a.sock"), std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
        dir.open_socket_to("a.sock", None).unwrap();
        assert_eq!(facts().mode() & 0o777, MODE);
        assert_eq!(SocketId::at(&dir.path().join("a.sock")).unwrap(), before.1, "it is the same socket");
    }

    #[test]
    fn a_link_is_the_socket_that_it_leads_to() {
        let host = tempfile::tempdir().unwrap();
        let [path, link] = ["a.sock", "link"].map(|name| host.path().join(name));
        std::os::unix::fs::symlink(&path, &link).unwrap();
        assert_eq!(SocketId::at(&link).unwrap(), None, "it leads nowhere");
        let _listener = UnixListener::bind(&path).unwrap();
        let at = |path| SocketId::at(path).unwrap().unwrap();
        assert_eq!(at(&link), at(&path));
        fs::remove_file(&path).unwrap();
        std::os::unix::fs::symlink(&link, &path).unwrap();
        assert_eq!(SocketId::at(&path).unwrap(), None, "nor does a circle");
    }

    #[test]
    fn a_socket_that_lives_and_what_is_no_socket_stay() {
        let host = tempfile::tempdir().unwrap();
        let dir = Dir::passable(&Root::new(host.path()), Path::new("/a")).unwrap();
        let listener = dir.listen("a.sock", None).unwrap();
        fs::write(dir.path().join("file"), "").unwrap();
        assert_eq!(["a.sock", "file", "none"].map(|name| dir.remove_dead_socket(name).unwrap()), [false; 3]);
        drop(listener);
        assert!(dir.remove_dead_socket("a.sock").unwrap());
        assert_eq!(dir.names().unwrap(), ["file"]);
    }

    #[test]
    fn who_may_not_write_is_told_what_lets_the_service() {
        // Of a directory that is not ours, the first is denied; when that is put right, the second remains.
        for errno in [Errno::EACCES, Errno::EROFS] {
            let said = io("create", Path::new("/run/secrets"), errno).to_string();
            assert!(said.contains("ReadWritePaths= with systemctl edit we-agent"), "{said}");
        }
    }
}
