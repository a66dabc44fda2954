//! Who reads at full speed while certificates are switched, and what each kind of reader may rely on.
#![allow(clippy::unwrap_used, clippy::print_stdout)]

use crate::{
    files::{Host, NAMES, issue, mesh, texts},
    readme,
};
use std::{
    fs,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Instant, SystemTime},
};
use we_agent::publish::{Content, Layout, SingleFile};

/// Switches in a run of everybody's tests; `make soak` asks for a million.
const SWITCHES: usize = 100_000;

/// What one reader has met.
#[derive(Debug, Default)]
struct Met {
    pinned: usize,
    combined: usize,
    /// The generation was gone before it was read: three successors have come since the link was resolved.
    gone: usize,
    two_paths: usize,
    /// Key and certificate of two generations: what no writer can spare who opens two paths.
    torn: usize,
}

/// Everything that belongs together. There are few, and most differ early: no hash is as fast as comparing.
struct Known {
    sets: Vec<[String; 3]>,
    files: Vec<String>,
}

fn read_all(dir: &Path, known: &Known, met: &mut Met) {
    let pinned = dir.join(fs::read_link(dir.join("..data")).unwrap());
    match NAMES.map(|name| fs::read_to_string(pinned.join(name))) {
        [Ok(key), Ok(chain), Ok(roots)] => {
            assert!(known.sets.contains(&[key, chain, roots]), "a mismatch below a resolved directory");
            met.pinned += 1;
        }
        _ => met.gone += 1,
    }
    let combined = fs::read_to_string(dir.join("combined.pem")).unwrap();
    assert!(known.files.contains(&combined), "a combined file that is not whole");
    met.combined += 1;
    if let [Ok(key), Ok(chain), Ok(roots)] = NAMES.map(|name| fs::read_to_string(dir.join(name))) {
        met.two_paths += 1;
        met.torn += usize::from(!known.sets.contains(&[key, chain, roots]));
    }
}

fn read_until(stop: &AtomicBool, dir: &Path, known: &Known) -> Met {
    let mut met = Met::default();
    while !stop.load(Ordering::Relaxed) {
        read_all(dir, known, &mut met);
    }
    met
}

#[test]
fn a_resolved_directory_and_a_combined_file_never_show_a_mismatch() {
    let switches = std::env::var("WE_AGENT_SWITCHES").map_or(SWITCHES, |count| count.parse().unwrap());
    let (host, authority, now) = (Host::new(), mesh(), SystemTime::now());
    let combined = SingleFile { name: "combined.pem".to_owned(), content: Content::Combined };
    let outputs = [host.files(Layout::Generations), host.files(Layout::Single(combined))];
    let contexts: Vec<_> = (0..8).map(|_| issue(&authority, now)).collect();
    let sets: Vec<_> = contexts.iter().map(|context| texts(context)).collect();
    let files = sets.iter().map(|[key, chain, _]| format!("{key}{chain}")).collect();
    let switch = |turn: usize| {
        for output in &outputs {
            output.publish(&contexts[turn % contexts.len()], now).unwrap();
        }
    };
    switch(0);
    let (dir, known, stop): (PathBuf, _, _) =
        (outputs[0].path(), Known { sets, files }, Arc::new(AtomicBool::new(false)));
    let stopped = Arc::clone(&stop);
    let reader = std::thread::spawn(move || read_until(&stopped, &dir, &known));
    let began = Instant::now();
    for turn in 1..=switches {
        switch(turn);
        if reader.is_finished() {
            break; // it has met a mismatch
        }
    }
    stop.store(true, Ordering::Relaxed);
    let met = reader.join().unwrap();
    println!("{switches} switches in {:.1} s: {met:?}", began.elapsed().as_secs_f32());
    assert!(met.pinned > switches / 20 && met.combined > switches / 20, "the reader was not awake: {met:?}");
}

#[test]
fn a_shell_gets_a_pair_too() {
    let (host, now) = (Host::new(), SystemTime::now());
    let (files, context) = (host.files(Layout::Generations), issue(&mesh(), now));
    files.publish(&context, now).unwrap();
    let script = readme::example_in(&files.path(), readme::RESOLVED);
    let read = std::process::Command::new("sh").args(["-c", &script]).output().unwrap();
    let [key, chain, _] = texts(&context);
    assert_eq!(String::from_utf8(read.stdout).unwrap(), key + &chain);
}
