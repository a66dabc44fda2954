//! Who may read a bundle: root, who copied it, and the group that the agent runs as; nobody else. Done by root before the
//! agent starts, in directories that the agent's user may be able to write to: nothing is followed, nothing is read.

use super::find::{FILES, OURS};
use crate::{
    files::{Dir, DirError, Root},
    workload::is_dns_label,
};
use nix::errno::Errno;
use std::path::Path;

/// Gives the five files of each bundle in `/etc/we-agent` to us and `group`, 0640, and their directories, 0750; those of
/// workloads that are `removable` 0770, for the agent is to remove their token. Gives back what was left alone, with the
/// reason.
///
/// # Errors
/// When `/etc/we-agent` cannot be listed or let the group in. That it does not exist is no error.
pub fn permit(root: &Root, group: u32, removable: impl Fn(&str) -> bool) -> Result<Vec<DirError>, DirError> {
    let top = match Dir::open(root, Path::new(OURS)) {
        Err(DirError::Io { errno: Errno::ENOENT, .. }) => return Ok(Vec::new()),
        opened => opened?,
    };
    if !top.is_open_to_all()? {
        top.give_itself(group, false)?;
    }
    let mut left = Vec::new();
    for name in top.names()?.into_iter().filter(|name| is_dns_label(name)) {
        match top.enter(&name) {
            Ok(dir) => left.extend(bundle(&dir, group, removable(&name))),
            // A link, or a file, which is none of ours.
            Err(DirError::Io { errno: Errno::ENOTDIR | Errno::ELOOP, path, .. }) => {
                left.extend(top.target(&name).is_ok().then_some(DirError::NotPlain(path)));
            }
            Err(error) => left.push(error),
        }
    }
    Ok(left)
}

/// One directory; one without any of the files is no bundle and stays as it is.
fn bundle(dir: &Dir, group: u32, write: bool) -> Vec<DirError> {
    let given: Vec<_> = FILES.iter().map(|file| dir.give(file, group)).collect();
    let is_bundle = given.iter().any(|given| !matches!(given, Ok(false)));
    let itself = is_bundle.then(|| dir.give_itself(group, write));
    given.into_iter().map(|given| given.map(drop)).chain(itself).filter_map(Result::err).collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
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
            let left = permit(&Root::new(self.0.path()), self.group(), |name| name == "orders").unwrap();
            left.iter().map(|e| e.to_string().replace(&self.path("").display().to_string(), "")).collect()
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
        assert_eq!(["", "payments", "orders"].map(|dir| host.mode(dir)), [0o750, 0o750, 0o770]);
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
        assert_eq!(permit(&Root::new(host.path("nowhere")), 0, |_| false), Ok(Vec::new()));
    }
}
