//! Which roots are trusted: what the operator's file says now, and what the CA sent since.

use super::Error;
use crate::{
    files::{MAX_ROOTS, Versions, read_aside},
    spiffe::X509Bundle,
    status::Identity,
};
use std::{
    future::pending,
    path::{Path, PathBuf},
};
use tokio::sync::watch;

/// Where a workload's roots come from.
#[derive(Debug, Clone)]
pub(crate) struct Trust {
    /// The operator's file for the CA: what the CA sent holds as long as this says what it said then.
    ca: PathBuf,
    identity: watch::Receiver<Identity>,
    /// What the files of the roots are.
    files: watch::Receiver<Versions>,
}

/// The roots of a dial.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Roots {
    /// Those of the operator's file.
    pub(crate) file: X509Bundle,
    /// All that are trusted.
    pub(crate) all: X509Bundle,
}

impl Trust {
    pub(crate) fn new(ca: PathBuf, identity: watch::Receiver<Identity>, files: watch::Receiver<Versions>) -> Self {
        Self { ca, identity, files }
    }

    /// The roots for a server whose own file is `file`, as they are now. A file that was changed after the CA's roots were
    /// received stands alone: the operator knows better than a cache. So does one that lacks what vouched for them.
    ///
    /// # Errors
    /// When the file is missing or holds no root.
    pub(crate) async fn roots(&self, file: &Path) -> Result<Roots, Error> {
        let own = read_roots(file).await?;
        let ca = if self.ca == file { Some(own.clone()) } else { read_roots(&self.ca).await.ok() };
        let identity = self.identity.borrow();
        let vouched = identity.anchors.as_ref().filter(|anchors| ca.as_ref() == Some(anchors));
        let all = match (&identity.current, vouched) {
            (Some(context), Some(vouched)) if own.includes(vouched) => own.union(&context.bundle),
            _ => own.clone(),
        };
        Ok(Roots { file: own, all })
    }

    /// Returns when the roots for `file` are others than `before`, which were read after this was made. A file that cannot be
    /// read says nothing.
    pub(crate) async fn differ(&mut self, file: &Path, before: &Roots) -> Roots {
        loop {
            tokio::select! {
                Ok(()) = self.files.changed() => {}
                Ok(()) = self.identity.changed() => {}
                else => pending().await,
            }
            if let Ok(now) = self.roots(file).await
                && now.all != before.all
            {
                return now;
            }
        }
    }
}

async fn read_roots(file: &Path) -> Result<X509Bundle, Error> {
    let unusable = |cause: String| Error::Roots { file: file.display().to_string(), cause };
    X509Bundle::from_pem(&read_aside(file, MAX_ROOTS).await.map_err(|e| unusable(e.to_string()))?)
        .map_err(|e| unusable(e.to_string()))
}
