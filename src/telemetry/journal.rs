//! The journal's native protocol: one datagram an entry, one `NAME=value` a line (systemd, "Native Journal Protocol").
//!
//! The libraries for it put the bare message into `MESSAGE` and everything else beside it, where `journalctl -u` does
//! not show it. Hence these few lines.

use super::{
    record::{Record, plain},
    severity,
    stderr::Patience,
};
use nix::sys::socket::{MsgFlags, UnixAddr, sendto};
use std::{
    io,
    os::{
        fd::AsRawFd,
        unix::{fs::MetadataExt, net::UnixDatagram},
    },
    path::Path,
    time::Duration,
};

const SOCKET: &str = "/run/systemd/journal/socket";
/// No entry waits longer for a journal that hangs.
const PATIENCE: Duration = Duration::from_millis(100);

/// A socket that entries are sent from.
pub(super) struct Journal {
    socket: UnixDatagram,
    to: UnixAddr,
}

impl Journal {
    /// The host's journal; none when there is none.
    pub(super) fn system() -> Option<Self> {
        let socket = Path::new(SOCKET);
        Self::at(socket).ok().filter(|_| socket.exists())
    }

    pub(super) fn at(to: &Path) -> io::Result<Self> {
        let socket = UnixDatagram::unbound()?;
        socket.set_write_timeout(Some(PATIENCE))?;
        Ok(Self { socket, to: UnixAddr::new(to)? })
    }

    /// Sends one entry; by address each time, so that a restart of the journal is not noticed.
    pub(super) fn send(&self, record: &Record, patience: Patience) -> io::Result<()> {
        let how = match patience {
            Patience::None => MsgFlags::MSG_DONTWAIT,
            Patience::Endless => MsgFlags::empty(),
        };
        sendto(self.socket.as_raw_fd(), &entry(record), &self.to, how | MsgFlags::MSG_NOSIGNAL)?;
        Ok(())
    }
}

/// Whether systemd has connected stderr to the journal: `JOURNAL_STREAM` is `device:inode` of that socket.
pub(super) fn is_stderr() -> bool {
    let Ok(stderr) = std::fs::metadata("/proc/self/fd/2") else { return false };
    std::env::var("JOURNAL_STREAM").is_ok_and(|stream| stream == format!("{}:{}", stderr.dev(), stderr.ino()))
}

pub(super) fn entry(record: &Record) -> Vec<u8> {
    let mut entry = Vec::with_capacity(512);
    put(&mut entry, "MESSAGE", &record.words());
    put(&mut entry, "PRIORITY", &severity(record.level).to_string());
    put(&mut entry, "SYSLOG_IDENTIFIER", "we-agent");
    put(&mut entry, "TARGET", record.target);
    if let Some((file, line)) = record.place {
        put(&mut entry, "CODE_FILE", file);
        put(&mut entry, "CODE_LINE", &line.to_string());
    }
    for (name, value) in record.fields() {
        put(&mut entry, &field_name(name), &plain(&value));
    }
    entry
}

/// Upper-case letters, digits and underscores, not beginning with an underscore (that is the journal's own).
fn field_name(name: &str) -> String {
    let legal = |c: char| if c.is_ascii_alphanumeric() { c.to_ascii_uppercase() } else { '_' };
    name.chars().map(legal).collect::<String>().trim_start_matches('_').to_owned()
}

/// No value has a line feed, which would have to be sent with its length.
fn put(entry: &mut Vec<u8>, name: &str, value: &str) {
    for part in [name, "=", value, "\n"] {
        entry.extend_from_slice(part.as_bytes());
    }
}
