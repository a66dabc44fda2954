//! Generations behind one link, as Kubernetes keeps the content of a volume.

use super::{Access, CHAIN, Dir, DirError, KEY, Outcome, ROOTS, contents, says};
use crate::spiffe::X509Context;
use std::time::{Duration, SystemTime};

/// The link to the present generation.
const DATA: &str = "..data";
/// Everything that has not got its name yet: what is left of it belonged to a run that was killed.
const UNFINISHED: &str = "..unfinished-";
/// How many generations stay beside the present one, for readers that are slow, and how long after their successor
/// came: a reader needs milliseconds, so both are generous, and private keys do not pile up.
const KEPT: usize = 3;
const KEPT_FOR: Duration = Duration::from_secs(3600);

pub(super) fn publish(dir: &Dir, context: &X509Context, access: Access, now: SystemTime) -> Result<Outcome, DirError> {
    let names = dir.names()?;
    for name in names.iter().filter(|name| name.starts_with(UNFINISHED)) {
        dir.remove(name)?;
    }
    let links = missing_links(dir)?;
    let present = dir.target(DATA)?.and_then(|target| target.into_string().ok()).filter(|name| stamp(name).is_some());
    let said = present.as_ref().and_then(|name| dir.enter(name).ok()).is_some_and(|dir| says(&dir, context, access));
    let present = match present {
        Some(name) if said => name,
        _ => switch(dir, &names, context, access, now)?,
    };
    for name in &links {
        dir.link(&format!("{DATA}/{name}"), name)?;
    }
    if !links.is_empty() {
        dir.sync()?;
    }
    for name in superseded(&names, &present, now) {
        dir.remove(name)?;
    }
    Ok(if said && links.is_empty() { Outcome::Unchanged } else { Outcome::Written })
}

/// Which of the three names are not there yet. One that is there and leads elsewhere was not made by us.
fn missing_links(dir: &Dir) -> Result<Vec<&'static str>, DirError> {
    let mut missing = Vec::new();
    for name in [ROOTS, KEY, CHAIN] {
        match dir.target(name)? {
            None => missing.push(name),
            Some(target) if target == *format!("{DATA}/{name}") => {}
            Some(_) => return Err(DirError::InTheWay(dir.path().join(name))),
        }
    }
    Ok(missing)
}

/// Writes a generation and makes it the present one. Each step is durable before the next one needs it.
fn switch(
    dir: &Dir,
    names: &[String],
    context: &X509Context,
    access: Access,
    now: SystemTime,
) -> Result<String, DirError> {
    let stamp = next_stamp(names, now);
    let generation = format!("..{stamp:013}-{}", context.svid.serial());
    let (unfinished, link) = (format!("{UNFINISHED}{generation}"), format!("{UNFINISHED}data"));
    let new = dir.make(&unfinished)?;
    for (name, content) in contents(context) {
        new.write(name, content.as_bytes(), access)?;
    }
    new.finish(access)?;
    dir.rename(&unfinished, &generation)?;
    dir.link(&generation, &link)?;
    dir.sync()?;
    dir.rename(&link, DATA)?;
    dir.sync()?;
    Ok(generation)
}

/// `..<milliseconds since 1970>-<serial>`: when a generation was made.
fn stamp(name: &str) -> Option<u64> {
    let (stamp, serial) = name.strip_prefix("..")?.split_once('-')?;
    if serial.contains('/') { None } else { stamp.parse().ok() }
}

/// Milliseconds since 1970, but always after every generation that is there: clocks are set back.
fn next_stamp(names: &[String], now: SystemTime) -> u64 {
    let now = now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_millis();
    let last = names.iter().filter_map(|name| stamp(name)).max();
    u64::try_from(now).unwrap_or(u64::MAX).max(last.map_or(0, |last| last + 1))
}

/// The generations that may go now. `names` is sorted and may lack `present`.
fn superseded<'a>(names: &'a [String], present: &str, now: SystemTime) -> Vec<&'a str> {
    let now = now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let mut successor = stamp(present).unwrap_or(u64::MAX);
    let mut gone = Vec::new();
    let mut generations: Vec<_> =
        names.iter().filter_map(|n| Some((stamp(n)?, n.as_str()))).filter(|(_, n)| *n != present).collect();
    generations.sort_unstable();
    for (index, (stamp, name)) in generations.into_iter().rev().enumerate() {
        let age = now.saturating_sub(Duration::from_millis(successor));
        if index >= KEPT || age > KEPT_FOR {
            gone.push(name);
        }
        successor = stamp;
    }
    gone
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_generation_stays_for_an_hour_after_its_successor_and_at_most_three_do() {
        let at = |secs: u64| SystemTime::UNIX_EPOCH + Duration::from_secs(secs);
        let names: Vec<String> =
            ["..1000000-a", "..2000000-b", "..3000000-c", "..9000000-d", "..data", "key.pem", "..x"]
                .map(Into::into)
                .into();
        let gone = |present, now| superseded(&names, present, at(now));
        assert_eq!(gone("..9000000-d", 5_000), [""; 0], "nothing goes early");
        assert_eq!(gone("..9000000-d", 6_000), ["..1000000-a"]);
        assert_eq!(gone("..9000000-d", 7_000), ["..2000000-b", "..1000000-a"]);
        assert_eq!(gone("..9000000-d", 12_601), ["..3000000-c", "..2000000-b", "..1000000-a"]);
        assert_eq!(gone("..9900000-e", 5_000), ["..1000000-a"], "the fourth goes whatever the time");
    }

    #[test]
    fn stamps_grow_although_the_clock_does_not() {
        let names = ["..0000000005000-a".to_owned(), "..data".to_owned(), "..later/x-1".to_owned()];
        let at = |ms| SystemTime::UNIX_EPOCH + Duration::from_millis(ms);
        assert_eq!(next_stamp(&names, at(9000)), 9000);
        assert_eq!(next_stamp(&names, at(5000)), 5001);
        assert_eq!(next_stamp(&names, at(3)), 5001);
        assert_eq!(stamp("..unfinished-1"), None);
        assert_eq!(stamp("..12-../../x"), None);
    }
}
