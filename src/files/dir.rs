//! A directory held open. Everything is done relative to its descriptor and nothing follows a link, so a path that is
//! swapped under us leads nowhere.

mod plain;
mod socket;
mod walk;

pub use plain::Removal;
pub use socket::SocketId;
pub(crate) use socket::beside;

use super::{Access, Root};
use nix::{
    errno::Errno,
    fcntl::{AtFlags, OFlag, openat, readlinkat, renameat},
    sys::stat::{Mode, SFlag, fstat, fstatat, mkdirat},
    unistd::{UnlinkatFlags, fsync, symlinkat, unlinkat},
};
use std::{
    ffi::OsString,
    fs::File,
    io::{Read as _, Write as _},
    os::fd::OwnedFd,
    path::{Path, PathBuf},
};
use zeroize::Zeroizing;

/// Opens a directory to list and to sync it.
const HOLD: OFlag = OFlag::O_RDONLY.union(OFlag::O_DIRECTORY).union(OFlag::O_NOFOLLOW).union(OFlag::O_CLOEXEC);

/// Why something could not be done in a directory.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DirError {
    /// The system refused.
    #[error("cannot {doing} {}: {}{}", .path.display(), .errno.desc().to_lowercase(), remedy(*.errno))]
    Io {
        /// The verb.
        doing: &'static str,
        /// What it was done to.
        path: PathBuf,
        /// The system's answer.
        errno: Errno,
    },
    /// Somebody else could change where this path leads.
    #[error("{} is not safe: {why}", .path.display())]
    Unsafe {
        /// The offending directory or link.
        path: PathBuf,
        /// What is wrong with it, and the fix.
        why: String,
    },
    /// Something else has the name that we need.
    #[error("{} is in the way: it was not made by we-agent; move it away", .0.display())]
    InTheWay(PathBuf),
    /// A link, a pipe, or a file that has a second name: what it is cannot be told from its name.
    #[error("{} is a link, or has a second name (ln), so it is left alone: put the file or directory itself there", .0.display())]
    NotPlain(PathBuf),
    /// Only members of a group may give a file to it.
    #[error(
        "cannot give {} to group {gid}: make the user that we-agent runs as a member of that group; under systemd, add \
         SupplementaryGroups={gid} and SystemCallFilter=@chown with systemctl edit we-agent",
        .path.display()
    )]
    Group {
        /// The file or directory.
        path: PathBuf,
        /// The group's number.
        gid: u32,
    },
    /// The name that was configured belongs to nobody.
    #[error("this host knows no {kind} {name}: create it, or configure another")]
    Nobody {
        /// `user` or `group`.
        kind: &'static str,
        /// The name.
        name: String,
    },
    /// It is not known whether there is such a name.
    #[error("cannot look up the {kind} {name}: {}; see whether the name service works (getent {kind} {name})", .errno.desc().to_lowercase())]
    NameService {
        /// `user` or `group`.
        kind: &'static str,
        /// The name.
        name: String,
        /// The service's answer.
        errno: Errno,
    },
    /// Longer than the reader's limit.
    #[error("{} is longer than {limit} bytes", .path.display())]
    TooLong {
        /// The file.
        path: PathBuf,
        /// The limit in bytes.
        limit: usize,
    },
}

fn remedy(errno: Errno) -> &'static str {
    match errno {
        Errno::ENOSPC | Errno::EDQUOT => ": free some space there",
        Errno::EROFS => {
            ": under systemd, create the directory first and let the service write there (ReadWritePaths= with systemctl edit \
             we-agent); else mount it writable, or configure another directory"
        }
        Errno::EACCES | Errno::EPERM => {
            ": let the user that we-agent runs as write there, and under systemd the service, too (ReadWritePaths= with \
             systemctl edit we-agent)"
        }
        Errno::ENOENT => ": create it",
        _ => "",
    }
}

impl DirError {
    /// The system refused.
    pub fn refused(doing: &'static str, path: &Path, error: &std::io::Error) -> Self {
        io(doing, path, error.raw_os_error().map_or(Errno::EIO, Errno::from_raw))
    }

    /// A stable word for metrics.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Io { errno: Errno::ENOSPC | Errno::EDQUOT, .. } => "disk_full",
            Self::Io { errno: Errno::EROFS, .. } => "read_only",
            Self::Io { errno: Errno::EACCES | Errno::EPERM, .. } => "denied",
            Self::Io { errno: Errno::ENOENT, .. } => "missing",
            Self::Group { .. } => "denied",
            Self::Nobody { .. } => "no_such_account",
            Self::NameService { .. } => "name_service",
            Self::Io { .. } | Self::TooLong { .. } => "disk",
            Self::Unsafe { .. } | Self::NotPlain(_) => "unsafe_path",
            Self::InTheWay(_) => "in_the_way",
        }
    }
}

