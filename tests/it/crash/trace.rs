//! What strace has recorded of one run.
#![allow(clippy::unwrap_used)]

use std::collections::{BTreeMap, BTreeSet};

/// The child looks these paths up, so that its calls can be told from those of the test harness.
pub(super) const BEGIN: &str = "/we-agent-crash-begin";
pub(super) const END: &str = "/we-agent-crash-end";
/// Calls that change what is on the disk, or make it durable.
const WRITES: &str = "openat creat open write writev pwrite64 ftruncate fsync fdatasync rename renameat renameat2 \
    symlinkat linkat mkdirat unlinkat fchmod fchmodat fchown fchownat rmdir";
/// Calls that do not.
const READS: &str = "read pread64 close fstat newfstatat statx lseek getdents64 readlinkat fcntl geteuid getegid mmap \
    munmap mremap brk madvise futex getrandom rt_sigprocmask sigaltstack sched_yield clock_gettime \
    mprotect gettid getpid";

/// A call: its name, how many calls of that name the thread has made by then, and strace's line.
pub(super) type Call = (String, usize, String);

/// The most calls of one name that any thread has made before the act.
pub(super) fn before(log: &str) -> usize {
    let (before, _) = log.split_once(BEGIN).unwrap();
    let mut counts: BTreeMap<(&str, &str), usize> = BTreeMap::new();
    for line in before.lines() {
        let Some((pid, call)) = line.split_once(char::is_whitespace) else { continue };
        let Some((name, _)) = call.trim_start().split_once('(') else { continue };
        if WRITES.split_whitespace().any(|write| write == name) {
            *counts.entry((pid, name)).or_default() += 1;
        }
    }
    counts.into_values().max().unwrap()
}

/// The writing calls of one run, in order: name, how many calls of that name the process has made by then, and text.
pub(super) fn calls(log: &str) -> Vec<Call> {
    let mut counts: BTreeMap<(String, String), usize> = BTreeMap::new();
    let (mut inside, mut ended, mut calls) = (false, false, Vec::new());
    for line in log.lines() {
        let Some((pid, call)) = line.split_once(char::is_whitespace) else { continue };
        let Some((name, _)) = call.trim_start().split_once('(') else { continue };
        let count = counts.entry((pid.to_owned(), name.to_owned())).or_default();
        *count += 1;
        if call.contains(BEGIN) {
            inside = true;
        } else if call.contains(END) {
            (inside, ended) = (false, true);
        } else if inside && WRITES.split(' ').any(|write| write == name) {
            calls.push((name.to_owned(), *count, call.trim().to_owned()));
        } else {
            assert!(
                !inside || READS.split(' ').any(|read| read == name),
                "does {name} change the disk? put it into one of the two lists"
            );
        }
    }
    assert!(ended && !calls.is_empty(), "nothing was recorded");
    calls
}

/// What a power cut needs: a rename gives a name to nothing that is not synced, `..data` leads to no name that is not
/// synced, and nothing is left unsynced at the end. Removals may come back.
pub(super) fn assert_durable(calls: &[Call]) {
    let mut unsynced: BTreeSet<String> = BTreeSet::new(); // descriptors
    let mut same: BTreeMap<String, String> = BTreeMap::new(); // of the same directory
    for (name, _, text) in calls {
        let arguments = text.split_once('(').unwrap().1;
        let argument = |n: usize| arguments.split([',', ')']).nth(n).unwrap().trim().to_owned();
        let at = |n: usize| same.get(&argument(n)).cloned().unwrap_or(argument(n));
        match name.as_str() {
            "openat" => {
                let (dir, opened) = (at(0), text.rsplit("= ").next().unwrap().to_owned());
                assert!(!unsynced.contains(&opened), "closed before it was synced: {text}");
                same.remove(&opened);
                if argument(1) == r#"".""# {
                    same.insert(opened, dir);
                } else if text.contains("O_CREAT") {
                    unsynced.insert(dir);
                }
            }
            "write" | "mkdirat" => drop(unsynced.insert(at(0))),
            "symlinkat" => drop(unsynced.insert(at(1))),
            "fsync" => drop(unsynced.remove(&at(0))),
            "renameat" | "renameat2" => {
                let dir = at(0);
                assert!(unsynced.iter().all(|fd| *fd == dir), "not all is synced: {unsynced:?} at {text}");
                assert!(!text.contains(r#", "..data")"#) || unsynced.is_empty(), "leads to an unsynced name: {text}");
                unsynced.insert(dir);
            }
            _ => {}
        }
    }
    assert!(unsynced.is_empty(), "not synced in the end: {unsynced:?}");
}
