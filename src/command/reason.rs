//! Why a program cannot be started although it is there. What the kernel finds wrong with an interpreter it says of the
//! program, in words that send people looking at the wrong file.

use super::error::WORDS;
use nix::{
    errno::Errno,
    sys::statvfs::{FsFlags, statvfs},
};
use std::{
    fs::{self, Metadata, OpenOptions},
    io::{self, Read},
    os::unix::fs::{OpenOptionsExt, PermissionsExt},
    path::Path,
};

/// The kernel reads no more of a script's first line (`BINPRM_BUF_SIZE`).
const FIRST_LINE: u64 = 256;

/// What is behind `error`, which came of starting `program`; none when it says all there is to say.
pub(super) fn behind(program: &str, error: &io::Error) -> Option<String> {
    let path = Path::new(program);
    let errno = Errno::from_raw(error.raw_os_error()?);
    let Ok(about) = fs::metadata(path) else {
        let blank = errno == Errno::ENOENT && program.contains(char::is_whitespace);
        return blank.then(|| WORDS.to_owned());
    };
    match errno {
        Errno::ENOENT => missing(path, &about),
        Errno::EACCES => Some(forbidden(path, &about).to_owned()),
        Errno::ENOEXEC => Some(
            "it is neither a program for this machine nor a script that names its interpreter (#!) in the first line"
                .to_owned(),
        ),
        Errno::ETXTBSY => Some("somebody has it open for writing".to_owned()),
        _ => None,
    }
}

/// The file is there, so something that it needs is not.
fn missing(path: &Path, about: &Metadata) -> Option<String> {
    let beginning = beginning(path, about)?;
    let Some(line) = beginning.strip_prefix(b"#!") else {
        return Some("the loader that it was linked for is not on this host".to_owned());
    };
    let line = String::from_utf8_lossy(line.split(|byte| *byte == b'\n').next()?).into_owned();
    let interpreter = line.split([' ', '\t']).find(|word| !word.is_empty())?;
    Some(match interpreter.ends_with('\r') {
        true => "its lines end as on Windows (CR LF), so that its interpreter is not found".to_owned(),
        false => format!("its interpreter {interpreter} is not there"),
    })
}

fn forbidden(path: &Path, about: &Metadata) -> &'static str {
    if about.is_dir() {
        "it is a directory"
    } else if about.permissions().mode() & 0o111 == 0 {
        "it is not marked executable (chmod +x)"
    } else if statvfs(path).is_ok_and(|mount| mount.flags().contains(FsFlags::ST_NOEXEC)) {
        "its file system is mounted noexec"
    } else {
        "this user may not run it, or may not enter its directory"
    }
}

/// Without waiting for anybody: what is there may be anything.
#[expect(clippy::disallowed_methods, reason = "it is regular, opened without blocking, and the beginning is enough")]
fn beginning(path: &Path, about: &Metadata) -> Option<Vec<u8>> {
    if !about.is_file() {
        return None;
    }
    let file = OpenOptions::new().read(true).custom_flags(nix::libc::O_NONBLOCK).open(path).ok()?;
    let mut beginning = Vec::new();
    file.take(FIRST_LINE).read_to_end(&mut beginning).ok()?;
    Some(beginning)
}