/// A directory that was reached over safe parents and is held open.
#[derive(Debug)]
pub struct Dir {
    fd: OwnedFd,
    path: PathBuf,
}

impl Dir {
    /// Opens the directory, made if need be (missing parents with 0755), and gives it `access`.
    ///
    /// # Errors
    /// When it is a link, when others could redirect the path (see [`DirError::Unsafe`]), or when the system refuses.
    pub fn create(root: &Root, path: &Path, access: Access) -> Result<Self, DirError> {
        let dir = walk::walk(root, path, true)?;
        access.grant(&dir.fd, access.dir(), &dir.path)?;
        Ok(dir)
    }

    /// Opens a directory that belongs to somebody else and leaves it as it is.
    ///
    /// # Errors
    /// As [`Dir::create`], and when it does not exist.
    pub fn open(root: &Root, path: &Path) -> Result<Self, DirError> {
        walk::walk(root, path, false)
    }

    /// Opens a directory and leaves it as it is; where there is none, makes it as [`Dir::create`] does.
    ///
    /// # Errors
    /// As [`Dir::create`].
    pub fn open_or_create(root: &Root, path: &Path, access: Access) -> Result<Self, DirError> {
        match Self::open(root, path) {
            Err(DirError::Io { errno: Errno::ENOENT, .. }) => Self::create(root, path, access),
            opened => opened,
        }
    }

    /// Where it was found.
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn error(&self, doing: &'static str, name: &str, errno: Errno) -> DirError {
        io(doing, &if name.is_empty() { self.path.clone() } else { self.path.join(name) }, errno)
    }

    /// Every name in it, sorted. Names that are not UTF-8 are not ours and left out.
    ///
    /// # Errors
    /// When it cannot be listed.
    pub fn names(&self) -> Result<Vec<String>, DirError> {
        let list = |errno| self.error("list", "", errno);
        let mut dir = nix::dir::Dir::openat(&self.fd, ".", HOLD, Mode::empty()).map_err(list)?;
        let mut names = Vec::new();
        for entry in dir.iter() {
            match entry.map_err(list)?.file_name().to_str() {
                Ok("." | "..") | Err(_) => {}
                Ok(name) => names.push(name.to_owned()),
            }
        }
        names.sort();
        Ok(names)
    }

    /// Makes a new file with this content and syncs it. Its mode is 0600 before the first byte is in it.
    ///
    /// # Errors
    /// When the name is taken or the system refuses.
    pub fn write(&self, name: &str, content: &[u8], access: Access) -> Result<(), DirError> {
        let flags = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let fd = openat(&self.fd, name, flags, Access::OWNER.file()).map_err(|e| self.error("create", name, e))?;
        access.grant(&fd, access.file(), &self.path.join(name))?;
        let mut file = File::from(fd);
        let written = file.write_all(content).and_then(|()| file.sync_all());
        written.map_err(|e| self.error("write", name, e.raw_os_error().map_or(Errno::EIO, Errno::from_raw)))
    }

    /// Reads a whole file of at most `limit` bytes; none when there is no such name. The buffer is wiped when dropped.
    ///
    /// # Errors
    /// When it is no regular file, is too long, or the system refuses.
    pub fn read(&self, name: &str, limit: usize) -> Result<Option<Zeroizing<Vec<u8>>>, DirError> {
        // A pipe of that name must not block us.
        let flags = OFlag::O_RDONLY | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
        let fd = match openat(&self.fd, name, flags, Mode::empty()) {
            Ok(fd) => fd,
            Err(Errno::ENOENT) => return Ok(None),
            Err(Errno::ELOOP | Errno::ENXIO) => return Err(DirError::InTheWay(self.path.join(name))),
            Err(errno) => return Err(self.error("open", name, errno)),
        };
        let stat = fstat(&fd).map_err(|e| self.error("look at", name, e))?;
        if stat.st_mode & SFlag::S_IFMT.bits() != SFlag::S_IFREG.bits() {
            return Err(DirError::InTheWay(self.path.join(name)));
        }
        // One buffer that is large enough: a growing one would leave copies behind.
        let mut content =
            Zeroizing::new(Vec::with_capacity(usize::try_from(stat.st_size).unwrap_or(limit).min(limit) + 64));
        let read = File::from(fd).take(limit as u64 + 1).read_to_end(&mut content);
        read.map_err(|e| self.error("read", name, e.raw_os_error().map_or(Errno::EIO, Errno::from_raw)))?;
        if content.len() > limit {
            return Err(DirError::TooLong { path: self.path.join(name), limit });
        }
        Ok(Some(content))
    }

