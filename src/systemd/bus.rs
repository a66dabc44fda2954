//! As much of D-Bus as one question needs: call a method on the system bus, with at most one descriptor, and read the
//! answer (D-Bus Specification 0.43: "Authentication Protocol", "Message Protocol", "Marshaling"). zbus can do all of it,
//! with sixty crates and a task for each connection, which is much for one question to one service.
//!
//! Every user of the host may send messages to us as soon as we are on the bus. Only an answer of whom we asked counts;
//! for all else there is no bound but time.

mod wire;

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
use wire::Head;

/// An answer is a name or two; more than this is none to our question, in bytes.
const MAX_ANSWER: usize = 64 * 1024;

/// Which method is called.
#[derive(Debug, Clone, Copy)]
pub(super) struct Method<'a> {
    /// The name on the bus of whom it is a method, and who alone may answer. The bus gives each connection one
    /// (`:1.42`) that is never another's; a service's own name is not what its answers come from.
    pub(super) of: &'a str,
    pub(super) path: &'static str,
    pub(super) interface: &'static str,
    pub(super) member: &'static str,
}

/// The one argument of a call.
#[derive(Debug, Clone, Copy)]
pub(super) enum Argument<'a> {
    None,
    Number(u32),
    Text(&'a str),
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
        match bus.ask_bus("Hello", Argument::None).await? {
            Answer::Strings(_) => Ok(bus),
            Answer::Error(..) => Err(wrong("the bus does not answer the greeting")),
        }
    }

    /// The connection that has this name of a service now.
    ///
    /// # Errors
    /// When nobody has it, and as of [`Bus::call`].
    pub(super) async fn owner(&mut self, service: &str) -> io::Result<String> {
        match self.ask_bus("GetNameOwner", Argument::Text(service)).await? {
            Answer::Strings(names) => names.into_iter().next().ok_or_else(|| wrong("the bus answers without a name")),
            Answer::Error(_, text) => Err(io::Error::new(io::ErrorKind::NotFound, text)),
        }
    }

    async fn ask_bus(&mut self, member: &'static str, argument: Argument<'_>) -> io::Result<Answer> {
        let interface = wire::BUS;
        self.call(Method { of: wire::BUS, path: "/org/freedesktop/DBus", interface, member }, argument).await
    }

    /// Whether a descriptor can be an argument.
    pub(super) fn takes_descriptors(&self) -> bool {
        self.descriptors
    }

    /// Calls and waits for the answer; the caller sets the bound on time.
    ///
    /// # Errors
    /// When the connection breaks or what comes is no D-Bus.
    pub(super) async fn call(&mut self, method: Method<'_>, argument: Argument<'_>) -> io::Result<Answer> {
        self.serial += 1;
        let message = wire::call(self.serial, method, argument);
        let sent = match argument {
            Argument::Descriptor(fd) => self.send_with(&message, fd).await?,
            Argument::None | Argument::Number(_) | Argument::Text(_) => 0,
        };
        self.stream.write_all(&message[sent..]).await?;
        loop {
            if let Some(answer) = self.receive(method.of).await? {
                return Ok(answer);
            }
        }
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

    /// The next message; none when it is no answer of `from` to the last call. Descriptors in it would be closed by the
    /// kernel.
    async fn receive(&mut self, from: &str) -> io::Result<Option<Answer>> {
        let mut head = [0; wire::HEAD];
        self.stream.read_exact(&mut head).await?;
        let head = Head::of(&head)?;
        if !head.is_answer() || head.rest() > MAX_ANSWER {
            let mut passed = (&mut self.stream).take(head.rest() as u64);
            tokio::io::copy_buf(&mut passed, &mut tokio::io::sink()).await?;
            return Ok(None);
        }
        let mut rest = vec![0; head.rest()];
        self.stream.read_exact(&mut rest).await?;
        head.answer(&rest, self.serial, from)
    }
}

async fn line(stream: &mut BufReader<UnixStream>) -> io::Result<String> {
    let mut line = Vec::new();
    // A line of the greeting is short; the limit makes a longer one an error below.
    stream.take(512).read_until(b'\n', &mut line).await?;
    let line = line.strip_suffix(b"\r\n").ok_or_else(|| wrong("the other side does not speak D-Bus"))?;
    String::from_utf8(line.to_vec()).map_err(|_| wrong("the other side does not speak D-Bus"))
}

fn wrong(what: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

#[cfg(test)]
mod tests;
