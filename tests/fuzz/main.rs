//! Gives whatever comes to its mind to every door of the agent (`we_agent::fuzz`).
//!
//! Built by `tests/fuzz/run` (`make fuzz`), it is libFuzzer on the door that `WE_FUZZ_DOOR` names. Built as everything else
//! it replays files, `we-fuzz DOOR FILE…`, or the committed corpus with some mutations, as its test does for every door.
#![cfg_attr(fuzzing, no_main)]

mod limit;
#[cfg(not(fuzzing))]
mod mutate;
#[cfg(not(fuzzing))]
mod replay;

use we_agent::fuzz::{DOORS, Door};

/// Counts what is allocated.
#[global_allocator]
static MEMORY: peak_alloc::PeakAlloc = peak_alloc::PeakAlloc;

/// The door of that name.
fn door(name: &str) -> Option<Door> {
    DOORS.iter().find(|(door, _)| *door == name).map(|(_, door)| *door)
}

#[cfg(fuzzing)]
libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    if let Err(fault) = limit::knock(*CHOSEN, bytes) {
        panic!("{fault}");
    }
});

/// Without a name, the names are told.
#[cfg(fuzzing)]
static CHOSEN: std::sync::LazyLock<Door> = std::sync::LazyLock::new(|| {
    let name = std::env::var("WE_FUZZ_DOOR").unwrap_or_default();
    door(&name).unwrap_or_else(|| {
        #[allow(clippy::print_stdout)]
        DOORS.iter().for_each(|(name, _)| println!("{name}"));
        std::process::exit(i32::from(!name.is_empty()));
    })
});

#[cfg(not(fuzzing))]
#[allow(clippy::print_stdout)]
fn main() -> std::process::ExitCode {
    let words: Vec<_> = std::env::args().skip(1).collect();
    let said = match &words[..] {
        [name, files @ ..] => door(name).map(|door| replay::run(door, name, files)),
        [] => None,
    };
    let names: Vec<_> = DOORS.iter().map(|(name, _)| *name).collect();
    match said.unwrap_or_else(|| Err(format!("we-fuzz DOOR [FILE…], and the doors are {}", names.join(" ")))) {
        Ok(knocks) => println!("{knocks} inputs"),
        Err(fault) => {
            println!("{fault}");
            return std::process::ExitCode::FAILURE;
        }
    }
    std::process::ExitCode::SUCCESS
}
