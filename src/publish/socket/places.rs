//! Getting the socket to its place, and keeping it there.

use super::place::{Done, Heir, Held, Place, PlaceError, Site};
use crate::{
    aside::aside,
    files::SocketId,
    status::{Publication, Trouble},
    systemd::listen,
    time::{Backoff, Clock},
};
use std::{future::pending, io, time::Duration};
use tokio::{
    net::{UnixListener, UnixStream},
    sync::watch,
    task::JoinHandle,
    time::{Instant, sleep_until},
};
use tracing::{info, warn};

/// The socket, once it is there.
pub(super) struct Places {
    site: Site,
    held: Option<Held>,
    work: Work,
    looks: Option<watch::Receiver<Instant>>,
    heir: Option<Heir>,
    backoff: Backoff,
    /// Serial of what whoever comes is given.
    offered: Option<String>,
    fact: watch::Sender<Publication>,
    clock: Clock,
}

/// What is being done about the place. It outlives the future that waits for it.
enum Work {
    Rest,
    Due(Instant),
    /// On a thread of its own: the name service may hang, and everything else goes on.
    Busy(JoinHandle<Result<Done, PlaceError>>),
}

impl Places {
    /// What is at `place`, told in `fact`.
    pub(super) fn new(place: Place, fact: watch::Sender<Publication>, clock: Clock) -> Self {
        let Place { site, held, looks, heir } = place;
        let work = match &held {
            Some(Held { ours: false, .. }) => Work::Rest,
            Some(_) | None => Work::Due(Instant::now()),
        };
        let mut places = Self { site, held, work, looks, heir, backoff: backoff(), offered: None, fact, clock };
        // The name of a socket unit's socket may have gone while nobody looked.
        places.look();
        places
    }

    /// Whoever comes is given this from now on.
    pub(super) fn offer(&mut self, serial: &str) {
        self.offered = Some(serial.to_owned());
        self.show();
    }

    /// Tells what consumers see: nothing, while they do not find us.
    fn show(&self) {
        let found = self.held.as_ref().is_some_and(|held| !held.removed);
        let serial = self.offered.as_ref().filter(|_| found);
        self.fact.send_if_modified(|known| {
            let news = known.serial.as_ref() != serial;
            known.serial = serial.cloned();
            news
        });
    }

    /// The next connection; puts the socket in place first, for as long as that takes, and again when its name is gone.
    /// Dropping the future loses nothing.
    pub(super) async fn accept(&mut self) -> io::Result<UnixStream> {
        loop {
            tokio::select! {
                // A crowd at the door keeps nobody from looking after the door.
                biased;
                done = self.work.done(&self.site, self.held.is_some()) => self.settle(done),
                () = look(&mut self.looks) => self.look(),
                came = next(self.held.as_ref()) => return came,
            }
        }
    }

    /// Ends, and hands the socket on to who serves it next: who connects meanwhile waits.
    pub(super) fn end(self) {
        if let (Some(heir), Some(held)) = (self.heir, self.held) {
            heir.hand_on(&self.site, held);
        }
    }

    fn settle(&mut self, done: Result<Done, PlaceError>) {
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
                    self.held = Some(Held { listener, id, ours: true, removed: false });
                    self.show();
                }
                self.backoff = backoff();
                self.fact.send_if_modified(|known| known.trouble.take().is_some());
            }
            Err(error) => {
                self.work = Work::Due(Instant::now() + self.backoff.next_wait());
                self.tell(&error);
            }
        }
    }

    /// Whether the name still leads to us.
    fn look(&mut self) {
        let Some(held) = self.held.as_mut().filter(|held| !held.removed) else { return };
        let path = self.site.path();
        // What cannot be looked at may be there.
        let Ok(found) = SocketId::at(&path) else { return };
        if found.is_some() && (held.id.is_none() || held.id == found) {
            return;
        }
        if held.ours {
            self.lose();
        } else {
            held.removed = true;
            self.tell(&PlaceError::Removed(path));
            self.show();
        }
    }

    /// Lets go of a listener that nobody finds, here and at the service manager, and makes another one.
    fn lose(&mut self) {
        let path = self.site.path();
        warn!(socket = %path.display(), "the socket was removed or replaced by somebody, so it is made anew");
        listen::forget_kept(&path);
        self.held = None;
        self.work = Work::Due(Instant::now());
        self.show();
    }

    fn tell(&self, error: &PlaceError) {
        let (kind, cause) = (error.kind(), error.to_string());
        self.fact.send_modify(|known| {
            let trouble = Trouble::met(known.trouble.as_ref(), kind, cause, self.clock.now());
            if trouble.times == 1 {
                warn!(cause = trouble.cause, "the socket for consumers is not as it should be");
            }
            known.trouble = Some(trouble);
        });
    }
}

fn backoff() -> Backoff {
    Backoff::new(Duration::from_millis(500), Duration::from_secs(60))
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
                    *self = Self::Busy(tokio::spawn(async move {
                        let group = site.group().await?;
                        aside(site.path(), move || if kept { site.restore(group) } else { site.listen(group) }).await
                    }));
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
