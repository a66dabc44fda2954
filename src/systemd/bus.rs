//! As much of D-Bus as one question needs: call a method on the system bus, with at most one descriptor, and read the
//! answer (D-Bus Specification 0.43: "Authentication Protocol", "Message Protocol", "Marshaling").

use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use std::{
    io::{self, IoSlice},
    os::fd::{AsRawFd, BorrowedFd},
    path::Path,
};
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader, Interest},
    net::UnixStream,
};

/// An answer is a name or two; more than this is none to our question, in bytes.
const MAX_MESSAGE: usize = 64 * 1024;
/// Messages to others' questions, and signals, that may come before ours.
const MAX_SKIPPED: usize = 32;

/// Which method is called.
#[derive(Debug, Clone, Copy)]
pub(super) struct Method {
    /// The name of the service on the bus.
    pub(super) service: &'static str,
    pub(super) path: &'static str,
    pub(super) interface: &'static str,
    pub(super) member: &'static str,
}

/// The one argument of a call.
#[derive(Debug, Clone, Copy)]
pub(super) enum Argument<'a> {
    None,
    Number(u32),
    Descriptor(BorrowedFd<'a>),
}

/// What the other side says to a call.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Answer {
    /// The strings (and object paths) that the answer begins with.
    Strings(Vec<String>),
    /// The name of an error, and its text.
    Error(String, String),
}

/// A connection to the bus, after its greeting.
#[derive(Debug)]
pub(super) struct Bus {
    stream: BufReader<UnixStream>,
    serial: u32,
    /// Whether descriptors may be sent.
    descriptors: bool,
}

impl Bus {
    /// Connects and greets.
    ///
    /// # Errors
    /// When nobody listens there, or the other side does not speak D-Bus or does not want us.
    pub(super) async fn connect(path: &Path) -> io::Result<Self> {
        let mut stream = BufReader::new(UnixStream::connect(path).await?);
        // In one go, as systemd's own library does it, and without a user: the bus asks the kernel who we are.
        stream.write_all(b"\0AUTH EXTERNAL\r\nDATA\r\nNEGOTIATE_UNIX_FD\r\nBEGIN\r\n").await?;
        if line(&mut stream).await? != "DATA" || !line(&mut stream).await?.starts_with("OK ") {
            return Err(wrong("the bus does not accept this user"));
        }
        let descriptors = line(&mut stream).await? == "AGREE_UNIX_FD";
        let mut bus = Self { stream, serial: 0, descriptors };
        let greeting = Method {
            service: "org.freedesktop.DBus",
            path: "/org/freedesktop/DBus",
            interface: "org.freedesktop.DBus",
            member: "Hello",
        };
        match bus.call(greeting, Argument::None).await? {
            Answer::Strings(_) => Ok(bus),
            Answer::Error(..) => Err(wrong("the bus does not answer the greeting")),
        }
    }

    /// Whether a descriptor can be an argument.
    pub(super) fn takes_descriptors(&self) -> bool {
        self.descriptors
    }

    /// Calls and waits for the answer; the caller sets the bound on time.
    ///
    /// # Errors
    /// When the connection breaks or what comes is no D-Bus.
    pub(super) async fn call(&mut self, method: Method, argument: Argument<'_>) -> io::Result<Answer> {
        self.serial += 1;
        let message = encode(self.serial, method, argument);
        let sent = match argument {
            Argument::Descriptor(fd) => self.send_with(&message, fd).await?,
            Argument::None | Argument::Number(_) => 0,
        };
        self.stream.write_all(&message[sent..]).await?;
        for _ in 0..MAX_SKIPPED {
            if let Some(answer) = self.receive().await? {
                return Ok(answer);
            }
        }
        Err(wrong("the bus answers everything but the question"))
    }

    /// Sends the beginning of a message with a descriptor beside it; how much of it went.
    async fn send_with(&self, message: &[u8], fd: BorrowedFd<'_>) -> io::Result<usize> {
        let stream = self.stream.get_ref();
        let rights = [fd.as_raw_fd()];
        loop {
            stream.writable().await?;
            let sent = stream.try_io(Interest::WRITABLE, || {
                let beside = [ControlMessage::ScmRights(&rights)];
                Ok(sendmsg::<()>(stream.as_raw_fd(), &[IoSlice::new(message)], &beside, MsgFlags::MSG_NOSIGNAL, None)?)
            });
            match sent {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                sent => return sent,
            }
        }
    }

    /// The next message; none when it is no answer to the last call. Descriptors in it would be closed by the kernel.
    async fn receive(&mut self) -> io::Result<Option<Answer>> {
        let mut head = vec![0; 16];
        self.stream.read_exact(&mut head).await?;
        let order = Order::of(head[0])?;
        let (body, fields) = (order.number(&head, 4)? as usize, order.number(&head, 12)? as usize);
        // Each is bounded before the sum is: it cannot wrap.
        if body > MAX_MESSAGE || fields > MAX_MESSAGE {
            return Err(wrong("a message of the bus is too long"));
        }
        let start = (16 + fields).next_multiple_of(8);
        let mut message = head;
        message.resize(start + body, 0);
        self.stream.read_exact(&mut message[16..]).await?;
        decode(order, &message, fields, start, self.serial)
    }
}

async fn line(stream: &mut BufReader<UnixStream>) -> io::Result<String> {
    let mut line = Vec::new();
    // A line of the greeting is short; the limit makes a longer one an error below.
    stream.take(512).read_until(b'\n', &mut line).await?;
    let line = line.strip_suffix(b"\r\n").ok_or_else(|| wrong("the other side does not speak D-Bus"))?;
    String::from_utf8(line.to_vec()).map_err(|_| wrong("the other side does not speak D-Bus"))
}

