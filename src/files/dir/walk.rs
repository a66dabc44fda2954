//! The way to a directory: nobody but root and we-agent may be able to change where it leads.

use super::{Dir, DirError, HOLD, Root, io};
use nix::{
    errno::Errno,
    fcntl::{AT_FDCWD, AtFlags, OFlag, openat, readlinkat},
    sys::stat::{FileStat, Mode, fstat, fstatat, mkdirat},
    unistd::{Gid, Uid, fsync, getegid, geteuid},
};
use std::{
    ffi::OsString,
    path::{Component, Path},
};

/// As many links in one path as the kernel would follow.
const MAX_LINKS: usize = 40;
/// Opens a directory to look things up in it: needs no right to read it.
const LOOK: OFlag = OFlag::O_PATH.union(OFlag::O_DIRECTORY).union(OFlag::O_NOFOLLOW).union(OFlag::O_CLOEXEC);

/// Goes down from the root one name at a time. The root itself was chosen by whoever started us; below it, each
/// directory and each link must be root's or ours, and not for others to write to: who could rename a parent could
/// put another directory in its place. The last name may not be a link.
pub(super) fn walk(root: &Root, path: &Path, make: bool) -> Result<Dir, DirError> {
    let full = root.path(path);
    let top = openat(AT_FDCWD, root.dir(), LOOK.difference(OFlag::O_NOFOLLOW), Mode::empty());
    let top = top.map_err(|errno| io("open", root.dir(), errno))?;
    let mut trail = vec![Dir { fd: top, path: root.dir().to_owned() }];
    let mut left: Vec<OsString> = names(full.strip_prefix(root.dir()).unwrap_or(&full));
    let mut links = 0;
    while let Some(name) = left.pop() {
        let Some(at) = trail.last() else { break };
        let here = at.path.join(&name);
        if name == ".." {
            trail.truncate((trail.len() - 1).max(1));
            continue;
        }
        match openat(&at.fd, name.as_os_str(), LOOK, Mode::empty()) {
            Ok(fd) => {
                let stat = fstat(&fd).map_err(|e| io("look at", &here, e))?;
                // Another's directory may be written to on request, but never lead to ours.
                check(&stat, &here, left.is_empty() && !make)?;
                trail.push(Dir { fd, path: here });
            }
            Err(Errno::ENOENT) if make => {
                let mode = if left.is_empty() { 0o700 } else { 0o755 };
                match mkdirat(&at.fd, name.as_os_str(), Mode::from_bits_truncate(mode)) {
                    Ok(()) | Err(Errno::EEXIST) => {}
                    Err(errno) => return Err(io("create", &here, errno)),
                }
                // A parent that we may not read cannot be synced; the entry is then as durable as its file system.
                if let Ok(parent) = openat(&at.fd, ".", HOLD, Mode::empty()) {
                    fsync(&parent).map_err(|e| io("sync", &at.path, e))?;
                }
                left.push(name);
            }
            Err(Errno::ENOTDIR | Errno::ELOOP) => {
                let target = readlinkat(&at.fd, name.as_os_str()).map_err(|_| DirError::InTheWay(here.clone()))?;
                let stat = fstatat(&at.fd, name.as_os_str(), AtFlags::AT_SYMLINK_NOFOLLOW);
                let stat = stat.map_err(|e| io("look at", &here, e))?;
                links += 1;
                if left.is_empty() || links > MAX_LINKS || !ours(stat.st_uid) {
                    let why = format!("a link to {}; configure the real path", Path::new(&target).display());
                    return Err(DirError::Unsafe { path: here, why });
                }
                if Path::new(&target).is_absolute() {
                    trail.truncate(1);
                }
                left.extend(names(Path::new(&target)));
            }
            Err(errno) => return Err(io("open", &here, errno)),
        }
    }
    let Some(last) = trail.pop() else { return Err(io("open", &full, Errno::ENOENT)) };
    let fd = openat(&last.fd, ".", HOLD, Mode::empty()).map_err(|e| io("open", &last.path, e))?;
    Ok(Dir { fd, path: last.path })
}

/// The names of a path, the last one first.
fn names(path: &Path) -> Vec<OsString> {
    let name = |part: Component<'_>| {
        matches!(part, Component::Normal(_) | Component::ParentDir).then(|| part.as_os_str().to_owned())
    };
    path.components().rev().filter_map(name).collect()
}

fn ours(uid: u32) -> bool {
    uid == 0 || Uid::from_raw(uid) == geteuid()
}