    /// Whether the file has exactly the owner, group and mode of `access`.
    pub fn granted(&self, name: &str, access: Access) -> bool {
        fstatat(&self.fd, name, AtFlags::AT_SYMLINK_NOFOLLOW).is_ok_and(|stat| access.is_of(&stat))
    }

    /// Whether a rename onto this name replaces nothing but a plain file.
    pub fn is_free_or_file(&self, name: &str) -> bool {
        match fstatat(&self.fd, name, AtFlags::AT_SYMLINK_NOFOLLOW) {
            Ok(stat) => stat.st_mode & SFlag::S_IFMT.bits() == SFlag::S_IFREG.bits(),
            Err(errno) => errno == Errno::ENOENT,
        }
    }

    /// Makes a directory in it, mode 0700 until [`Dir::finish`].
    ///
    /// # Errors
    /// When the name is taken or the system refuses.
    pub fn make(&self, name: &str) -> Result<Self, DirError> {
        mkdirat(&self.fd, name, Access::OWNER.dir()).map_err(|e| self.error("create", name, e))?;
        self.enter(name)
    }

    /// Opens a directory in it; a link to one is refused.
    ///
    /// # Errors
    /// When it is no directory, or the system refuses.
    pub fn enter(&self, name: &str) -> Result<Self, DirError> {
        let fd = openat(&self.fd, name, HOLD, Mode::empty()).map_err(|e| self.error("open", name, e))?;
        Ok(Self { fd, path: self.path.join(name) })
    }

    /// Gives the directory itself its group and mode, and syncs the names in it.
    ///
    /// # Errors
    /// When the system refuses.
    pub fn finish(&self, access: Access) -> Result<(), DirError> {
        access.grant(&self.fd, access.dir(), &self.path)?;
        self.sync()
    }

    /// Makes the names in it durable.
    ///
    /// # Errors
    /// When the system refuses.
    pub fn sync(&self) -> Result<(), DirError> {
        fsync(&self.fd).map_err(|e| self.error("sync", "", e))
    }

    /// Renames within it; what had the new name is replaced at once.
    ///
    /// # Errors
    /// When the system refuses.
    pub fn rename(&self, from: &str, to: &str) -> Result<(), DirError> {
        renameat(&self.fd, from, &self.fd, to).map_err(|e| self.error("rename", from, e))
    }

    /// Makes a link.
    ///
    /// # Errors
    /// When the name is taken or the system refuses.
    pub fn link(&self, target: &str, name: &str) -> Result<(), DirError> {
        symlinkat(target, &self.fd, name).map_err(|e| self.error("link", name, e))
    }

    /// Where a link leads; none when there is no such name.
    ///
    /// # Errors
    /// When the name is no link, or the system refuses.
    pub fn target(&self, name: &str) -> Result<Option<OsString>, DirError> {
        match readlinkat(&self.fd, name) {
            Ok(target) => Ok(Some(target)),
            Err(Errno::ENOENT) => Ok(None),
            Err(Errno::EINVAL) => Err(DirError::InTheWay(self.path.join(name))),
            Err(errno) => Err(self.error("read the link", name, errno)),
        }
    }

    /// Removes a file, a link, or a directory of files.
    ///
    /// # Errors
    /// When the system refuses.
    pub fn remove(&self, name: &str) -> Result<(), DirError> {
        let failed = |errno| self.error("remove", name, errno);
        match unlinkat(&self.fd, name, UnlinkatFlags::NoRemoveDir) {
            Err(Errno::EISDIR) => {
                let inner = self.enter(name)?;
                for file in inner.names()? {
                    unlinkat(&inner.fd, file.as_str(), UnlinkatFlags::NoRemoveDir).map_err(failed)?;
                }
                unlinkat(&self.fd, name, UnlinkatFlags::RemoveDir).map_err(failed)
            }
            Err(Errno::ENOENT) | Ok(()) => Ok(()),
            Err(errno) => Err(failed(errno)),
        }
    }
}

fn io(doing: &'static str, path: &Path, errno: Errno) -> DirError {
    DirError::Io { doing, path: path.to_owned(), errno }
}
