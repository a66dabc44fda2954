//! What root does for the agent in `/etc/we-agent`, before it starts and when it asks: root, who copied a bundle, and the
//! group that the agent runs as may read it, and nobody else; only root may change it. So a token that has served is removed
//! here, too. Nothing is followed, and nothing is read but what the agent asks for.

use super::find::{FILES, OURS};
use crate::{
    files::{Dir, DirError, Removal, Root, asked_removal},
    workload::is_dns_label,
};
use nix::errno::Errno;
use std::path::Path;

/// The only file that is ever removed.
const TOKEN: &str = "istio-token";

/// What was done, besides giving files to the group.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Permitted {
    /// The workloads whose token was removed.
    pub removed: Vec<String>,
    /// What was left alone, with the reason.
    pub left: Vec<Left>,
}

/// Why something was left alone.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum Left {
    /// It is not what it should be, or the system refused.
    #[error(transparent)]
    Dir(#[from] DirError),
    /// The agent asks for more than it was given.
    #[error("the token of {0} stays, for the configuration does not say that it is removed (identity.removeToken)")]
    NotRemovable(String),
}

/// Gives the five files of each bundle in `/etc/we-agent` to us and `group`, 0640, and their directories, 0750. Removes the
/// tokens that the agent asks to have removed, of workloads that are `removable`.
///
/// # Errors
/// When `/etc/we-agent` cannot be listed or let the group in. That it does not exist is no error.
pub fn permit(root: &Root, group: u32, removable: impl Fn(&str) -> bool) -> Result<Permitted, DirError> {
    let top = match Dir::open(root, Path::new(OURS)) {
        Err(DirError::Io { errno: Errno::ENOENT, .. }) => return Ok(Permitted::default()),
        opened => opened?,
    };
    if !top.is_open_to_all()? {
        top.give_itself(group)?;
    }
    let mut done = Permitted::default();
    for name in top.names()?.into_iter().filter(|name| is_dns_label(name)) {
        match top.enter(&name) {
            Ok(dir) => {
                match remove_token(root, &dir, &name, &removable) {
                    Ok(true) => done.removed.push(name),
                    Ok(false) => {}
                    Err(left) => done.left.push(left),
                }
                done.left.extend(give(&dir, group).into_iter().map(Left::from));
            }
            // A link, or a file, which is none of ours.
            Err(DirError::Io { errno: Errno::ENOTDIR | Errno::ELOOP, path, .. }) => {
                done.left.extend(top.target(&name).is_ok().then_some(DirError::NotPlain(path).into()));
            }
            Err(error) => done.left.push(error.into()),
        }
    }
    Ok(done)
}

/// Whether the token in `dir` was removed, because the agent has asked for that one.
fn remove_token(root: &Root, dir: &Dir, name: &str, removable: impl Fn(&str) -> bool) -> Result<bool, Left> {
    let Some(served) = asked_removal(root, name)? else { return Ok(false) };
    if !removable(name) {
        return Err(Left::NotRemovable(name.to_owned()));
    }
    match dir.remove_seen(TOKEN, served)? {
        Removal::Removed => Ok(true),
        Removal::Gone | Removal::Another => Ok(false),
        Removal::Linked => Err(DirError::NotPlain(dir.path().join(TOKEN)).into()),
    }
}

