//! Getting the socket to its place, and keeping it there.

use super::place::{Done, Heir, Held, Place, PlaceError, Site, State, Work};
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
    time::{Instant, sleep_until},
};
use tracing::{info, warn};

/// The socket, once it is there.
pub(super) struct Places {
    site: Site,
    state: State,
    looks: Option<watch::Receiver<Instant>>,
    heir: Option<Heir>,
    backoff: Backoff,
    /// Serial of what whoever comes is given.
    offered: Option<String>,
    fact: watch::Sender<Publication>,
    clock: Clock,
}

impl Places {
    /// What is at `place`, told in `fact`.
    pub(super) fn new(place: Place, fact: watch::Sender<Publication>, clock: Clock) -> Self {
        let Place { site, state, looks, heir } = place;
        let mut places = Self { site, state, looks, heir, backoff: backoff(), offered: None, fact, clock };
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
        let found = matches!(self.state, State::Ours(..) | State::Given(_));
        let serial = self.offered.as_ref().filter(|_| found);
        self.fact.send_if_modified(|known| {
            let news = known.serial.as_ref() != serial;
            known.serial = serial.cloned();
            news
        });
    }

    /// The next connection, if there is `room` for one; puts the socket in place first, for as long as that takes, and
    /// again when its name is gone, whether or not there is room. Dropping the future loses nothing.
    pub(super) async fn accept(&mut self, room: bool) -> io::Result<UnixStream> {
        loop {
            let (listener, work) = self.state.parts();
            tokio::select! {
                // A crowd at the door keeps nobody from looking after the door.
                biased;
                done = done(work, &self.site, listener.is_some()) => self.settle(done),
                () = look(&mut self.looks) => self.look(),
                came = next(listener), if room => return came,
            }
        }
    }

    /// Ends, and hands the socket on to who serves it next: who connects meanwhile waits.
    pub(super) fn end(self) {
        if let Some(heir) = self.heir {
            heir.hand_on(&self.site, self.state);
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
        match (done, &mut self.state) {
            (Ok(Some(listener)), state) => {
                let path = self.site.path();
                info!(socket = %path.display(), "listening");
                listen::keep(&path, &listener);
                *state = State::Ours(Held::at(&path, listener), None);
            }
            (Ok(None), State::Ours(_, work)) => *work = None,
            (Ok(None), _) => {}
            (Err(error), state) => {
                let again = Work::Due(Instant::now() + self.backoff.next_wait());
                match state {
                    State::Absent(work) => *work = again,
                    State::Ours(_, work) => *work = Some(again),
                    State::Given(_) | State::Removed(_) => {}
                }
                return self.tell(&error);
            }
        }
        self.show();
        self.backoff = backoff();
        self.fact.send_if_modified(|known| known.trouble.take().is_some());
    }

    /// Whether the name still leads to us.
    fn look(&mut self) {
        let (State::Ours(held, _) | State::Given(held)) = &self.state else { return };
        let path = self.site.path();
        // What cannot be looked at may be there.
        let Ok(found) = SocketId::at(&path) else { return };
        if found.is_some() && (held.id.is_none() || held.id == found) {
            return;
        }
        self.lose();
    }

    /// Lets go of a listener that nobody finds, here and at the service manager, and makes another one, if it is ours to make.
    fn lose(&mut self) {
        let path = self.site.path();
        match std::mem::replace(&mut self.state, State::Absent(Work::now())) {
            State::Given(held) => {
                self.state = State::Removed(held.listener);
                self.tell(&PlaceError::Removed(path));
            }
            _ => {
                warn!(socket = %path.display(), "the socket was removed or replaced by somebody, so it is made anew");
                listen::forget_kept(&path);
            }
        }
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

impl State {
    /// Who comes, and what is to be done.
    fn parts(&mut self) -> (Option<&UnixListener>, Option<&mut Work>) {
        match self {
            Self::Absent(work) => (None, Some(work)),
            Self::Ours(held, work) => (Some(&held.listener), work.as_mut()),
            Self::Given(Held { listener, .. }) | Self::Removed(listener) => (Some(listener), None),
        }
    }
}

impl Work {
    pub(super) fn now() -> Self {
        Self::Due(Instant::now())
    }
}

/// What came of the work, when there is some: a new listener, or the rights of the one that is `kept`.
async fn done(work: Option<&mut Work>, site: &Site, kept: bool) -> Result<Done, PlaceError> {
    let Some(work) = work else { return pending().await };
    if let Work::Due(at) = work {
        sleep_until(*at).await;
        let site = site.clone();
        *work = Work::Busy(Box::pin(async move {
            let group = site.group().await?;
            aside(site.path(), move || if kept { site.restore(group) } else { site.listen(group) }).await
        }));
    }
    match work {
        Work::Busy(task) => task.await,
        Work::Due(_) => pending().await,
    }
}

async fn look(moments: &mut Option<watch::Receiver<Instant>>) {
    let Some(moments) = moments else { return pending().await };
    if moments.changed().await.is_err() {
        pending().await
    }
}

async fn next(listener: Option<&UnixListener>) -> io::Result<UnixStream> {
    match listener {
        Some(listener) => listener.accept().await.map(|(stream, _)| stream),
        None => pending().await,
    }
}

#[cfg(test)]
mod tests;
