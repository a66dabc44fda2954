//! The driver without a fuzzer: the committed corpus, and some mutations of it.

use crate::{
    limit::{knock, used},
    mutate::mutated,
};
use fastrand::Rng;
use std::{
    cell::Cell,
    fs, io,
    panic::{self, AssertUnwindSafe},
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, PoisonError,
        mpsc::{self, RecvTimeoutError},
    },
    thread,
    time::Duration,
};
use we_agent::fuzz::Door;

/// Of a processor, for the mutations of one door; and the most of them.
const SPENT: Duration = Duration::from_millis(200);
const MOST: u32 = 2_000;
/// Whoever takes so long hangs, however busy the machine is.
const HANGS: Duration = Duration::from_secs(120);

thread_local! {
    /// Something has panicked, be it in a task that nobody waits for.
    static PANICKED: Cell<bool> = const { Cell::new(false) };
}

/// Where the inputs of a door are that stay: those that reach far, and those that once were too much.
fn corpus(door: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus").join(door)
}

/// The inputs in `dir`, always in the same order.
fn inputs(dir: &Path) -> io::Result<Vec<Vec<u8>>> {
    let files: io::Result<Vec<_>> = fs::read_dir(dir)?.map(|entry| Ok(entry?.path())).collect();
    let mut files = files?;
    files.sort();
    files.iter().map(fs::read).collect()
}

/// Knocks with these files alone, or with what is known of the door, and a little more.
pub(crate) fn run(door: Door, name: &str, files: &[String]) -> Result<u32, String> {
    if files.is_empty() {
        return replay(door, inputs(&corpus(name)).map_err(|error| format!("{name} has no corpus: {error}"))?);
    }
    listen();
    for file in files {
        let bytes = fs::read(file).map_err(|error| format!("{file}: {error}"))?;
        tried(door, &bytes).map_err(|fault| format!("{file}: {fault}"))?;
    }
    Ok(u32::try_from(files.len()).unwrap_or(u32::MAX))
}

/// Knocks with the `corpus` and with mutations of it: how often, or the first input that was too much.
fn replay(door: Door, corpus: Vec<Vec<u8>>) -> Result<u32, String> {
    listen();
    let current = Arc::new(Mutex::new(Vec::new()));
    let input = current.clone();
    let (tell, told) = mpsc::channel();
    thread::spawn(move || {
        let mut random = Rng::with_seed(0);
        // Whether to go on.
        let one = |bytes: Vec<u8>| {
            input.lock().unwrap_or_else(PoisonError::into_inner).clone_from(&bytes);
            let fault = tried(door, &bytes).err();
            let well = fault.is_none();
            tell.send(fault).is_ok() && well
        };
        if corpus.iter().all(|bytes| one(bytes.clone())) {
            let begun = used();
            let _ = (0..MOST).all(|_| used().saturating_sub(begun) < SPENT && one(mutated(&corpus, &mut random)));
        }
    });
    let mut knocks = 0;
    let fault = loop {
        match told.recv_timeout(HANGS) {
            Ok(None) => knocks += 1,
            Ok(Some(fault)) => break fault,
            Err(RecvTimeoutError::Timeout) => break format!("it has not returned within {HANGS:?}"),
            Err(RecvTimeoutError::Disconnected) => return Ok(knocks),
        }
    };
    let input = current.lock().unwrap_or_else(PoisonError::into_inner);
    Err(format!("{fault}; the input is b\"{}\"", input.escape_ascii()))
}

/// Knocks once; a panic is a fault, too.
fn tried(door: Door, bytes: &[u8]) -> Result<(), String> {
    PANICKED.set(false);
    let knocked = panic::catch_unwind(AssertUnwindSafe(|| knock(door, bytes)));
    match knocked {
        Ok(knocked) if !PANICKED.get() => knocked,
        _ => Err("it panicked".to_owned()),
    }
}

/// Hears of panics wherever they are; what they say is printed as ever.
fn listen() {
    let usual = panic::take_hook();
    panic::set_hook(Box::new(move |panic| {
        PANICKED.set(true);
        usual(panic);
    }));
}

#[cfg(test)]
mod tests {
    #![allow(clippy::print_stdout, clippy::unwrap_used)]
    use super::*;
    use std::collections::BTreeSet;
    use we_agent::fuzz::DOORS;

    /// One at a time: what is allocated is counted for the whole process.
    static TURN: Mutex<()> = Mutex::new(());

    #[test]
    fn every_door_stands_what_is_known_and_a_little_more() {
        let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        for (name, door) in DOORS {
            match run(*door, name, &[]) {
                Ok(knocks) => println!("{name}: {knocks} inputs"),
                Err(fault) => panic!("{name}: {fault}"),
            }
        }
    }

    #[test]
    fn the_corpus_is_small_without_keys_and_each_part_of_it_has_a_door() {
        let mut size = 0;
        let there = fs::read_dir(corpus("")).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
        let there: BTreeSet<_> = there.collect();
        assert_eq!(there, DOORS.iter().map(|(name, _)| (*name).to_owned()).collect());
        let inputs = there.iter().flat_map(|door| {
            let inputs = inputs(&corpus(door)).unwrap();
            assert!(!inputs.is_empty(), "{door} has no corpus");
            inputs
        });
        for input in inputs {
            size += input.len();
            let key = input.windows(11).any(|window| window == b"PRIVATE KEY");
            assert!(!key, "{}", input.escape_ascii());
        }
        assert!(size <= 200 << 10, "{size} bytes");
    }

    #[test]
    fn a_fault_of_a_door_is_seen() {
        let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        let said = |door: Door| replay(door, vec![b"x".to_vec()]).unwrap_err();
        assert!(said(|_| panic!("on purpose")).starts_with("it panicked; the input is b\"x\""));
        let unseen: Door = |_| drop(panic::catch_unwind(|| panic!("on purpose")));
        assert!(said(unseen).starts_with("it panicked"));
        assert!(said(|_| drop(std::hint::black_box(vec![1u8; 65 << 20]))).starts_with("it took 65 MiB"));
    }
}
