//! Who may read what is written: as configured, by name, and as the system knows it, by number.

use super::DirError;
use crate::aside::Questions;
use nix::{
    errno::Errno,
    sys::stat::{FileStat, Mode, fchmod, fstat},
    unistd::{Gid, Group, Uid, User, fchown, getegid, geteuid},
};
use std::{
    collections::BTreeMap,
    os::fd::OwnedFd,
    path::Path,
    sync::{LazyLock, Mutex, PoisonError},
    time::Duration,
};
use tokio::time::timeout;

/// How long the name service may take.
const PATIENCE: Duration = Duration::from_secs(2);

/// What the name service is being asked.
static ASKED: LazyLock<Questions<Result<u32, DirError>>> = LazyLock::new(Questions::default);

/// What names meant when it answered last.
static KNOWN: Mutex<BTreeMap<String, u32>> = Mutex::new(BTreeMap::new());

/// Owner, group and mode of an output as they are configured. Names stay names until something is written: an account
/// may come later than we do, from a directory service say, or change its number.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Grant {
    /// Name or number of a user; none is the user that we-agent runs as. Only root may give files away.
    pub owner: Option<String>,
    /// Name or number of a group; none is the group that we-agent runs as.
    pub group: Option<String>,
    /// Permissions of a file.
    pub mode: u32,
}

impl Default for Grant {
    fn default() -> Self {
        Self { owner: None, group: None, mode: 0o600 }
    }
}

impl Grant {
    /// Asks the host's name service (NSS). May block on a directory service.
    ///
    /// # Errors
    /// When there is no such user or group, or the name service fails.
    pub fn resolve(&self) -> Result<Access, DirError> {
        let gid = match &self.group {
            Some(name) => Some(group_number(name)?),
            None => (self.mode & 0o060 != 0).then(|| getegid().as_raw()),
        };
        let uid = self.owner.as_ref().map(|name| number("user", name, uid_of)).transpose()?;
        Ok(Access { owner: uid, group: gid, mode: self.mode })
    }

    /// The same by number, so that [`Grant::resolve`] asks nobody. While the name service hangs, a name means what it meant
    /// last.
    ///
    /// # Errors
    /// As [`Grant::resolve`], and when there is no answer for a name that was never known.
    pub async fn by_number(&self) -> Result<Self, DirError> {
        let owner = match &self.owner {
            Some(name) => Some(number_aside("user", name, uid_of).await?.to_string()),
            None => None,
        };
        let group = match &self.group {
            Some(name) => Some(group_number_aside(name).await?.to_string()),
            None => None,
        };
        Ok(Self { owner, group, mode: self.mode })
    }
}

/// The number of a group by its name or number. May block on a directory service.
///
/// # Errors
/// When there is no such group, or the name service fails.
pub fn group_number(name: &str) -> Result<u32, DirError> {
    number("group", name, gid_of)
}

/// As [`group_number`], for the event loop: aside and bounded, and what the name meant last while the name service hangs.
///
/// # Errors
/// As [`group_number`].
pub async fn group_number_aside(name: &str) -> Result<u32, DirError> {
    number_aside("group", name, gid_of).await
}

fn uid_of(name: &str) -> Result<Option<u32>, Errno> {
    Ok(User::from_name(name)?.map(|user| user.uid.as_raw()))
}

fn gid_of(name: &str) -> Result<Option<u32>, Errno> {
    Ok(Group::from_name(name)?.map(|group| group.gid.as_raw()))
}

async fn number_aside(
    kind: &'static str,
    name: &str,
    look_up: impl FnOnce(&str) -> Result<Option<u32>, Errno> + Send + 'static,
) -> Result<u32, DirError> {
    if let Ok(number) = name.parse() {
        return Ok(number);
    }
    let (question, asked) = (format!("{kind} {name}"), name.to_owned());
    let answer = timeout(PATIENCE, ASKED.ask(&question, move || number(kind, &asked, look_up))).await;
    let mut known = KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
    match answer {
        Ok(answer) => answer.inspect(|number| _ = known.insert(question, *number)),
        Err(_) => known.get(&question).copied().ok_or_else(|| DirError::NameService {
            kind,
            name: name.to_owned(),
            errno: Errno::ETIMEDOUT,
        }),
    }
}

fn number(
    kind: &'static str,
    name: &str,
    look_up: impl FnOnce(&str) -> Result<Option<u32>, Errno>,
) -> Result<u32, DirError> {
    if let Ok(number) = name.parse() {
        return Ok(number);
    }
    match look_up(name) {
        Ok(Some(number)) => Ok(number),
        // Which of these says "no such name" depends on the service (getpwnam(3)).
        Ok(None) | Err(Errno::ENOENT | Errno::ESRCH | Errno::EBADF | Errno::EPERM) => {
            Err(DirError::Nobody { kind, name: name.to_owned() })
        }
        Err(errno) => Err(DirError::NameService { kind, name: name.to_owned(), errno }),
    }
}

/// Who may read what is written, by number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Access {
    owner: Option<u32>,
    group: Option<u32>,
    mode: u32,
}

impl Access {
    /// The user that we-agent runs as and nobody else: files 0600, directories 0700.
    pub const OWNER: Self = Self { owner: None, group: None, mode: 0o600 };
    /// Everybody may read: files 0644, directories 0755. For directories whose files guard themselves.
    pub const EVERYBODY: Self = Self { owner: None, group: None, mode: 0o644 };

