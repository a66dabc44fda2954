//! Whether we may read a workload's token, and nobody else. Whoever is root mends both (`we-agent permit`).

use crate::{
    files::{Root, Versions, ask_root, is_denied},
    workload::token::TokenFile,
};
use nix::unistd::getegid;
use std::{fs, os::unix::fs::MetadataExt, path::Path};

/// Looks at the token when it is there first, and again whenever it has changed.
#[derive(Debug)]
pub(super) struct TokenLook {
    token: TokenFile,
    /// Which ones were looked at last.
    seen: Option<Versions>,
}

impl TokenLook {
    pub(super) fn new(token: &TokenFile) -> Self {
        Self { token: token.clone(), seen: None }
    }

    pub(super) fn look(&mut self, workload: &str, root: &Root) {
        let files = Versions::of(self.token.paths());
        if self.seen.as_ref() == Some(&files) {
            return;
        }
        self.seen = Some(files);
        let file = self.token.current();
        if is_denied(file) {
            tracing::warn!(
                workload,
                "the user that we-agent runs as may not read the token {}: {}",
                file.display(),
                self.token.remedy()
            );
        } else if let Some(who) = strangers(file) {
            tracing::warn!(
                workload,
                "{who} may read the token {}, as only root and the group of we-agent should: {}",
                file.display(),
                self.token.remedy()
            );
        } else {
            return;
        }
        ask_root(root);
    }
}

/// Who else may read the file, as far as its mode says.
fn strangers(file: &Path) -> Option<String> {
    let facts = fs::metadata(file).ok()?;
    let ours = facts.gid() == 0 || facts.gid() == getegid().as_raw();
    match facts.mode() {
        mode if mode & 0o004 != 0 => Some(format!("everybody (mode {:04o})", mode & 0o777)),
        mode if mode & 0o040 != 0 && !ours => Some(format!("group {} (mode {:04o})", facts.gid(), mode & 0o777)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn root_is_asked_once_for_each_change_that_calls_for_it() {
        let host = tempfile::tempdir().unwrap();
        let root = Root::new(host.path());
        let (token, request) = (host.path().join("istio-token"), root.path("/run/we-agent/permit"));
        fs::create_dir_all(request.parent().unwrap()).unwrap();
        let mode = |mode| fs::set_permissions(&token, fs::Permissions::from_mode(mode)).unwrap();
        let asked = |look: &mut TokenLook| {
            look.look("payments", &root);
            fs::remove_file(&request).is_ok()
        };
        fs::write(&token, "x").unwrap();
        mode(0o644);
        let mut look = TokenLook::new(&TokenFile::new(token.clone()));
        assert_eq!([asked(&mut look), asked(&mut look)], [true, false], "it is there first");
        mode(0o600);
        assert!(!asked(&mut look), "mended");
        mode(0o604);
        assert_eq!([asked(&mut look), asked(&mut look)], [true, false]);
        fs::remove_file(&token).unwrap();
        assert!(!asked(&mut look), "there is none");
    }

    #[test]
    fn a_token_for_everybody_is_noticed() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let told = |mode| {
            fs::set_permissions(file.path(), fs::Permissions::from_mode(mode)).unwrap();
            strangers(file.path())
        };
        assert_eq!([0o600, 0o640].map(told), [None, None]);
        assert_eq!(told(0o744).as_deref(), Some("everybody (mode 0744)"));
        assert_eq!(strangers(&file.path().join("none")), None);
        if nix::unistd::geteuid().is_root() {
            std::os::unix::fs::chown(file.path(), None, Some(4242)).unwrap();
            assert_eq!(told(0o640).as_deref(), Some("group 4242 (mode 0640)"));
            assert_eq!(told(0o600), None);
        }
    }
}
