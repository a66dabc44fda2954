//! Which unit a process belongs to: systemd knows, and is asked. (`/proc` tells it, too, but a process is in the cgroup
//! that it is in now, and the number that we look up may be another's by now.)

use super::bus::{Answer, Argument, Bus, Method};
use crate::{files::Root, host::Peer};
use std::{
    collections::HashMap,
    io,
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError, Weak},
    time::Duration,
};
use tokio::{sync::Semaphore, time::timeout};

/// Where the system bus listens, below the root.
const BUS: &str = "/run/dbus/system_bus_socket";
/// Its name there.
const SYSTEMD: &str = "org.freedesktop.systemd1";
/// Bound on one question, greeting and waiting included.
const ASK: Duration = Duration::from_secs(2);
/// Questions at a time: the bus gives us so many connections and no more.
const AT_A_TIME: usize = 8;
/// Of them for one user: whoever connects a thousand times keeps nobody else waiting.
const OF_USER: usize = 2;

/// systemd, to be asked for units.
#[derive(Debug, Clone)]
pub struct Units {
    bus: PathBuf,
    turns: Arc<Turns>,
}

/// Who may ask now.
#[derive(Debug)]
struct Turns {
    all: Semaphore,
    /// Of those who ask or wait.
    users: Mutex<HashMap<u32, Weak<Semaphore>>>,
}

impl Turns {
    fn of(&self, uid: u32) -> Arc<Semaphore> {
        let mut users = self.users.lock().unwrap_or_else(PoisonError::into_inner);
        users.retain(|_, turns| turns.strong_count() > 0);
        users.get(&uid).and_then(Weak::upgrade).unwrap_or_else(|| {
            let turns = Arc::new(Semaphore::new(OF_USER));
            users.insert(uid, Arc::downgrade(&turns));
            turns
        })
    }
}

/// Why there is no unit.
#[derive(Debug, thiserror::Error)]
pub enum UnitError {
    /// The process has ended: whoever is there now did not connect.
    #[error("the process has ended")]
    Gone,
    /// The kernel is too old for the question, or the process has no number here.
    #[error("the process cannot be held fast, which takes Linux 5.3 and a common process namespace")]
    Unpinned,
    /// The bus does not answer.
    #[error("{}: {source}; a unit can only be told where systemd and the system bus run", .bus.display())]
    Bus {
        /// Its socket.
        bus: PathBuf,
        /// What happened.
        source: io::Error,
    },
    /// systemd refuses, for example because the process is in no unit.
    #[error("systemd says {name}: {text}")]
    Refused {
        /// The D-Bus name of the error.
        name: String,
        /// Its text.
        text: String,
    },
    /// No answer in two seconds.
    #[error("systemd did not answer in time")]
    Late,
}

impl UnitError {
    /// Whether this is systemd's last word on the process; anything else may be another one in a moment.
    pub fn is_final(&self) -> bool {
        match self {
            Self::Gone => true,
            Self::Refused { name, .. } => {
                matches!(name.strip_prefix("org.freedesktop.systemd1."), Some("NoUnitForPID" | "NoSuchProcess"))
            }
            Self::Unpinned | Self::Bus { .. } | Self::Late => false,
        }
    }
}

impl Units {
    /// Asks on the system bus of `root`.
    pub fn new(root: &Root) -> Self {
        let turns = Turns { all: Semaphore::new(AT_A_TIME), users: Mutex::default() };
        Self { bus: root.path(BUS), turns: Arc::new(turns) }
    }

    /// The full name of the unit that `peer` belongs to.
    ///
    /// # Errors
    /// When there is none, or nobody knows.
    pub async fn of(&self, peer: &Peer) -> Result<String, UnitError> {
        timeout(ASK, self.ask(peer)).await.unwrap_or(Err(UnitError::Late))
    }

    async fn ask(&self, peer: &Peer) -> Result<String, UnitError> {
        let failed = |source| UnitError::Bus { bus: self.bus.clone(), source };
        let turns = self.turns.of(peer.uid);
        let closed = |closed| failed(io::Error::other(closed));
        let (_own, _of_all) = (turns.acquire().await.map_err(closed)?, self.turns.all.acquire().await.map_err(closed)?);
        let Some(pidfd) = peer.pidfd() else {
            return Err(if peer.has_gone() { UnitError::Gone } else { UnitError::Unpinned });
        };
        let mut bus = Bus::connect(&self.bus).await.map_err(failed)?;
        // Whoever has the name: the policy of the bus gives it to root alone.
        let systemd = bus.owner(SYSTEMD).await.map_err(failed)?;
        if bus.takes_descriptors() {
            // Answers with the path of the unit, its name, and the id of its run.
            match bus.call(manager(&systemd, "GetUnitByPIDFD"), Argument::Descriptor(pidfd)).await.map_err(failed)? {
                Answer::Strings(strings) => return strings.into_iter().nth(1).ok_or_else(|| failed(unreadable())),
                // systemd before 253 does not know it; what its bus policy does not know, the bus denies.
                Answer::Error(name, _) if is_unknown(&name) => {}
                Answer::Error(name, text) => return Err(UnitError::Refused { name, text }),
            }
        }
        let Some(number) = peer.pid.and_then(|pid| u32::try_from(pid).ok()) else { return Err(UnitError::Unpinned) };
        let unit = match bus.call(manager(&systemd, "GetUnitByPID"), Argument::Number(number)).await.map_err(failed)? {
            Answer::Strings(strings) => {
                strings.first().and_then(|path| named(path)).ok_or_else(|| failed(unreadable()))
            }
            Answer::Error(name, text) => Err(UnitError::Refused { name, text }),
        };
        // The second look: if the process we hold is there still, the number was its own all the time.
        if peer.has_gone() { Err(UnitError::Gone) } else { unit }
    }
}

fn manager<'a>(systemd: &'a str, member: &'static str) -> Method<'a> {
    let interface = "org.freedesktop.systemd1.Manager";
    Method { of: systemd, path: "/org/freedesktop/systemd1", interface, member }
}

fn is_unknown(error: &str) -> bool {
    matches!(error, "org.freedesktop.DBus.Error.UnknownMethod" | "org.freedesktop.DBus.Error.AccessDenied")
}

fn unreadable() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "systemd's answer names no unit")
}

/// The unit of an object path: its last part, in which each byte that is no letter or digit is written `_xx`.
fn named(path: &str) -> Option<String> {
    let escaped = path.strip_prefix("/org/freedesktop/systemd1/unit/")?;
    let mut name = Vec::with_capacity(escaped.len());
    let mut rest = escaped.as_bytes();
    while let [first, after @ ..] = rest {
        if *first == b'_' {
            let digits = std::str::from_utf8(after.get(..2)?).ok()?;
            name.push(u8::from_str_radix(digits, 16).ok()?);
            rest = &after[2..];
        } else {
            name.push(*first);
            rest = after;
        }
    }
    String::from_utf8(name).ok().filter(|name| !name.is_empty())
}

#[cfg(test)]
mod tests;