/// One directory; one without any of the files is no bundle and stays as it is.
fn give(dir: &Dir, group: u32) -> Vec<DirError> {
    let given: Vec<_> = FILES.iter().map(|file| dir.give(file, group)).collect();
    let is_bundle = given.iter().any(|given| !matches!(given, Ok(false)));
    let itself = is_bundle.then(|| dir.give_itself(group));
    given.into_iter().map(|given| given.map(drop)).chain(itself).filter_map(Result::err).collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::files::{Stamp, ask_no_more, ask_removal};
    use std::{
        fs,
        os::unix::fs::{MetadataExt, PermissionsExt, symlink},
        path::PathBuf,
    };

    struct Host(tempfile::TempDir);

    impl Host {
        fn new() -> Self {
            Self(tempfile::tempdir().unwrap())
        }

        fn path(&self, path: &str) -> PathBuf {
            self.0.path().join("etc/we-agent").join(path)
        }

        fn put(&self, path: &str, mode: u32) {
            let path = self.path(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(&path, "x").unwrap();
            fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
        }

        fn mode(&self, path: &str) -> u32 {
            fs::symlink_metadata(self.path(path)).unwrap().permissions().mode() & 0o7777
        }

        fn set(&self, path: &str, mode: u32) {
            fs::set_permissions(self.path(path), fs::Permissions::from_mode(mode)).unwrap();
        }

        /// As root does it, or by a user for a group of its own.
        fn permit(&self) -> Vec<String> {
            self.answer().left.iter().map(|e| e.to_string().replace(&self.path("").display().to_string(), "")).collect()
        }

        fn answer(&self) -> Permitted {
            permit(&self.root(), self.group(), |name| name == "orders").unwrap()
        }

        fn root(&self) -> Root {
            Root::new(self.0.path())
        }

        fn group(&self) -> u32 {
            if nix::unistd::geteuid().is_root() { 4242 } else { nix::unistd::getegid().as_raw() }
        }
    }

    #[test]
    fn what_istioctl_wrote_becomes_readable_for_the_group_alone() {
        let host = Host::new();
        for file in FILES {
            host.put(&format!("payments/{file}"), 0o744);
            host.put(&format!("orders/{file}"), 0o600);
        }
        host.set("payments", 0o744);
        host.set("orders", 0o700);
        host.set("", 0o700);
        host.put("payments/notes", 0o604);
        host.put("other/secret", 0o600);
        host.put("we-agent.yaml", 0o644);
        host.put("Bad_Name/istio-token", 0o600);
        host.set("other", 0o700);
        assert_eq!(host.permit(), Vec::<String>::new());
        for file in FILES {
            for path in [format!("payments/{file}"), format!("orders/{file}")] {
                assert_eq!(host.mode(&path), 0o640, "{path}");
                assert_eq!(fs::metadata(host.path(&path)).unwrap().gid(), host.group());
            }
        }
        assert_eq!(["", "payments", "orders"].map(|dir| host.mode(dir)), [0o750; 3]);
        // Nothing but bundles.
        let others = ["payments/notes", "other", "other/secret", "we-agent.yaml", "Bad_Name/istio-token"];
        assert_eq!(others.map(|path| host.mode(path)), [0o604, 0o700, 0o600, 0o644, 0o600]);
        // A second time nothing changes, so nobody who watches is woken.
        let changed = || fs::metadata(host.path("payments/istio-token")).map(|m| (m.ctime(), m.ctime_nsec())).unwrap();
        let before = changed();
        assert_eq!(host.permit(), Vec::<String>::new());
        assert_eq!(changed(), before);
    }

    #[test]
    fn no_link_leads_elsewhere() {
        let host = Host::new();
        host.put("payments/cluster.env", 0o600);
        host.put("elsewhere/shadow", 0o600);
        host.set("elsewhere", 0o700);
        let shadow = host.path("elsewhere/shadow");
        symlink(&shadow, host.path("payments/istio-token")).unwrap();
        fs::hard_link(&shadow, host.path("payments/hosts")).unwrap();
        nix::unistd::mkfifo(&host.path("payments/mesh.yaml"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        fs::create_dir(host.path("payments/root-cert.pem")).unwrap();
        symlink(host.path("elsewhere"), host.path("linked")).unwrap();
        let left = host.permit();
        assert_eq!(left.len(), 5, "{left:#?}");
        let named =
            ["linked", "payments/hosts", "payments/istio-token", "payments/mesh.yaml", "payments/root-cert.pem"];
        for name in named {
            assert!(left.iter().any(|told| told.starts_with(&format!("{name} is a link, or"))), "{name}: {left:#?}");
        }
        assert_eq!(["elsewhere/shadow", "elsewhere"].map(|path| host.mode(path)), [0o600, 0o700]);
        assert_eq!(host.mode("payments/cluster.env"), 0o640, "the others are not held up");
        assert_eq!(permit(&Root::new(host.path("nowhere")), 0, |_| false), Ok(Permitted::default()));
    }

    #[test]
    fn the_token_that_was_asked_for_goes_and_nothing_else() {
        let host = Host::new();
        for name in ["orders", "payments"] {
            for file in FILES {
                host.put(&format!("{name}/{file}"), 0o600);
            }
        }
        let ask = |name: &str| {
            let stamp = Stamp::of(&host.path(name).join(TOKEN)).unwrap();
            ask_removal(&host.root(), name, stamp).unwrap();
        };
        ask("payments");
        assert_eq!(host.answer().left, [Left::NotRemovable("payments".to_owned())], "the agent alone wants it");
        ask_no_more(&host.root(), "payments").unwrap();
        ask("orders");
        // Another one has come since.
        host.put("orders/new", 0o600);
        fs::rename(host.path("orders/new"), host.path("orders/istio-token")).unwrap();
        assert_eq!(host.answer(), Permitted::default());
        ask("orders");
        // It has a second name, so it would still be there.
        fs::hard_link(host.path("orders/istio-token"), host.path("copy")).unwrap();
        assert!(host.permit().iter().all(|told| told.starts_with("orders/istio-token is a link, or")));
        fs::remove_file(host.path("copy")).unwrap();
        assert_eq!(host.answer(), Permitted { removed: vec!["orders".to_owned()], left: vec![] });
        assert_eq!(host.answer(), Permitted::default(), "once");
        let left = |name: &str| FILES.map(|file| host.path(name).join(file).exists());
        assert_eq!((left("orders"), left("payments")), (FILES.map(|file| file != TOKEN), [true; 5]));
        // A link in its place leads nowhere.
        fs::rename(host.path("orders"), host.path("moved")).unwrap();
        symlink(host.path("payments"), host.path("orders")).unwrap();
        let stamp = Stamp::of(&host.path("payments/istio-token")).unwrap();
        ask_removal(&host.root(), "orders", stamp).unwrap();
        assert_eq!(host.answer().removed, Vec::<String>::new());
    }
}
