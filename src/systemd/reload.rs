//! Asking systemd to reload somebody else's unit, although the agent is not root.
//!
//! The package has a path unit and a service, `we-agent-reload@UNIT.path` and `.service`, both root's. Enabling the first
//! for a unit is the host's consent that the agent may have this unit reloaded, and nothing else. The agent leaves a
//! request; the service takes it away before it reloads, so that a request which comes meanwhile makes another reload, and
//! says what came of it. So a request goes from `UNIT` to `UNIT.taken`, from there to `UNIT.done` if the reload succeeded,
//! and to `UNIT.ended` in any case. All files belong to the agent, and the service moves them as the agent's user, so a
//! link in their place gains nobody anything.
//!
//! Requests are numbered, and a later one counts for all before it: it was taken after they were made. So several workloads
//! can ask for the same unit.

use crate::files::{Access, Dir, DirError, Root};
use std::{path::Path, time::Duration};
use tokio::time::{Instant, sleep};

/// Where the requests are. A workload's directory beside it is named by a DNS label, which has no dot.
const REQUESTS: &str = "/run/we-agent/reload.d";
/// How often the answer is looked for.
const LOOK: Duration = Duration::from_millis(50);
/// In bytes, of a request; it has 21 at most.
const MAX_FILE: usize = 4096;

// What follows the unit in the names of the files, as above.
const MADE: &str = "";
const TAKEN: &str = ".taken";
const DONE: &str = ".done";
const ENDED: &str = ".ended";

/// Why a unit was not reloaded.
#[derive(Debug, thiserror::Error)]
pub enum ReloadError {
    /// The request cannot be written.
    #[error("no reload of {unit} can be asked for: {source}")]
    Request {
        /// What was to be reloaded.
        unit: String,
        /// What went wrong.
        source: DirError,
    },
    /// The request still lies there: the path unit does not run.
    #[error(
        "nobody takes the request to reload {0}: systemctl status {path} says why; systemctl enable --now {path} starts it",
        path = reload_units(.0).0
    )]
    NotTaken(String),
    /// It was taken, and the reload failed.
    #[error(
        "the reload of {0} failed: journalctl -u {service} and systemctl status {0} say why",
        service = reload_units(.0).1
    )]
    Failed(String),
    /// It was taken, and the reload still goes on.
    #[error("{0} was not reloaded in time: journalctl -u {service} says why", service = reload_units(.0).1)]
    NotEnded(String),
}

/// The path unit and the service that reload `unit`.
pub fn reload_units(unit: &str) -> (String, String) {
    (format!("we-agent-reload@{unit}.path"), format!("we-agent-reload@{unit}.service"))
}

/// Whether somebody who may has enabled the path unit for `unit` on this host, for good or until the next boot.
pub fn consents_to_reload(root: &Root, unit: &str) -> bool {
    let (path, _) = reload_units(unit);
    ["/etc", "/run", "/usr/lib", "/lib"].iter().any(|top| {
        let link = Path::new(top).join("systemd/system/paths.target.wants").join(&path);
        root.path(link).symlink_metadata().is_ok()
    })
}

/// Asks for a reload of `unit`, and waits until it is done, for at most `bound`. The request stays when nobody takes it.
///
/// # Errors
/// When it cannot be asked for, failed, or was not done in time.
pub async fn reload_unit(root: &Root, unit: &str, bound: Duration) -> Result<(), ReloadError> {
    let end = Instant::now() + bound;
    let failed = |source| ReloadError::Request { unit: unit.to_owned(), source };
    let (dir, ours) = ask(root, unit).map_err(failed)?;
    let reached = |stage| Ok(number(&dir, unit, stage).map_err(failed)? >= ours);
    loop {
        // In this order: what succeeded is done before it has ended.
        let ended = reached(ENDED)?;
        if reached(DONE)? {
            return Ok(());
        } else if ended {
            return Err(ReloadError::Failed(unit.to_owned()));
        } else if Instant::now() >= end {
            return Err(if reached(TAKEN)? { ReloadError::NotEnded } else { ReloadError::NotTaken }(unit.to_owned()));
        }
        sleep(LOOK).await;
    }
}

