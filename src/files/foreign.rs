//! The one door for files that others write: bundles, tokens, roots, passwords, our configuration. Whatever is put in such
//! a place, a pipe, an endless device, a file system that does not answer, costs its reader an error and nobody else anything.
//! `clippy.toml` keeps other ways to read a file out.

use crate::aside::within;
use std::{
    fs::{File, OpenOptions},
    io::{self, ErrorKind, Read as _},
    os::unix::fs::{MetadataExt as _, OpenOptionsExt as _},
    path::Path,
    time::Duration,
};
use zeroize::Zeroizing;

/// The longest file that is read, in bytes; real ones have some kilobytes.
pub const MAX_FILE: usize = 64 * 1024;
/// The longest file of roots.
pub const MAX_ROOTS: usize = 1024 * 1024;
/// Bound on reading one file. A disk that spins up takes a few seconds.
const DEADLINE: Duration = Duration::from_secs(5);

/// Why a file was not read. Each text reads on after the name of the file, and says the fix.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ReadError {
    /// There is none.
    #[error("there is no such file")]
    Missing,
    /// The user that we run as may not.
    #[error("the user that we-agent runs as may not read it: let it read the file and enter its directories")]
    Denied,
    /// Something else of that name.
    #[error("is no regular file: put the file itself there, or a link to it")]
    NotAFile,
    /// Far too long for what it should be.
    #[error("is longer than {0} bytes, so it is not what belongs there: copy it again")]
    TooLong(usize),
    /// Begins with a byte-order mark of UTF-16.
    #[error("is UTF-16: save it as UTF-8")]
    Utf16,
    /// Not text; the place of the first byte that is none.
    #[error("byte {0} is not UTF-8: the file is damaged, copy it again")]
    NotText(usize),
    /// Not read in time.
    #[error("could not be read within {}s: look at the file system that it is on", .0.as_secs())]
    Slow(Duration),
    /// What the system said.
    #[error("cannot be read ({0})")]
    System(ErrorKind),
}

impl From<io::Error> for ReadError {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            ErrorKind::NotFound => Self::Missing,
            ErrorKind::PermissionDenied => Self::Denied,
            ErrorKind::IsADirectory => Self::NotAFile,
            // A socket cannot be opened at all, nor a device that is not there.
            _ if error.raw_os_error() == Some(nix::libc::ENXIO) => Self::NotAFile,
            kind => Self::System(kind),
        }
    }
}

/// What a file held when it was read; wiped when dropped.
pub struct Foreign {
    bytes: Zeroizing<Vec<u8>>,
    /// Its mode, as `stat` gives it.
    pub mode: u32,
}

impl Foreign {
    /// As text, without the byte-order mark that editors of other systems leave.
    ///
    /// # Errors
    /// When it is not UTF-8.
    pub fn text(&self) -> Result<Zeroizing<String>, ReadError> {
        match std::str::from_utf8(&self.bytes) {
            Ok(text) => Ok(Zeroizing::new(text.strip_prefix('\u{feff}').unwrap_or(text).to_owned())),
            Err(_) if matches!(self.bytes[..], [0xff, 0xfe, ..] | [0xfe, 0xff, ..]) => Err(ReadError::Utf16),
            Err(error) => Err(ReadError::NotText(error.valid_up_to())),
        }
    }
}

/// Reads a regular file of at most `limit` bytes; links are followed. For threads that may wait for a disk: others
/// [`read_aside`].
///
/// # Errors
/// Whatever else is there. Nothing but the file system itself makes it wait.
pub fn read(path: &Path, limit: usize) -> Result<Foreign, ReadError> {
    let (file, mode) = open(path)?;
    // One buffer that is large enough: a growing one would leave copies of a secret behind.
    let size = file.metadata()?.len();
    let mut bytes = Zeroizing::new(Vec::with_capacity(usize::try_from(size).unwrap_or(limit).min(limit) + 64));
    file.take(limit as u64 + 1).read_to_end(&mut bytes)?;
    if bytes.len() > limit { Err(ReadError::TooLong(limit)) } else { Ok(Foreign { bytes, mode }) }
}

