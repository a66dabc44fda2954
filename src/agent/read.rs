//! From the files of a bundle to a workload, with what is kept of it. On a thread of its own: a bundle that cannot be read,
//! or never to its end, is its own workload's trouble alone.

use super::control;
use crate::{
    bundle::{Bundle, BundleDir, BundleErrors},
    config::WorkloadConfig,
    files::{Root, ask_root, is_denied},
    identity,
    spiffe::SpiffeId,
    status::Identity,
    time::Clock,
    workload::{HostFacts, Workload},
};
use std::sync::Arc;

/// What was read.
#[derive(Debug)]
pub(super) struct Read {
    pub(super) workload: Arc<Workload>,
    pub(super) settings: WorkloadConfig,
    /// What the store holds for it, unless it is who it was.
    pub(super) identity: Option<Identity>,
}

/// Reads the bundle of the workload `name`, which is `known` as this already, with its settings on top. Mistakes are told
/// in the journal, too.
pub(super) fn read(
    root: &Root,
    name: &str,
    dir: &BundleDir,
    settings: WorkloadConfig,
    known: Option<&SpiffeId>,
    clock: Clock,
) -> Result<Read, Vec<String>> {
    for credential in &dir.hidden {
        tracing::warn!(
            workload = name,
            "the credential {} is not used, for the bundle's directory has this file, too: remove one of them",
            credential.display()
        );
    }
    let workload = parse(root, name, dir, &settings).inspect_err(|mistakes| {
        for mistake in mistakes {
            tracing::error!(workload = name, "the bundle cannot be used: {mistake}");
        }
        if dir.files().any(is_denied) {
            ask_root(root);
        }
    })?;
    let identity = (known != Some(&workload.id)).then(|| {
        let wanted = control::wanted(&workload, &settings.identity, root);
        identity::load(&wanted, clock.now())
    });
    Ok(Read { workload: Arc::new(workload), settings, identity })
}

fn parse(root: &Root, name: &str, dir: &BundleDir, settings: &WorkloadConfig) -> Result<Workload, Vec<String>> {
    let texts = |errors: BundleErrors| errors.0.iter().map(ToString::to_string).collect::<Vec<_>>();
    let bundle = Bundle::read(root, dir).map_err(texts)?;
    bundle.workload(name, &control::overrides(settings), &HostFacts { host_name: host_name() }).map_err(texts)
}

fn host_name() -> String {
    nix::unistd::gethostname().ok().and_then(|name| name.into_string().ok()).unwrap_or_else(|| "localhost".to_owned())
}
