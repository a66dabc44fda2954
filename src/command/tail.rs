//! What a command says: all of it is read, so that it never waits, and the end of it is kept.

use crate::text::one_line;
use nix::unistd::read;
use std::{
    convert::Infallible,
    future::pending,
    io::{self, PipeWriter, pipe},
    os::fd::OwnedFd,
};
use tokio::{io::AsyncReadExt, net::unix::pipe::Receiver};

/// That much of the end is kept, in bytes.
const KEPT: usize = 1024;
/// A pipe holds at most that many buffers of ours (pipe(7): 64 KiB).
const BUFFERS: usize = 64;
/// The longest line that is told, in characters.
const LONGEST_LINE: usize = 200;

/// The end of an output.
pub(super) struct Tail {
    pipe: Receiver,
    kept: Vec<u8>,
}

impl Tail {
    /// A new one, and where to write to.
    pub(super) fn new() -> io::Result<(Self, PipeWriter)> {
        let (reader, writer) = pipe()?;
        let pipe = Receiver::from_owned_fd(OwnedFd::from(reader))?;
        Ok((Self { pipe, kept: Vec::with_capacity(2 * KEPT) }, writer))
    }

    /// Reads, and never ends.
    pub(super) async fn follow(&mut self) -> Infallible {
        while matches!(self.pipe.read_buf(&mut self.kept).await, Ok(1..)) {
            self.shorten();
        }
        pending().await
    }

    /// The last line that says something, when all is over. Whoever still holds the pipe is not waited for.
    pub(super) fn last_line(mut self) -> String {
        let mut buffer = [0; KEPT];
        for _ in 0..BUFFERS {
            match read(&self.pipe, &mut buffer) {
                Ok(size @ 1..) => self.kept.extend_from_slice(&buffer[..size]),
                _ => break,
            }
            self.shorten();
        }
        last_line(&self.kept)
    }

    fn shorten(&mut self) {
        let surplus = self.kept.len().saturating_sub(KEPT);
        self.kept.drain(..surplus);
    }
}

/// The last line that says something, fit for a journal.
fn last_line(output: &[u8]) -> String {
    let output = String::from_utf8_lossy(output);
    let line = output.lines().map(str::trim).rfind(|line| !line.is_empty()).unwrap_or_default();
    one_line(line, LONGEST_LINE)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use std::io::Write;

    #[test]
    fn the_last_line_that_says_something() {
        assert_eq!(last_line(b""), "");
        assert_eq!(last_line(b"one\ntwo \r\n\n  \n"), "two");
        assert_eq!(last_line(b"\x1b[31mred\x07"), " [31mred ");
        assert_eq!(last_line(b"a\xff"), "a\u{fffd}");
        assert_eq!(last_line("ä".repeat(900).as_bytes()).chars().count(), LONGEST_LINE);
    }

    #[tokio::test]
    async fn the_end_is_kept_although_the_pipe_is_open() {
        let (tail, mut writer) = Tail::new().unwrap();
        writer.write_all(&[b'x'; 60_000]).unwrap();
        writer.write_all(b"\nthe end\n").unwrap();
        assert_eq!(tail.last_line(), "the end");
    }
}
