#![allow(clippy::unwrap_used)]
use super::*;
use crate::telemetry::{sink::Form, stderr::Stderr};
use nix::{
    fcntl::{FcntlArg, OFlag, fcntl},
    sys::socket::{setsockopt, sockopt},
};
use std::{
    io::{BufRead, BufReader, Read},
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::UnixStream,
    },
    time::Instant,
};

const SOON: Duration = Duration::from_secs(60);

fn queue(stderr: Stderr) -> &'static Queue {
    Box::leak(Box::new(Queue::new(Sink { form: Form::Text, coloured: false, stderr })))
}

/// A pipe that is full after a page.
fn pipe() -> (Box<dyn Read + Send>, OwnedFd) {
    let (reader, writer) = std::io::pipe().unwrap();
    fcntl(&writer, FcntlArg::F_SETPIPE_SZ(4096)).unwrap();
    (Box::new(reader), writer.into())
}

/// What the journal gives a service as its stderr.
fn socket() -> (Box<dyn Read + Send>, OwnedFd) {
    let (reader, writer) = UnixStream::pair().unwrap();
    setsockopt(&writer, sockopt::SndBuf, &4096).unwrap();
    (Box::new(reader), writer.into())
}

/// A line that is longer than a page of a pipe, now and then.
fn words(n: u64) -> String {
    format!("{n} {}", "x".repeat(if n.is_multiple_of(10) { 10_000 } else { 10 }))
}

fn say(queue: &'static Queue, words: String) {
    queue.put(Record::note(words));
}

/// Of each line its first word of its own.
fn lines(reader: Box<dyn Read + Send>) -> impl Iterator<Item = String> {
    BufReader::new(reader).lines().map(|line| {
        let line = line.unwrap();
        line.split_once("WARN  ")
            .unwrap_or_else(|| panic!("{line} is not whole"))
            .1
            .split(' ')
            .next()
            .unwrap()
            .to_owned()
    })
}

#[test]
fn what_finds_no_room_is_counted_and_told_in_its_place() {
    for (reader, writer) in [pipe(), socket()] {
        let queue = queue(Stderr::of(writer.as_fd()).unwrap());
        // Whoever else has it finds it as it was.
        let flags = OFlag::from_bits_retain(fcntl(&writer, FcntlArg::F_GETFL).unwrap());
        assert!(!flags.contains(OFlag::O_NONBLOCK));
        let mut said = 0;
        while queue.dropped() < 3 {
            say(queue, words(said));
            said += 1;
        }
        let mut lines = lines(reader);
        for n in 0..said - 3 {
            assert_eq!(lines.next().unwrap(), n.to_string());
        }
        assert_eq!(lines.next().unwrap(), "3");
        queue.flush(SOON);
        say(queue, "again".to_owned());
        assert_eq!(lines.next().unwrap(), "again");
        assert!(!queue.lock().busy, "there is a thread, and nothing to write");
    }
}

#[test]
fn a_line_that_is_taken_at_once_takes_no_thread() {
    let file = tempfile::tempfile().unwrap();
    let ((_pipe, to_pipe), (_socket, to_socket)) = (pipe(), socket());
    for writer in [to_pipe, to_socket, file.into()] {
        let queue = queue(Stderr::of(writer.as_fd()).unwrap());
        say(queue, "one".to_owned());
        assert!(queue.lock().is_idle());
    }
}

#[test]
fn what_is_not_ours_to_open_is_written_all_the_same() {
    let (reader, writer) = pipe();
    let queue = queue(Stderr::waiting(writer));
    for n in 0..100 {
        say(queue, words(n));
    }
    let read: Vec<_> = lines(reader).take(100).collect();
    assert_eq!(read, (0..100).map(|n| n.to_string()).collect::<Vec<_>>());
}

#[test]
fn the_end_waits_for_the_last_line_and_not_for_a_reader_that_has_stopped() {
    let (reader, writer) = pipe();
    let queue = queue(Stderr::of(writer.as_fd()).unwrap());
    drop(writer);
    for n in 0..100 {
        say(queue, words(n));
    }
    let begun = Instant::now();
    queue.flush(Duration::from_millis(50));
    assert!(begun.elapsed() < SOON && !queue.lock().is_idle());
    let read = thread::spawn(|| lines(reader).take(100).count());
    queue.flush(SOON);
    assert!(queue.lock().is_idle());
    assert_eq!(read.join().unwrap(), 100);
}