/// Whether nobody but root and we can rename what is in this directory.
fn check(stat: &FileStat, path: &Path, any_owner: bool) -> Result<(), DirError> {
    let (mode, sticky) = (stat.st_mode & 0o777, stat.st_mode & 0o1000 != 0);
    let our_group = stat.st_gid == 0 || Gid::from_raw(stat.st_gid) == getegid();
    let why = if !any_owner && !ours(stat.st_uid) {
        format!("it belongs to user {}; give it to root or to the user that we-agent runs as", stat.st_uid)
    } else if !sticky && mode & 0o002 != 0 {
        format!("everybody may write to it (mode {mode:04o}); chmod o-w")
    } else if !sticky && mode & 0o020 != 0 && !our_group && !any_owner {
        format!("group {} may write to it (mode {mode:04o}); chmod g-w", stat.st_gid)
    } else {
        return Ok(());
    };
    Err(DirError::Unsafe { path: path.to_owned(), why })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::super::{Dir, DirError};
    use crate::files::{Access, Root};
    use std::{
        fs,
        os::unix::fs::{PermissionsExt as _, symlink},
        path::Path,
    };

    fn mode(path: &Path) -> u32 {
        fs::metadata(path).unwrap().permissions().mode() & 0o777
    }

    #[test]
    fn missing_parents_are_made_and_the_last_is_private() {
        let host = tempfile::tempdir().unwrap();
        let root = Root::new(host.path());
        let dir = Dir::create(&root, Path::new("/var/lib/we-agent/a"), Access::OWNER).unwrap();
        assert_eq!(dir.path(), host.path().join("var/lib/we-agent/a"));
        assert_eq!((mode(&host.path().join("var")), mode(dir.path())), (0o755, 0o700));

        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
        Dir::create(&root, &root.name(dir.path()).unwrap(), Access::OWNER).unwrap();
        assert_eq!(mode(dir.path()), 0o700, "a mode that drifted is put right");
        Dir::open(&root, Path::new("/etc/certs")).unwrap_err();
        assert!(!host.path().join("etc").exists(), "another's directory is not made");
    }

    #[test]
    fn a_path_that_others_can_change_is_refused() {
        let host = tempfile::tempdir().unwrap();
        let root = Root::new(host.path());
        fs::create_dir_all(host.path().join("run/open")).unwrap();
        fs::set_permissions(host.path().join("run/open"), fs::Permissions::from_mode(0o777)).unwrap();
        let error = Dir::create(&root, Path::new("/run/open/a"), Access::OWNER).unwrap_err();
        assert_eq!(error.kind(), "unsafe_path");
        assert!(error.to_string().contains("run/open is not safe: everybody may write to it (mode 0777)"), "{error}");
        assert!(!host.path().join("run/open/a").exists());
        fs::set_permissions(host.path().join("run/open"), fs::Permissions::from_mode(0o1777)).unwrap();
        Dir::create(&root, Path::new("/run/open/a"), Access::OWNER).unwrap();
    }

    #[test]
    fn links_lead_on_below_the_root_and_never_to_the_directory_itself() {
        let host = tempfile::tempdir().unwrap();
        let root = Root::new(host.path());
        fs::create_dir_all(host.path().join("data/lib")).unwrap();
        fs::create_dir(host.path().join("var")).unwrap();
        symlink("/data/lib", host.path().join("var/lib")).unwrap(); // absolute: seen from the root
        symlink("../../../../data", host.path().join("var/up")).unwrap(); // cannot leave the root
        for path in ["/var/lib/a", "/var/up/lib/a", "/var/../var/lib/./a"] {
            let dir = Dir::create(&root, Path::new(path), Access::OWNER).unwrap();
            assert_eq!(dir.path(), host.path().join("data/lib/a"), "{path}");
        }
        let error = Dir::create(&root, Path::new("/var/lib"), Access::OWNER).unwrap_err();
        assert!(error.to_string().ends_with("a link to /data/lib; configure the real path"), "{error}");
        symlink("round", host.path().join("round")).unwrap();
        assert!(matches!(Dir::open(&root, Path::new("/round/a")), Err(DirError::Unsafe { .. })));
        fs::write(host.path().join("file"), "").unwrap();
        assert!(matches!(Dir::create(&root, Path::new("/file/a"), Access::OWNER), Err(DirError::InTheWay(_))));
    }

    #[test]
    fn files_are_private_new_and_never_reached_through_links() {
        let host = tempfile::tempdir().unwrap();
        let dir = Dir::create(&Root::new(host.path()), Path::new("/a"), Access::OWNER).unwrap();
        dir.write("key", b"secret", Access::OWNER).unwrap();
        assert_eq!(mode(&dir.path().join("key")), 0o600);
        assert!(dir.granted("key", Access::OWNER) && !dir.granted("key", Access::group(0)));
        assert_eq!(dir.read("key", 6).unwrap().unwrap().as_slice(), b"secret");
        assert!(matches!(dir.read("key", 5), Err(DirError::TooLong { limit: 5, .. })));
        assert!(dir.read("none", 5).unwrap().is_none());
        dir.write("key", b"again", Access::OWNER).unwrap_err();

        fs::write(host.path().join("outside"), "untouched").unwrap();
        symlink(host.path().join("outside"), dir.path().join("link")).unwrap();
        dir.write("link", b"x", Access::OWNER).unwrap_err();
        assert!(matches!(dir.read("link", 99), Err(DirError::InTheWay(_))));
        dir.remove("link").unwrap();
        assert_eq!(fs::read_to_string(host.path().join("outside")).unwrap(), "untouched");
        assert_eq!(dir.names().unwrap(), ["key"]);

        let inner = dir.make("inner").unwrap();
        inner.write("file", b"", Access::OWNER).unwrap();
        dir.read("inner", 5).unwrap_err();
        nix::unistd::mkfifo(&dir.path().join("pipe"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        assert!(matches!(dir.read("pipe", 5), Err(DirError::InTheWay(_))), "and it does not wait for a writer");
        dir.remove("pipe").unwrap();
        dir.remove("inner").unwrap();
        dir.remove("inner").unwrap(); // gone already
        assert_eq!(dir.names().unwrap(), ["key"]);
    }
}
