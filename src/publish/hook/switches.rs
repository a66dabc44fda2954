//! When a hook is due: decided from the facts of the publishers and of the identity.

use crate::{
    spiffe::X509Context,
    status::{Identity, Publication},
};
use std::{future::poll_fn, pin::pin, sync::Arc, task::Poll};
use tokio::sync::watch;

/// What a hook follows: the publishers of files, and the certificate that they put out.
#[derive(Debug, Clone)]
pub struct Switches {
    files: Vec<watch::Receiver<Publication>>,
    identity: watch::Receiver<Identity>,
    taken: Option<Seen>,
}

/// The serial numbers that the publishers have put out, in their order.
type Seen = Vec<Option<String>>;

impl Switches {
    /// Follows `files`, of which there is at least one.
    pub fn new(files: Vec<watch::Receiver<Publication>>, identity: watch::Receiver<Identity>) -> Self {
        Self { files, identity, taken: None }
    }

    /// What the publishers had put out when it was last taken.
    pub(super) fn taken(&self) -> Option<&Seen> {
        self.taken.as_ref()
    }

    /// Waits until there is something to take that was not taken. Dropping the future loses nothing.
    pub(super) async fn news(&mut self) {
        while self.due().is_none_or(|(seen, _)| Some(seen) == self.taken) {
            changed(&mut self.files).await;
        }
    }

    /// The newest certificate, if it can be told of now.
    pub(super) fn take(&mut self) -> Option<Arc<X509Context>> {
        let (seen, context) = self.due()?;
        self.taken = Some(seen);
        Some(context)
    }

    fn due(&self) -> Option<(Seen, Arc<X509Context>)> {
        let context = self.identity.borrow().current.clone()?;
        let publications: Vec<_> = self.files.iter().map(|fact| fact.borrow().clone()).collect();
        let seen = due(&publications, context.svid.serial())?;
        Some((seen, context))
    }
}

/// All publishers have the newest certificate, or cannot put it out at present; then what they have is told of, and once
/// more when that changes. Nothing is due while one of them is still at work, or none has it.
fn due(publications: &[Publication], newest: &str) -> Option<Seen> {
    let has = |p: &Publication| p.serial.as_deref() == Some(newest);
    let settled = publications.iter().all(|p| has(p) || p.trouble.is_some());
    (settled && publications.iter().any(has)).then(|| publications.iter().map(|p| p.serial.clone()).collect())
}

/// Waits for any of the facts; one whose writer is gone does not change any more.
async fn changed(files: &mut [watch::Receiver<Publication>]) {
    let mut changes: Vec<_> = files
        .iter_mut()
        .map(|fact| {
            Box::pin(async {
                if fact.changed().await.is_err() {
                    std::future::pending::<()>().await;
                }
            })
        })
        .collect();
    let any = poll_fn(|context| match changes.iter_mut().any(|change| change.as_mut().poll(context).is_ready()) {
        true => Poll::Ready(()),
        false => Poll::Pending,
    });
    pin!(any).await;
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::status::Trouble;
    use std::time::SystemTime;

    fn publication(serial: Option<&str>, troubled: bool) -> Publication {
        let trouble = Trouble::met(None, "disk_full", "full".to_owned(), SystemTime::UNIX_EPOCH);
        Publication { serial: serial.map(str::to_owned), trouble: troubled.then_some(trouble) }
    }

    #[test]
    fn a_hook_is_due_when_every_publisher_is_done() {
        let old = publication(Some("1"), false);
        let new = publication(Some("2"), false);
        let stuck = publication(Some("1"), true);
        let none = publication(None, false);
        for (publications, wanted) in [
            (vec![&none], false),
            (vec![&old], false),
            (vec![&new], true),
            (vec![&new, &old], false),
            (vec![&new, &none], false),
            (vec![&new, &new], true),
            (vec![&new, &stuck], true),
            (vec![&stuck, &stuck], false),
        ] {
            let publications: Vec<_> = publications.into_iter().cloned().collect();
            let seen: Vec<_> = publications.iter().map(|p| p.serial.clone()).collect();
            assert_eq!(due(&publications, "2"), wanted.then_some(seen), "{publications:?}");
        }
    }
}