/// Makes a request with a number of its own. Nothing here waits, so nobody of this process comes between.
fn ask(root: &Root, unit: &str) -> Result<(Dir, u64), DirError> {
    let dir = Dir::create(root, Path::new(REQUESTS), Access::OWNER)?;
    let mut last = 0;
    // In the order in which a request passes, so that none is missed on its way.
    for stage in [MADE, TAKEN, DONE, ENDED] {
        last = last.max(number(&dir, unit, stage)?);
    }
    let ours = last.saturating_add(1);
    let unfinished = format!("{unit}.new");
    dir.remove(&unfinished)?;
    dir.write(&unfinished, format!("{ours}\n").as_bytes(), Access::OWNER)?;
    dir.rename(&unfinished, unit)?;
    Ok((dir, ours))
}

/// Of the request at this stage; zero when there is none.
fn number(dir: &Dir, unit: &str, stage: &str) -> Result<u64, DirError> {
    let text = dir.read(&format!("{unit}{stage}"), MAX_FILE)?.unwrap_or_default();
    Ok(std::str::from_utf8(&text).ok().and_then(|text| text.trim_end().parse().ok()).unwrap_or(0))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use std::{fs, path::PathBuf};

    const PATH_UNIT: &str = include_str!("../../systemd/we-agent-reload@.path");
    const SERVICE: &str = include_str!("../../systemd/we-agent-reload@.service");
    const UNIT: &str = "nginx.service";

    fn host() -> (tempfile::TempDir, Root) {
        let dir = tempfile::tempdir().unwrap();
        let root = Root::new(dir.path());
        (dir, root)
    }

    /// The values of `key` in a unit file, for our instance.
    fn values(file: &str, key: &str) -> Vec<String> {
        file.lines().filter_map(|l| l.strip_prefix(key)?.strip_prefix('=')).map(|v| v.replace("%i", UNIT)).collect()
    }

    /// The file that the path unit waits for.
    fn awaited(root: &Root) -> PathBuf {
        let [path] = &values(PATH_UNIT, "PathExists")[..] else { panic!("{PATH_UNIT}") };
        root.path(path)
    }

    /// Does what systemd would do with the lines `key` of the service.
    fn execute(root: &Root, key: &str) {
        for line in values(SERVICE, key) {
            let words: Vec<_> = line.split_whitespace().collect();
            if words[0] == "+/bin/sleep" {
                continue; // the pace, for which nobody waits
            }
            let [program, "--force", "--no-target-directory", from, to] = words[..] else { panic!("{line}") };
            let (from, to) = (root.path(from), root.path(to));
            match program {
                "/bin/mv" => fs::rename(from, to).unwrap(),
                "/bin/ln" => {
                    let _ = fs::remove_file(&to);
                    fs::hard_link(from, to).unwrap();
                }
                _ => panic!("{line}"),
            }
        }
    }

    /// The service runs: takes the request, and reloads with success or not.
    fn reload(root: &Root, success: bool) {
        execute(root, "ExecStartPre");
        assert!(!awaited(root).exists(), "a request that comes now makes another reload");
        if success {
            execute(root, "ExecStartPost");
        }
        execute(root, "ExecStopPost");
    }

    async fn requested(root: &Root) {
        let end = Instant::now() + Duration::from_secs(10);
        while !awaited(root).exists() {
            assert!(Instant::now() < end, "nothing was asked for");
            sleep(Duration::from_millis(1)).await;
        }
    }

    #[test]
    fn the_service_reloads_that_unit_and_nothing_else() {
        assert_eq!(values(SERVICE, "ExecStart"), ["+/bin/systemctl reload -- nginx.service"]);
        assert_eq!(values(SERVICE, "User"), ["we-agent"], "files are moved as the user that owns them");
        assert_eq!(values(PATH_UNIT, "WantedBy"), ["paths.target"], "where the consent is looked for");
    }

    const SOON: Duration = Duration::from_secs(10);
    const AT_ONCE: Duration = Duration::from_millis(1);

    #[tokio::test]
    async fn a_request_is_answered_as_the_reload_ended() {
        let (_dir, root) = host();
        for success in [true, false, true, true, false, false] {
            let asked = reload_unit(&root, UNIT, SOON);
            let service = async {
                requested(&root).await;
                reload(&root, success);
            };
            match tokio::join!(asked, service).0 {
                Ok(()) => assert!(success),
                Err(error) => {
                    assert!(!success && matches!(error, ReloadError::Failed(_)), "{error}");
                    let fix = "journalctl -u we-agent-reload@nginx.service.service";
                    assert!(error.to_string().contains(fix), "{error}");
                }
            }
        }
    }

    #[tokio::test]
    async fn several_who_ask_are_answered_by_one_reload() {
        for success in [true, false] {
            let (_dir, root) = host();
            let (one, other) = (reload_unit(&root, UNIT, SOON), reload_unit(&root, UNIT, SOON));
            // Runs when both have asked, and wait.
            let service = async { reload(&root, success) };
            let (one, other, ()) = tokio::join!(one, other, service);
            assert_eq!((one.is_ok(), other.is_ok()), (success, success));
        }
    }

    /// The one before it has failed, and the one after it was taken later than either was made.
    #[tokio::test]
    async fn a_later_reload_counts_and_an_earlier_one_does_not() {
        let (_dir, root) = host();
        let (first, ours, later) =
            (reload_unit(&root, UNIT, SOON), reload_unit(&root, UNIT, SOON), reload_unit(&root, UNIT, SOON));
        let asked_meanwhile = async {
            execute(&root, "ExecStartPre");
            let service = async {
                execute(&root, "ExecStopPost");
                sleep(2 * LOOK).await;
                reload(&root, true);
            };
            tokio::join!(ours, later, service)
        };
        let (first, (ours, later, ())) = tokio::join!(first, asked_meanwhile);
        assert!(matches!(first, Err(ReloadError::Failed(_))), "{first:?}");
        assert!(ours.is_ok() && later.is_ok(), "{ours:?} {later:?}");
    }

    #[tokio::test]
    async fn what_is_not_done_in_time_names_the_unit_to_look_at() {
        let (_dir, root) = host();
        for _ in 0..2 {
            let error = reload_unit(&root, UNIT, AT_ONCE).await.unwrap_err().to_string();
            assert!(error.contains("systemctl enable --now we-agent-reload@nginx.service.path"), "{error}");
        }
        let asked = reload_unit(&root, UNIT, Duration::from_millis(200));
        let service = async {
            requested(&root).await;
            execute(&root, "ExecStartPre"); // and the reload hangs
        };
        let error = tokio::join!(asked, service).0.unwrap_err();
        assert!(matches!(error, ReloadError::NotEnded(_)), "{error}");
        assert!(error.to_string().contains("journalctl -u we-agent-reload@nginx.service.service"), "{error}");
    }

    #[tokio::test]
    async fn a_file_that_is_no_request_is_none() {
        let (_dir, root) = host();
        ask(&root, UNIT).unwrap();
        for text in ["", "reload\n", "-1\n", "99999999999999999999999\n"] {
            fs::write(awaited(&root), text).unwrap();
            assert_eq!(ask(&root, UNIT).unwrap().1, 1, "{text}");
        }
    }

    #[test]
    fn consent_is_the_enabled_path_unit() {
        for top in ["etc", "run", "usr/lib"] {
            let (dir, root) = host();
            assert!(!consents_to_reload(&root, UNIT));
            let wants = dir.path().join(top).join("systemd/system/paths.target.wants");
            fs::create_dir_all(&wants).unwrap();
            let link = |unit: &str| {
                std::os::unix::fs::symlink("/usr/lib/systemd/system/we-agent-reload@.path", wants.join(unit)).unwrap();
            };
            link("we-agent-reload@haproxy.service.path");
            assert!(!consents_to_reload(&root, UNIT), "consent is for one unit");
            link("we-agent-reload@nginx.service.path");
            assert!(consents_to_reload(&root, UNIT));
        }
    }
}
