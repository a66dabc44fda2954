//! A system bus with nobody on it but systemd, as far as the agent asks: a reading of D-Bus of its own.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use std::{
    collections::BTreeMap,
    io::IoSliceMut,
    mem::MaybeUninit,
    os::fd::{AsRawFd, OwnedFd},
    path::Path,
    sync::{Arc, Mutex},
};
use tokio::{
    io::{AsyncWriteExt, Interest},
    net::{UnixListener, UnixStream},
    task::JoinHandle,
};

/// Who is on it: the bus itself, systemd, and somebody.
const BUS: &str = "org.freedesktop.DBus";
const SYSTEMD: &str = ":1.2";
const MALLORY: &str = ":1.66";
/// The unit that somebody says everybody is in.
pub(crate) const FORGED: &str = "forged.service";

/// The unit of a process about which systemd does not answer.
pub(crate) const UNKNOWN: &str = "";

/// What the other end of the bus is like.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// systemd 253 and later, which takes a descriptor of a process.
    New,
    /// The same, in the other byte order.
    NewBigEndian,
    /// systemd 252: the policy of the bus denies what it does not know.
    Old,
    /// A bus that passes no descriptors.
    WithoutDescriptors,
    /// The first, beside a user who sends signals, returns and errors to whoever comes, with every serial that may be
    /// asked for, before and after systemd answers.
    Pestered,
    /// One that never answers a question.
    Silent,
    /// No D-Bus at all.
    Nonsense,
}

/// The fake; it ends when dropped.
pub(crate) struct SystemBus {
    units: Arc<Mutex<BTreeMap<u32, String>>>,
    asked: Arc<Mutex<Vec<String>>>,
    task: JoinHandle<()>,
}

impl SystemBus {
    /// Listens where the system bus is on the host at `root`.
    pub(crate) fn start(root: &Path, kind: Kind) -> Self {
        let dir = root.join("run/dbus");
        std::fs::create_dir_all(&dir).unwrap();
        let listener = UnixListener::bind(dir.join("system_bus_socket")).unwrap();
        let (units, asked) = (Arc::<Mutex<BTreeMap<_, _>>>::default(), Arc::<Mutex<Vec<_>>>::default());
        let shared = (units.clone(), asked.clone());
        let task = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let (units, asked) = shared.clone();
                tokio::spawn(async move { talk(stream, kind, &units, &asked).await });
            }
        });
        Self { units, asked, task }
    }

    /// Puts a process into a unit.
    pub(crate) fn put(&self, pid: u32, unit: &str) {
        self.units.lock().unwrap().insert(pid, unit.to_owned());
    }

    /// The methods that were called since the last look.
    pub(crate) fn asked(&self) -> Vec<String> {
        std::mem::take(&mut *self.asked.lock().unwrap())
    }
}

