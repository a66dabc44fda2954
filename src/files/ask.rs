//! What only root may do for us. The agent leaves a request, `we-agent-permit.path` notices it, and `we-agent permit`, run as
//! root, does it. What root reads here is the agent's word: it says what is wanted, and nothing more.

use super::{Access, Dir, DirError, MAX_FILE, Root, Stamp};
use nix::errno::Errno;
use std::{fs::File, path::Path};

/// Ours, so that root goes no further than into it.
const RUN: &str = "/run/we-agent";
/// A file there for each token that is to go. A workload's directory beside it is named by a DNS label, which has no dot.
const REMOVALS: &str = "remove.d";

/// Asks root to let us, and nobody else, read what is in `/etc/we-agent` by now. Where nobody waits, nothing is lost.
pub fn ask_root(root: &Root) {
    // Told where it matters: with whatever cannot be read.
    let _ = File::create(root.path(RUN).join("permit"));
}

/// For root: whether there is a request.
pub fn is_root_asked(root: &Root) -> bool {
    root.path(RUN).join("permit").symlink_metadata().is_ok()
}

/// Asks root to remove the token of `workload`, as long as it is the one that `stamp` is of.
///
/// # Errors
/// When the request cannot be written.
pub fn ask_removal(root: &Root, workload: &str, stamp: Stamp) -> Result<(), DirError> {
    let dir = Dir::create(root, &Path::new(RUN).join(REMOVALS), Access::OWNER)?;
    let unfinished = format!("{workload}.new");
    dir.remove(&unfinished)?;
    // Numbers alone: there is nothing in it that JSON cannot say.
    dir.write(&unfinished, &serde_json::to_vec(&stamp).unwrap_or_default(), Access::OWNER)?;
    dir.rename(&unfinished, workload)?;
    ask_root(root);
    Ok(())
}

/// Takes that request back.
///
/// # Errors
/// When the system refuses.
pub fn ask_no_more(root: &Root, workload: &str) -> Result<(), DirError> {
    removals(root)?.map_or(Ok(()), |dir| dir.remove(workload))
}

/// For root: which token of `workload` is to go.
///
/// # Errors
/// When what lies there is no request.
pub fn asked_removal(root: &Root, workload: &str) -> Result<Option<Stamp>, DirError> {
    let Some(dir) = removals(root)? else { return Ok(None) };
    let Some(text) = dir.read(workload, MAX_FILE)? else { return Ok(None) };
    let wrong = |_| DirError::InTheWay(dir.path().join(workload));
    serde_json::from_slice(&text).map(Some).map_err(wrong)
}

/// Where they are, if there are any. The agent may have put a link there, which is not followed.
fn removals(root: &Root) -> Result<Option<Dir>, DirError> {
    match Dir::open(root, Path::new(RUN)).and_then(|dir| dir.enter(REMOVALS)) {
        Err(DirError::Io { errno: Errno::ENOENT, .. }) => Ok(None),
        opened => opened.map(Some),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use std::{fs, os::unix::fs::symlink};

    #[test]
    fn a_request_says_which_token_and_nothing_else_is_one() {
        let host = tempfile::tempdir().unwrap();
        let root = Root::new(host.path());
        let (token, dir) = (host.path().join("istio-token"), root.path("/run/we-agent/remove.d"));
        fs::write(&token, "x").unwrap();
        let stamp = Stamp::of(&token).unwrap();
        assert_eq!(asked_removal(&root, "payments"), Ok(None));
        for _ in 0..2 {
            ask_removal(&root, "payments", stamp).unwrap();
            assert_eq!(asked_removal(&root, "payments"), Ok(Some(stamp)));
            assert_eq!(asked_removal(&root, "orders"), Ok(None));
            assert!(is_root_asked(&root));
            fs::remove_file(root.path("/run/we-agent/permit")).unwrap();
            assert!(!is_root_asked(&root));
        }
        for text in ["", "istio-token", "{\"inode\":1}"] {
            fs::write(dir.join("payments"), text).unwrap();
            assert!(matches!(asked_removal(&root, "payments"), Err(DirError::InTheWay(_))), "{text}");
        }
        ask_no_more(&root, "payments").unwrap();
        assert_eq!(asked_removal(&root, "payments"), Ok(None));
        // Links, of a request and of all of them.
        ask_removal(&root, "orders", stamp).unwrap();
        symlink(dir.join("orders"), dir.join("payments")).unwrap();
        asked_removal(&root, "payments").unwrap_err();
        fs::rename(&dir, host.path().join("elsewhere")).unwrap();
        symlink(host.path().join("elsewhere"), &dir).unwrap();
        asked_removal(&root, "orders").unwrap_err();
    }
}
