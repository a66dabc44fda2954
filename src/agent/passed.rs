//! What the service manager has passed and no workload has taken.

use super::outputs::{RUN, configured};
use crate::{config::Config, files::Root, systemd::Listeners};
use std::path::Path;

/// Lets go of the listeners that a process before us has asked to keep and that are not configured any more, and says
/// which others nobody serves. Those stay open: the bundle of their workload may come yet. `runs` says which workloads
/// have taken what is theirs.
pub(super) fn unclaimed(listeners: &Listeners, root: &Root, config: &Config, runs: impl Fn(&str) -> bool) {
    listeners.drop_kept_tcp();
    listeners.drop_kept(root, |path| is_awaited(path, root, config, &runs));
    for (socket, address) in listeners.left() {
        if let Some(address) = address {
            tracing::warn!(
                socket,
                "nobody serves {address}, which the service manager has passed, so who connects to it waits: put it into \
                 we-agent.yaml (workloads.<name>.inbound, listen: {address}), or disable the socket unit"
            );
        } else if runs(&socket) {
            tracing::warn!(
                socket,
                "its workload does not serve this socket that the service manager has passed, so who connects to it waits: \
                 disable the socket unit if socket.enabled is false, or leave it one ListenStream="
            );
        } else {
            tracing::warn!(
                socket,
                "no workload serves this socket that the service manager has passed, so who connects to it waits: put \
                 the bundle of its workload into place; in a socket unit, FileDescriptorName= must be the workload's name"
            );
        }
    }
}

/// Whether a workload that does not run, for its bundle is missing or broken, would serve its socket at `path`.
fn is_awaited(path: &Path, root: &Root, config: &Config, runs: impl Fn(&str) -> bool) -> bool {
    // Whoever is not configured by name may come as well, and has its directory.
    let owner = path.strip_prefix(root.path(RUN)).ok().and_then(|rest| rest.iter().next()?.to_str());
    let serves =
        |name: &str| configured(name, &config.workload(name).socket, root).any(|(_, place)| place.path() == path);
    config.workload_names().chain(owner).any(|name| !runs(name) && serves(name))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_socket_waits_for_its_workload_and_for_no_other() {
        let root = Root::new("/vm");
        let config = "{a: {socket: {also: [/run/a]}}, b: {socket: {also: [/run/b]}}, c: {socket: {enabled: false, also: [/run/c]}}}";
        let config = Config::parse(Path::new("x"), &format!("workloads: {config}")).unwrap();
        let awaited = |path: &str| is_awaited(&root.path(path), &root, &config, |name| name == "b");
        // Of a workload without a bundle, configured or not.
        assert!(awaited("/run/a") && awaited("/run/we-agent/a/agent.sock") && awaited("/run/we-agent/x/agent.sock"));
        // Of one that runs, and has taken what it wants.
        assert!(!awaited("/run/b") && !awaited("/run/we-agent/b/agent.sock"));
        // Of one that has none, and of nobody.
        assert!(!awaited("/run/c") && !awaited("/run/we-agent/c/agent.sock"));
        assert!(!awaited("/run/d") && !awaited("/run/we-agent/x/y.sock") && !awaited("/run/we-agent"));
    }
}