/// As [`read`], as text.
///
/// # Errors
/// As [`read`], and when it is not UTF-8.
pub fn read_text(path: &Path, limit: usize) -> Result<Zeroizing<String>, ReadError> {
    read(path, limit)?.text()
}

/// Whether there is a file that the user that we run as may not read.
pub fn is_denied(path: &Path) -> bool {
    matches!(open(path), Err(ReadError::Denied))
}

#[expect(clippy::disallowed_methods, reason = "this is the door")]
fn open(path: &Path) -> Result<(File, u32), ReadError> {
    // Without blocking: a pipe waits for its other end, and a terminal for its line.
    let flags = nix::libc::O_NONBLOCK | nix::libc::O_NOCTTY | nix::libc::O_CLOEXEC;
    let file = OpenOptions::new().read(true).custom_flags(flags).open(path)?;
    let stat = file.metadata()?;
    if stat.is_file() { Ok((file, stat.mode())) } else { Err(ReadError::NotAFile) }
}

/// As [`read_text`], aside and bounded: for the event loop, which never waits for a disk.
///
/// # Errors
/// As [`read_text`], and [`ReadError::Slow`] when it is not done in time.
pub async fn read_aside(path: &Path, limit: usize) -> Result<Zeroizing<String>, ReadError> {
    let file = path.to_owned();
    within(DEADLINE, path, move || read_text(&file, limit)).await.unwrap_or(Err(ReadError::Slow(DEADLINE)))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use nix::{sys::stat::Mode, unistd::mkfifo};
    use std::{
        fs,
        os::unix::{fs::symlink, net::UnixListener},
    };

    fn text(path: &Path) -> Result<String, ReadError> {
        read_text(path, MAX_FILE).map(|text| text.to_string())
    }

    #[test]
    fn only_a_regular_file_of_some_length_is_read() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        mkfifo(&at("pipe"), Mode::S_IRWXU).unwrap();
        symlink(at("pipe"), at("to a pipe")).unwrap();
        symlink("/dev/zero", at("endless")).unwrap();
        let _socket = UnixListener::bind(at("socket")).unwrap();
        for odd in ["pipe", "to a pipe", "endless", "socket", "."] {
            assert_eq!(text(&at(odd)), Err(ReadError::NotAFile), "{odd}");
        }
        assert_eq!((text(&at("none")), is_denied(&at("none"))), (Err(ReadError::Missing), false));
        assert!(!is_denied(&at("pipe")));
        fs::write(at("huge"), vec![b'x'; MAX_FILE + 1]).unwrap();
        assert_eq!(text(&at("huge")), Err(ReadError::TooLong(MAX_FILE)));
        fs::write(at("full"), vec![b'x'; MAX_FILE]).unwrap();
        symlink(at("full"), at("mounted")).unwrap();
        assert_eq!(text(&at("mounted")).unwrap().len(), MAX_FILE);
        // The kernel's own files have no size.
        assert!(!text(Path::new("/proc/self/status")).unwrap().is_empty());
    }

    #[test]
    fn a_mark_of_the_byte_order_is_read_over_or_named() {
        let file = tempfile::NamedTempFile::new().unwrap();
        for (bytes, read) in [
            (&b"\xef\xbb\xbfA=1\n"[..], Ok("A=1\n".to_owned())),
            (b"\xff\xfeA\0", Err(ReadError::Utf16)),
            (b"\xfe\xff\0A", Err(ReadError::Utf16)),
            (b"A=\xe9", Err(ReadError::NotText(2))),
            (b"", Ok(String::new())),
        ] {
            fs::write(file.path(), bytes).unwrap();
            assert_eq!(text(file.path()), read, "{bytes:?}");
        }
    }
}