impl Drop for SystemBus {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Reads what has come, with the descriptors beside it; nothing at the end.
async fn receive(stream: &UnixStream) -> (Vec<u8>, Vec<OwnedFd>) {
    loop {
        stream.readable().await.unwrap();
        let mut bytes = vec![0; 4096];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
        let mut beside = RecvAncillaryBuffer::new(&mut space);
        let read = stream.try_io(Interest::READABLE, || {
            let read = recvmsg(stream, &mut [IoSliceMut::new(&mut bytes)], &mut beside, RecvFlags::CMSG_CLOEXEC)?;
            Ok(read.bytes)
        });
        let Ok(read) = read else { continue };
        bytes.truncate(read);
        let rights = beside.drain().filter_map(|message| match message {
            RecvAncillaryMessage::ScmRights(rights) => Some(rights.collect::<Vec<_>>()),
            _ => None,
        });
        return (bytes, rights.flatten().collect());
    }
}

async fn talk(mut stream: UnixStream, kind: Kind, units: &Mutex<BTreeMap<u32, String>>, asked: &Mutex<Vec<String>>) {
    let mut bytes = Vec::new();
    let begin = b"BEGIN\r\n";
    let end = loop {
        if let Some(at) = bytes.windows(begin.len()).position(|w| w == begin) {
            break at + begin.len();
        }
        let (more, _) = receive(&stream).await;
        if more.is_empty() {
            return;
        }
        bytes.extend(more);
    };
    assert!(bytes.starts_with(b"\0AUTH EXTERNAL\r\n"), "{bytes:?}");
    let greeting: &[u8] = match kind {
        Kind::Nonsense => b"HTTP/1.1 400 Bad Request\r\n\r\n",
        Kind::WithoutDescriptors => b"DATA\r\nOK 0123456789abcdef0123456789abcdef\r\nERROR \"no\"\r\n",
        _ => b"DATA\r\nOK 0123456789abcdef0123456789abcdef\r\nAGREE_UNIX_FD\r\n",
    };
    stream.write_all(greeting).await.unwrap();
    bytes.drain(..end);
    let mut rights = Vec::new();
    loop {
        if let Some(length) = length(&bytes).filter(|length| *length <= bytes.len()) {
            let message: Vec<u8> = bytes.drain(..length).collect();
            let serial = u32::from_le_bytes(message[8..12].try_into().unwrap());
            let has = |word: &str| message.windows(word.len() + 1).any(|w| w == [word.as_bytes(), b"\0"].concat());
            let answer = if has("Hello") {
                // As the real one does, a signal follows.
                [
                    reply(kind, serial, BUS, None, "s", |body| body.text(":1.7")),
                    include_bytes!("../golden/dbus/signal.bin").to_vec(),
                ]
                .concat()
            } else if has("GetNameOwner") {
                assert!(has(BUS) && has("org.freedesktop.systemd1"));
                reply(kind, serial, BUS, None, "s", |body| body.text(SYSTEMD))
            } else {
                assert!(has(SYSTEMD) && has("/org/freedesktop/systemd1"));
                assert!(has("org.freedesktop.systemd1.Manager"));
                let by_descriptor = has("GetUnitByPIDFD");
                assert!(by_descriptor || has("GetUnitByPID"));
                asked.lock().unwrap().push(if by_descriptor { "GetUnitByPIDFD" } else { "GetUnitByPID" }.to_owned());
                let pid = if by_descriptor {
                    process(rights.pop().expect("no descriptor came"))
                } else {
                    u32::from_le_bytes(*message.last_chunk().unwrap())
                };
                let unit = units.lock().unwrap().get(&pid).cloned();
                match (kind, by_descriptor, unit) {
                    (Kind::Silent, ..) => Vec::new(),
                    (_, _, Some(unit)) if unit == UNKNOWN => Vec::new(),
                    (Kind::Old | Kind::WithoutDescriptors, true, _) => {
                        let name = "org.freedesktop.DBus.Error.AccessDenied";
                        reply(kind, serial, BUS, Some(name), "s", |body| body.text("Sender is not authorized"))
                    }
                    (_, _, None) => {
                        let name = "org.freedesktop.systemd1.NoUnitForPID";
                        reply(kind, serial, SYSTEMD, Some(name), "s", |b| {
                            b.text("PID does not belong to any loaded unit.")
                        })
                    }
                    (_, true, Some(unit)) => reply(kind, serial, SYSTEMD, None, "osay", |body| {
                        body.text(&path(&unit));
                        body.text(&unit);
                        body.number(16);
                        body.bytes.extend([7; 16]);
                    }),
                    (_, false, Some(unit)) => reply(kind, serial, SYSTEMD, None, "o", |body| body.text(&path(&unit))),
                }
            };
            let answer = match kind {
                Kind::Pestered => [nuisance(serial), answer, nuisance(serial)].concat(),
                _ => answer,
            };
            // Whoever has its answer goes.
            if stream.write_all(&answer).await.is_err() {
                return;
            }
            continue;
        }
        let (more, fds) = receive(&stream).await;
        if more.is_empty() {
            return;
        }
        bytes.extend(more);
        rights.extend(fds);
    }
}

/// What another user sends to whoever comes: signals, one of them long, and an answer to everything that may have been asked.
fn nuisance(serial: u32) -> Vec<u8> {
    const LONG: u32 = 100 << 10;
    let signal = include_bytes!("../golden/dbus/signal.bin");
    let mut long = [&[b'l', 4, 0, 1][..], &LONG.to_le_bytes(), &[9, 0, 0, 0, 0, 0, 0, 0]].concat();
    long.resize(16 + LONG as usize, 0);
    let answers = (0..serial + 9).flat_map(|to| {
        let unit = |body: &mut Put| {
            body.text(&path(FORGED));
            body.text(FORGED);
        };
        let denied = Some("org.freedesktop.DBus.Error.AccessDenied");
        [reply(Kind::New, to, MALLORY, None, "os", unit), reply(Kind::New, to, MALLORY, denied, "s", |b| b.text("no"))]
    });
    [signal.repeat(100), long, answers.flatten().collect()].concat()
}

/// How long the first message is; none before that is known.
pub(crate) fn length(bytes: &[u8]) -> Option<usize> {
    let number = |at: usize| Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().unwrap()) as usize);
    Some((16 + number(12)?).next_multiple_of(8) + number(4)?)
}

