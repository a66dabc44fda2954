//! A listening socket in a directory.

use super::{Dir, DirError, io};
use nix::{
    errno::Errno,
    fcntl::AtFlags,
    sys::stat::{FchmodatFlags, Mode, SFlag, fchmodat, fstatat},
    unistd::{Gid, fchownat},
};
use std::os::unix::net::UnixListener;

impl Dir {
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
