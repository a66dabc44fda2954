//! Asking systemd to reload somebody else's unit, although the agent is not root.
//!
//! The package has a path unit and a service, `we-agent-reload@UNIT.path` and `.service`, both root's. Enabling the first
//! for a unit is the host's consent that the agent may have this unit reloaded, and nothing else. The agent leaves a
//! request file; the service takes it away before it reloads, so that a request which comes meanwhile makes another
//! reload, and marks it done afterwards: `UNIT`, `UNIT.taken`, `UNIT.done`. All files belong to the agent, and the service
//! moves them as the agent's user, so a link in their place gains nobody anything.

use super::{Access, Dir, DirError, Root};
use std::{path::Path, time::Duration};
use tokio::time::{Instant, sleep};

/// Where the requests are. A workload's directory beside it is named by a DNS label, which has no dot.
const REQUESTS: &str = "/run/we-agent/reload.d";
/// How often the answer is looked for.
const LOOK: Duration = Duration::from_millis(50);
/// A request holds one line for each who asks, which are as many as there are workloads; of those that nobody answered the
/// oldest are dropped.
const MAX_LINES: usize = 256;
/// In bytes; a line has 17.
const MAX_FILE: usize = MAX_LINES * 17;

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
    /// It was taken, but nobody said that it is done.
    #[error("{0} was not reloaded in time: journalctl -u {service} says why", service = reload_units(.0).1)]
    NotDone(String),
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
/// When it cannot be asked for, or was not done in time.
pub async fn reload_unit(root: &Root, unit: &str, bound: Duration) -> Result<(), ReloadError> {
    let end = Instant::now() + bound;
    let failed = |source| ReloadError::Request { unit: unit.to_owned(), source };
    let id = format!("{:016x}", fastrand::u64(..));
    let dir = ask(root, unit, &id).map_err(failed)?;
    let done = format!("{unit}.done");
    while !lines(&dir, &done).map_err(failed)?.contains(&id) {
        if Instant::now() >= end {
            let waits = lines(&dir, unit).map_err(failed)?.contains(&id);
            return Err(if waits { ReloadError::NotTaken } else { ReloadError::NotDone }(unit.to_owned()));
        }
        sleep(LOOK).await;
    }
    Ok(())
}

/// Adds our line to the request that may be there already, say another workload's. Nothing here waits, so nobody of this
/// process comes between; if the service takes the old request meanwhile, the others get one reload more.
fn ask(root: &Root, unit: &str, id: &str) -> Result<Dir, DirError> {
    let dir = Dir::create(root, Path::new(REQUESTS), Access::OWNER)?;
    let mut request = lines(&dir, unit)?;
    request.drain(..(request.len() + 1).saturating_sub(MAX_LINES));
    request.push(id.to_owned());
    let unfinished = format!("{unit}.new");
    dir.remove(&unfinished)?;
    dir.write(&unfinished, format!("{}\n", request.join("\n")).as_bytes(), Access::OWNER)?;
    dir.rename(&unfinished, unit)?;
    Ok(dir)
}

fn lines(dir: &Dir, name: &str) -> Result<Vec<String>, DirError> {
    let text = dir.read(name, MAX_FILE)?.unwrap_or_default();
    Ok(String::from_utf8_lossy(&text).lines().map(str::to_owned).collect())
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
            let ["/bin/mv", "--force", "--no-target-directory", from, to] = words[..] else { panic!("{line}") };
            fs::rename(root.path(from), root.path(to)).unwrap();
        }
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

    #[tokio::test]
    async fn a_request_is_done_when_the_service_says_so() {
        let (_dir, root) = host();
        let asked = reload_unit(&root, UNIT, Duration::from_secs(10));
        let service = async {
            requested(&root).await;
            execute(&root, "ExecStartPre");
            assert!(!awaited(&root).exists(), "a request that comes now makes another reload");
            execute(&root, "ExecStartPost");
        };
        assert!(tokio::join!(asked, service).0.is_ok());
    }

    #[tokio::test]
    async fn two_who_ask_are_both_answered_by_one_reload() {
        let (_dir, root) = host();
        let (one, other) = (reload_unit(&root, UNIT, SOON), reload_unit(&root, UNIT, SOON));
        let service = async {
            requested(&root).await;
            while fs::read_to_string(awaited(&root)).unwrap().lines().count() < 2 {
                sleep(Duration::from_millis(1)).await;
            }
            execute(&root, "ExecStartPre");
            execute(&root, "ExecStartPost");
        };
        let (one, other, ()) = tokio::join!(one, other, service);
        assert!(one.is_ok() && other.is_ok());
    }

    const SOON: Duration = Duration::from_secs(10);
    const AT_ONCE: Duration = Duration::from_millis(1);

    #[tokio::test]
    async fn what_is_not_done_in_time_names_the_unit_to_look_at() {
        let (_dir, root) = host();
        for _ in 0..2 {
            let error = reload_unit(&root, UNIT, AT_ONCE).await.unwrap_err().to_string();
            assert!(error.contains("systemctl enable --now we-agent-reload@nginx.service.path"), "{error}");
        }
        for _ in 0..MAX_LINES {
            ask(&root, UNIT, "0123456789abcdef").unwrap();
        }
        assert_eq!(fs::read_to_string(awaited(&root)).unwrap().lines().count(), MAX_LINES);
        let asked = reload_unit(&root, UNIT, Duration::from_millis(200));
        let service = async {
            requested(&root).await;
            execute(&root, "ExecStartPre"); // and the reload fails
        };
        let error = tokio::join!(asked, service).0.unwrap_err().to_string();
        assert!(error.contains("journalctl -u we-agent-reload@nginx.service.service"), "{error}");
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