    /// One group, too, by its number: files 0640, directories 0750. The user that we-agent runs as must be a member.
    pub const fn group(gid: u32) -> Self {
        Self { owner: None, group: Some(gid), mode: 0o640 }
    }

    /// The user that we run as and one group: files 0640, directories 0750. What belonged to another user does so no more.
    pub(super) fn shared(gid: u32) -> Self {
        Self { owner: Some(geteuid().as_raw()), ..Self::group(gid) }
    }

    pub(super) fn file(self) -> Mode {
        Mode::from_bits_truncate(self.mode & 0o777)
    }

    /// Whoever may read the files may enter and list; only the owner makes names.
    pub(super) fn dir(self) -> Mode {
        let read = self.mode & 0o444;
        Mode::from_bits_truncate(0o700 | read | read >> 2)
    }

    /// Gives what is behind `fd` its owner, group and mode; a call that would change nothing is not made.
    pub(super) fn grant(self, fd: &OwnedFd, mode: Mode, path: &Path) -> Result<(), DirError> {
        let failed = |errno| DirError::Io { doing: "set the mode of", path: path.to_owned(), errno };
        let stat = fstat(fd).map_err(failed)?;
        let owner = self.owner.filter(|uid| stat.st_uid != *uid);
        let group = self.group.filter(|gid| stat.st_gid != *gid);
        if owner.is_some() || group.is_some() {
            fchown(fd, owner.map(Uid::from_raw), group.map(Gid::from_raw)).map_err(|errno| match (errno, group) {
                (Errno::EPERM, Some(gid)) if owner.is_none() => DirError::Group { path: path.to_owned(), gid },
                (errno, _) => failed(errno),
            })?;
        }
        if stat.st_mode & 0o777 != mode.bits() {
            fchmod(fd, mode).map_err(failed)?;
        }
        Ok(())
    }

    /// Whether a file has exactly this owner, group and mode.
    pub(super) fn is_of(self, stat: &FileStat) -> bool {
        stat.st_uid == self.owner.unwrap_or_else(|| geteuid().as_raw())
            && self.group.is_none_or(|gid| stat.st_gid == gid)
            && stat.st_mode & 0o777 == self.mode
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn names_become_numbers_and_numbers_stay() {
        let of = |owner: &str, group: &str| {
            Grant { owner: Some(owner.into()), group: Some(group.into()), mode: 0o640 }.resolve()
        };
        assert_eq!(of("root", "root").unwrap(), Access { owner: Some(0), group: Some(0), mode: 0o640 });
        assert_eq!(of("4711", "4712").unwrap(), Access { owner: Some(4711), group: Some(4712), mode: 0o640 });
        let error = of("root", "no-such-group").unwrap_err();
        assert_eq!(error.kind(), "no_such_account");
        assert_eq!(error.to_string(), "this host knows no group no-such-group: create it, or configure another");
        assert!(of("no-such-user", "root").unwrap_err().to_string().contains("no user no-such-user"));
    }

    #[test]
    fn who_cannot_be_looked_up_is_not_said_to_be_missing() {
        let number = |errno| number("group", "envoy", |_| Err(errno)).unwrap_err();
        assert!(matches!(number(Errno::ESRCH), DirError::Nobody { .. }));
        let said = number(Errno::ETIMEDOUT);
        assert_eq!(said.kind(), "name_service");
        assert!(said.to_string().starts_with("cannot look up the group envoy: "), "{said}");
        assert!(said.to_string().ends_with("see whether the name service works (getent group envoy)"), "{said}");
    }

    #[tokio::test]
    async fn while_the_name_service_hangs_a_name_means_what_it_meant_last() {
        let (known, new) = ("known-before-it-hung", "never-known");
        assert_eq!(number_aside("group", known, |_| Ok(Some(7))).await, Ok(7));
        let (release, hangs) = std::sync::mpsc::channel::<()>();
        let slow = move |_: &str| hangs.recv().map_or(Ok(Some(8)), |()| Ok(None));
        assert_eq!(number_aside("group", known, slow).await, Ok(7));
        // Nothing is asked that is being asked; other names are.
        assert_eq!(number_aside("group", known, |_| Ok(Some(9))).await, Ok(7));
        let (_never, hangs) = std::sync::mpsc::channel::<()>();
        let refused =
            number_aside("group", new, move |_| hangs.recv_timeout(PATIENCE * 2).map_or(Ok(None), |()| Ok(None)));
        assert_eq!(refused.await.unwrap_err().kind(), "name_service");
        drop(release);
        assert_eq!(number_aside("group", known, |_| Ok(Some(8))).await, Ok(8));
    }

    #[test]
    fn a_group_that_is_let_in_is_ours_unless_it_is_named() {
        let of = |mode| Grant { mode, ..Grant::default() }.resolve().unwrap();
        assert_eq!(of(0o600), Access::OWNER);
        assert_eq!(of(0o640), Access::group(getegid().as_raw()));
        assert_eq!(of(0o644).group, Some(getegid().as_raw()));
    }

    #[test]
    fn who_may_read_a_file_may_enter_its_directory() {
        let dir = |mode| Access { mode, ..Access::OWNER }.dir().bits();
        assert_eq!([0o600, 0o400, 0o640, 0o660, 0o644].map(dir), [0o700, 0o700, 0o750, 0o750, 0o755]);
    }
}
