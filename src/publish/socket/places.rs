//! Getting the socket to its place, and keeping it there.

use super::place::{Done, Held, Place, PlaceError, Site};
use crate::{
    status::{Publication, Trouble},
    system::{SocketId, listen},
    time::{Backoff, Clock},
};
use std::{future::pending, io, time::Duration};
use tokio::{
    net::{UnixListener, UnixStream},
    sync::watch,
    task::{JoinHandle, spawn_blocking},
    time::{Instant, sleep_until},
};
use tracing::{info, warn};

/// The socket, once it is there.
pub(super) struct Places {
    site: Site,
    held: Option<Held>,
    work: Work,
    looks: Option<watch::Receiver<Instant>>,
    backoff: Backoff,
}

/// What is being done about the place. It outlives the future that waits for it.
enum Work {
    Rest,
    Due(Instant),
    /// On a thread of its own: the name service may hang, and everything else goes on.
    Busy(JoinHandle<Result<Done, PlaceError>>),
}

impl Places {
    pub(super) fn new(place: Place) -> Self {
        let Place { site, held, looks } = place;
        let work = match &held {
            Some(Held { ours: false, .. }) => Work::Rest,
            Some(_) | None => Work::Due(Instant::now()),
        };
        Self { site, held, work, looks, backoff: backoff() }
    }

    /// The next connection; puts the socket in place first, for as long as that takes, and again when its name is gone.
    /// Dropping the future loses nothing.
    pub(super) async fn accept(&mut self, fact: &watch::Sender<Publication>, clock: Clock) -> io::Result<UnixStream> {
        loop {
            tokio::select! {
                // A crowd at the door keeps nobody from looking after the door.
                biased;
                done = self.work.done(&self.site, self.held.is_some()) => self.settle(done, fact, clock),
                () = look(&mut self.looks) => self.look(fact, clock),
                came = next(self.held.as_ref()) => return came,
            }
        }
    }

    fn settle(&mut self, done: Result<Done, PlaceError>, fact: &watch::Sender<Publication>, clock: Clock) {
        let done = done.and_then(|done| match done {
            Done::Made(new) => UnixListener::from_std(new).map(Some).map_err(|error| self.site.failed(&error)),
            Done::Kept => Ok(None),
            Done::Lost => {
                self.lose();
                Ok(None)
            }
        });
        match done {
            Ok(made) => {
                if let Some(listener) = made {
                    let path = self.site.path();
                    info!(socket = %path.display(), "listening");
                    listen::keep(&path, &listener);
                    let id = SocketId::at(&path).ok().flatten();
                    self.held = Some(Held { listener, id, ours: true });
                }
                self.backoff = backoff();
                fact.send_if_modified(|known| known.trouble.take().is_some());
            }
            Err(error) => {
                self.work = Work::Due(Instant::now() + self.backoff.next_wait());
                tell(&error, fact, clock);
            }
        }
    }

    /// Whether the name still leads to us.
    fn look(&mut self, fact: &watch::Sender<Publication>, clock: Clock) {
        let Some(held) = &mut self.held else { return };
        let Some(id) = held.id else { return };
        let path = self.site.path();
        // What cannot be looked at may be there.
        if SocketId::at(&path).is_ok_and(|found| found != Some(id)) {
            if held.ours {
                self.lose();
            } else {
                held.id = None;
                tell(&PlaceError::Removed(path), fact, clock);
            }
        }
    }

    /// Lets go of a listener that nobody finds, here and at the service manager, and makes another one.
    fn lose(&mut self) {
        let path = self.site.path();
        warn!(socket = %path.display(), "the socket was removed or replaced by somebody, so it is made anew");
        listen::forget_kept(&path);
        self.held = None;
        self.work = Work::Due(Instant::now());
    }
}

fn backoff() -> Backoff {
    Backoff::new(Duration::from_millis(500), Duration::from_secs(60))
}

fn tell(error: &PlaceError, fact: &watch::Sender<Publication>, clock: Clock) {
    let (kind, cause) = (error.kind(), error.to_string());
    fact.send_modify(|known| {
        let old = known.trouble.take().filter(|old| old.kind == kind);
        if old.is_none() {
            warn!(cause, "the socket for consumers is not as it should be");
        }
        let since = old.map_or_else(|| clock.now(), |old| old.since);
        known.trouble = Some(Trouble { since, kind, cause });
    });
}

impl Work {
    /// What came of it, when there is something to do: a new listener, or the rights of the one that is `kept`.
    async fn done(&mut self, site: &Site, kept: bool) -> Result<Done, PlaceError> {
        loop {
            match self {
                Self::Rest => pending().await,
                Self::Due(at) => {
                    sleep_until(*at).await;
                    let site = site.clone();
                    *self = Self::Busy(spawn_blocking(move || if kept { site.restore() } else { site.listen() }));
                }
                Self::Busy(task) => {
                    let done = task.await;
                    *self = Self::Rest;
                    match done {
                        Ok(done) => return done,
                        // A bug stays a bug, wherever it ran.
                        Err(error) => match error.try_into_panic() {
                            Ok(panic) => std::panic::resume_unwind(panic),
                            Err(_) => pending().await, // cancelled: the runtime is going down
                        },
                    }
                }
            }
        }
    }
}

async fn look(moments: &mut Option<watch::Receiver<Instant>>) {
    let Some(moments) = moments else { return pending().await };
    if moments.changed().await.is_err() {
        pending().await
    }
}

async fn next(held: Option<&Held>) -> io::Result<UnixStream> {
    match held {
        Some(held) => held.listener.accept().await.map(|(stream, _)| stream),
        None => pending().await,
    }
}

#[cfg(test)]
mod tests;
