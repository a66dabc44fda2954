//! The first process of a container is left the children of those that have ended before them, and has to take note of
//! their ends: else each stays a zombie, until no process can be started any more.

use nix::{
    sys::wait::{WaitPidFlag, waitpid},
    unistd::Pid,
};
use std::{collections::BTreeSet, fs, time::Duration};
use tokio::{
    signal::unix::{SignalKind, signal},
    time::sleep,
};

/// Who has been dead for this long is nobody's: the ends of our own children are taken note of at once, by those who wait
/// for them.
const MOURNING: Duration = Duration::from_secs(2);

/// Takes note of the ends of other people's children, for ever. For the first process alone.
pub async fn reap_orphans() {
    let mut deaths = match signal(SignalKind::child()) {
        Ok(deaths) => deaths,
        Err(error) => return tracing::warn!(cause = %error, "processes that others leave behind stay as zombies"),
    };
    let mut known = BTreeSet::new();
    loop {
        if known.is_empty() {
            deaths.recv().await;
        }
        sleep(MOURNING).await;
        let dead = dead_children();
        for pid in dead.intersection(&known) {
            let _ = waitpid(*pid, Some(WaitPidFlag::WNOHANG));
        }
        known = dead.difference(&known).copied().collect();
    }
}

#[expect(clippy::disallowed_methods, reason = "nobody but the kernel writes /proc")]
/// Our children that are zombies now, as `/proc` shows them.
fn dead_children() -> BTreeSet<Pid> {
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    let numbers = processes.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    let dead = |number: &i32| {
        let stat = fs::read_to_string(format!("/proc/{number}/stat")).unwrap_or_default();
        // The name stands in parentheses, and may hold any.
        let after = stat.rsplit_once(") ").map(|(_, after)| after).unwrap_or_default();
        let mut fields = after.split(' ');
        fields.next() == Some("Z") && fields.next() == Some(&std::process::id().to_string())
    };
    numbers.filter(dead).map(Pid::from_raw).collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use std::process::Command;

    #[test]
    fn a_child_is_seen_when_it_is_dead() {
        let mut child = Command::new("cat").stdin(std::process::Stdio::piped()).spawn().unwrap();
        let pid = Pid::from_raw(i32::try_from(child.id()).unwrap());
        assert!(!dead_children().contains(&pid));
        drop(child.stdin.take());
        while !dead_children().contains(&pid) {
            std::thread::yield_now();
        }
        child.wait().unwrap();
        assert!(!dead_children().contains(&pid));
    }
}
