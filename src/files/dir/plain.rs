//! Plain files that somebody else put into a directory. They are removed or given to a group, and a link, or a file with a
//! second name, is not: who could make one would choose what is really meant.

use super::{Dir, DirError};
use crate::files::{Access, Stamp};
use nix::{
    errno::Errno,
    fcntl::{AtFlags, OFlag, openat},
    sys::stat::{FileStat, Mode, SFlag, fstat, fstatat},
    unistd::{UnlinkatFlags, unlinkat},
};

/// What became of a file that was to be removed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Removal {
    /// It was removed.
    Removed,
    /// There was none.
    Gone,
    /// It is another one by now.
    Another,
    /// It is a link, or has a second name, so it would still be there.
    Linked,
}

fn is_plain(stat: &FileStat) -> bool {
    stat.st_mode & SFlag::S_IFMT.bits() == SFlag::S_IFREG.bits() && stat.st_nlink == 1
}

impl Dir {
    /// Removes a plain file if it still is the one that `stamp` was taken of, whoever may read it by now. (Between the look and the removal another one
    /// may get its name: nobody can be quicker than that by chance.)
    ///
    /// # Errors
    /// When the system refuses.
    pub fn remove_seen(&self, name: &str, stamp: Stamp) -> Result<Removal, DirError> {
        let failed = |errno| self.error("remove", name, errno);
        let stat = match fstatat(&self.fd, name, AtFlags::AT_SYMLINK_NOFOLLOW) {
            Ok(stat) => stat,
            Err(Errno::ENOENT) => return Ok(Removal::Gone),
            Err(errno) => return Err(failed(errno)),
        };
        if !is_plain(&stat) {
            return Ok(Removal::Linked);
        }
        if !stamp.is_content_of(&stat) {
            return Ok(Removal::Another);
        }
        unlinkat(&self.fd, name, UnlinkatFlags::NoRemoveDir).map_err(failed)?;
        self.sync()?;
        Ok(Removal::Removed)
    }

    /// Gives a plain file to us and `group`, mode 0640; whether there is one.
    ///
    /// # Errors
    /// When it is no plain file with one name, or the system refuses.
    pub fn give(&self, name: &str, group: u32) -> Result<bool, DirError> {
        // A pipe of that name must not block us. What was opened is what is given, whatever becomes of the name.
        let flags = OFlag::O_RDONLY | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
        let path = self.path.join(name);
        let fd = match openat(&self.fd, name, flags, Mode::empty()) {
            Ok(fd) => fd,
            Err(Errno::ENOENT) => return Ok(false),
            Err(Errno::ELOOP | Errno::ENXIO) => return Err(DirError::NotPlain(path)),
            Err(errno) => return Err(self.error("open", name, errno)),
        };
        if !is_plain(&fstat(&fd).map_err(|e| self.error("look at", name, e))?) {
            return Err(DirError::NotPlain(path));
        }
        let access = Access::shared(group);
        access.grant(&fd, access.file(), &path)?;
        Ok(true)
    }

    /// Gives the directory itself to us and `group`, mode 0750.
    ///
    /// # Errors
    /// When the system refuses.
    pub fn give_itself(&self, group: u32) -> Result<(), DirError> {
        let access = Access::shared(group);
        access.grant(&self.fd, access.dir(), &self.path)
    }

    /// Whether everybody may list it and look at what is in it.
    ///
    /// # Errors
    /// When the system refuses.
    pub fn is_open_to_all(&self) -> Result<bool, DirError> {
        let stat = fstat(&self.fd).map_err(|e| self.error("look at", "", e))?;
        Ok(stat.st_mode & 0o005 == 0o005)
    }
}