/// The process behind a pidfd, as the kernel tells it.
fn process(pidfd: OwnedFd) -> u32 {
    let about = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", pidfd.as_raw_fd())).unwrap();
    let pid = about.lines().find_map(|line| line.strip_prefix("Pid:")).expect("not a pidfd").trim();
    pid.parse().expect("its process has ended")
}

/// The object path of a unit: `sd_bus_path_encode`.
pub(crate) fn path(unit: &str) -> String {
    let escaped = unit.bytes().map(|byte| match byte {
        b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' => char::from(byte).to_string(),
        other => format!("_{other:02x}"),
    });
    format!("/org/freedesktop/systemd1/unit/{}", escaped.collect::<String>())
}

/// Bytes that are being put together, in either order.
pub(crate) struct Put {
    bytes: Vec<u8>,
    big: bool,
}

impl Put {
    pub(crate) fn number(&mut self, number: u32) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
        self.bytes.extend(if self.big { number.to_be_bytes() } else { number.to_le_bytes() });
    }

    pub(crate) fn text(&mut self, text: &str) {
        self.number(u32::try_from(text.len()).unwrap());
        self.bytes.extend(text.bytes());
        self.bytes.push(0);
    }

    fn field(&mut self, code: u8, kind: u8) {
        self.bytes.resize(self.bytes.len().next_multiple_of(8), 0);
        self.bytes.extend([code, 1, kind, 0]);
    }
}

/// A field of a message.
pub(crate) enum Field<'a> {
    Path(&'a str),
    Text(&'a str),
    Number(u32),
}

/// A whole message: its kind, serial and fields, and a body of this signature.
pub(crate) fn message(
    big: bool,
    kind: u8,
    serial: u32,
    fields: &[(u8, Field<'_>)],
    signature: &str,
    body: impl FnOnce(&mut Put),
) -> Vec<u8> {
    let mut inner = Put { bytes: Vec::new(), big };
    body(&mut inner);
    let mut out = Put { bytes: vec![if big { b'B' } else { b'l' }, kind, 1, 1], big };
    out.number(u32::try_from(inner.bytes.len()).unwrap());
    out.number(serial);
    out.number(0);
    for (code, field) in fields {
        match field {
            Field::Path(path) => {
                out.field(*code, b'o');
                out.text(path);
            }
            Field::Text(text) => {
                out.field(*code, b's');
                out.text(text);
            }
            Field::Number(number) => {
                out.field(*code, b'u');
                out.number(*number);
            }
        }
    }
    if !signature.is_empty() {
        out.field(8, b'g');
        out.bytes.push(u8::try_from(signature.len()).unwrap());
        out.bytes.extend(signature.bytes());
        out.bytes.push(0);
    }
    let fields = u32::try_from(out.bytes.len() - 16).unwrap();
    let fields = if big { fields.to_be_bytes() } else { fields.to_le_bytes() };
    out.bytes[12..16].copy_from_slice(&fields);
    out.bytes.resize(out.bytes.len().next_multiple_of(8), 0);
    out.bytes.extend(inner.bytes);
    out.bytes
}

/// A return, or an error, to the agent.
fn reply(
    kind: Kind,
    to: u32,
    from: &str,
    error: Option<&str>,
    signature: &str,
    body: impl FnOnce(&mut Put),
) -> Vec<u8> {
    let mut fields = vec![(5, Field::Number(to)), (6, Field::Text(":1.7")), (7, Field::Text(from))];
    fields.extend(error.map(|name| (4, Field::Text(name))));
    message(kind == Kind::NewBigEndian, if error.is_some() { 3 } else { 2 }, 99, &fields, signature, body)
}