/// A method call, little-endian.
fn encode(serial: u32, method: Method, argument: Argument<'_>) -> Vec<u8> {
    let (signature, body, descriptors) = match argument {
        Argument::None => (None, None, 0u32),
        Argument::Number(number) => (Some("u"), Some(number), 0),
        // A descriptor is the index of one that travels beside.
        Argument::Descriptor(_) => (Some("h"), Some(0), 1),
    };
    let body = body.map(u32::to_le_bytes);
    // Call, no flags, version 1.
    let mut out = vec![b'l', 1, 0, 1];
    out.extend(u32::try_from(body.map_or(0, |b| b.len())).unwrap_or(0).to_le_bytes());
    out.extend(serial.to_le_bytes());
    out.extend([0; 4]);
    let text = |out: &mut Vec<u8>, code: u8, kind: u8, text: &str| {
        out.resize(out.len().next_multiple_of(8), 0);
        out.extend([code, 1, kind, 0]);
        out.extend(u32::try_from(text.len()).unwrap_or(0).to_le_bytes());
        out.extend(text.bytes());
        out.push(0);
    };
    text(&mut out, 1, b'o', method.path);
    text(&mut out, 3, b's', method.member);
    text(&mut out, 2, b's', method.interface);
    text(&mut out, 6, b's', method.service);
    if let Some(signature) = signature {
        out.resize(out.len().next_multiple_of(8), 0);
        out.extend([8, 1, b'g', 0, 1]);
        out.extend(signature.bytes());
        out.push(0);
    }
    if descriptors > 0 {
        out.resize(out.len().next_multiple_of(8), 0);
        out.extend([9, 1, b'u', 0]);
        out.extend(descriptors.to_le_bytes());
    }
    let fields = u32::try_from(out.len() - 16).unwrap_or(0);
    out[12..16].copy_from_slice(&fields.to_le_bytes());
    out.resize(out.len().next_multiple_of(8), 0);
    out.extend(body.into_iter().flatten());
    out
}

/// The byte order of a message: the bus passes on what the sender chose.
#[derive(Debug, Clone, Copy)]
enum Order {
    Little,
    Big,
}

impl Order {
    fn of(mark: u8) -> io::Result<Self> {
        match mark {
            b'l' => Ok(Self::Little),
            b'B' => Ok(Self::Big),
            _ => Err(wrong("the other side does not speak D-Bus")),
        }
    }

    fn number(self, from: &[u8], at: usize) -> io::Result<u32> {
        let bytes = from.get(at..).and_then(|rest| rest.first_chunk::<4>()).ok_or_else(short)?;
        Ok(match self {
            Self::Little => u32::from_le_bytes(*bytes),
            Self::Big => u32::from_be_bytes(*bytes),
        })
    }

    /// A string or an object path at `at`, and where it ends.
    fn text(self, from: &[u8], at: usize) -> io::Result<(&str, usize)> {
        let at = at.next_multiple_of(4);
        let end = (at + 4).saturating_add(self.number(from, at)? as usize);
        let text = from.get(at + 4..end).ok_or_else(short)?;
        Ok((std::str::from_utf8(text).map_err(|_| wrong("a text of the bus is no UTF-8"))?, end + 1))
    }
}

/// The answer in `message`, whose fields have `fields` bytes from 16 on and whose body begins at `start`; none when it is
/// not to the call `serial`.
fn decode(order: Order, message: &[u8], fields: usize, start: usize, serial: u32) -> io::Result<Option<Answer>> {
    let (header, body) = (message.get(..16 + fields).ok_or_else(short)?, message.get(start..).ok_or_else(short)?);
    let (mut to, mut error, mut signature) = (None, None, "");
    let mut at = 16;
    while at < header.len() {
        let code = header[at];
        // A field's value is a variant: a signature of one type, then the value.
        let kind = match header.get(at + 1..at + 4) {
            Some([1, kind, 0]) => *kind,
            _ => return Err(wrong("a field of the bus is not readable")),
        };
        at += 4;
        match kind {
            b's' | b'o' => {
                let (text, end) = order.text(header, at)?;
                if code == 4 {
                    error = Some(text);
                }
                at = end;
            }
            b'u' => {
                let number = order.number(header, at)?;
                if code == 5 {
                    to = Some(number);
                }
                at += 4;
            }
            b'g' => {
                let length = usize::from(*header.get(at).ok_or_else(short)?);
                let text = header.get(at + 1..at + 1 + length).ok_or_else(short)?;
                if code == 8 {
                    signature = std::str::from_utf8(text).map_err(|_| wrong("a signature is no text"))?;
                }
                at += length + 2;
            }
            _ => return Err(wrong("a field of the bus is not readable")),
        }
        at = at.next_multiple_of(8);
    }
    if to != Some(serial) {
        return Ok(None);
    }
    let mut strings = Vec::new();
    let mut at = 0;
    for _ in signature.bytes().take_while(|kind| matches!(kind, b's' | b'o')) {
        let (text, end) = order.text(body, at)?;
        strings.push(text.to_owned());
        at = end;
    }
    Ok(match (message[1], error) {
        (2, _) => Some(Answer::Strings(strings)),
        (3, Some(name)) => Some(Answer::Error(name.to_owned(), strings.into_iter().next().unwrap_or_default())),
        _ => return Err(wrong("an answer of the bus is neither a return nor an error")),
    })
}

fn short() -> io::Error {
    wrong("a message of the bus ends too early")
}

fn wrong(what: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

#[cfg(test)]
mod tests;
