//! One workload at work. It compares what its files and settings say now with the parts that run, and starts and ends what
//! differs. Nothing is shared with another workload but the right to an entry.

use super::{
    claim::{Claim, Claims, Ruling, ruling},
    control,
    facts::Writers,
    given::{Ends, Given},
    host::Host,
    outputs,
    part::{self, Part, Shared, parts},
    read::{Read, read},
    running::Parts,
    still::{Due, Still, Version},
    token::TokenLook,
};
use crate::{
    aside::aside,
    config::WorkloadConfig,
    status::{self, Addresses, Health, Identity, Membership, Registration, WorkloadStatus},
    time::{Clock, at},
    workload::Workload,
};
use std::{net::Ipv4Addr, sync::Arc, time::Duration};
use tokio::{
    sync::{Mutex, watch},
    task::{JoinError, JoinHandle},
    time::Instant,
};

/// Files that are read for longer than this are told.
const SLOW: Duration = Duration::from_secs(5);

/// What it is, by its files and settings as they were read last.
type Now = (Arc<Workload>, WorkloadConfig);

/// What is being read, and since when.
type Reading = (Instant, JoinHandle<Result<Read, Vec<String>>>);

/// The task of one workload.
pub(super) struct Work {
    name: String,
    host: Host,
    told: Ends,
    clock: Clock,
    still: Still,
    reading: Option<Reading>,
    now: Option<Now>,
    /// What is wrong with its files at present; none before they were read.
    mistakes: Option<Vec<String>>,
    /// What the store holds for a new identity.
    kept: Option<Identity>,
    parts: Parts,
    writers: Writers,
    /// The addresses that it may register.
    registered: watch::Sender<Addresses>,
    turn: Arc<Mutex<()>>,
    token: Option<TokenLook>,
    known_since: Instant,
    /// How it ruled about its entry last.
    ruled: Ruling,
    /// What was told last, besides its facts.
    said: Option<(Vec<String>, Option<Arc<Workload>>, usize)>,
}

impl Work {
    pub(super) fn new(name: &str, host: &Host, told: Ends) -> Self {
        // Known to the others before the first of them rules.
        host.claims
            .send_modify(|claims| drop(claims.insert(name.to_owned(), Claim::Reading { since: Instant::now() })));
        Self {
            name: name.to_owned(),
            host: host.clone(),
            told,
            clock: Clock::default(),
            still: Still::default(),
            reading: None,
            now: None,
            mistakes: None,
            kept: None,
            parts: Parts::default(),
            writers: Writers::default(),
            registered: watch::Sender::default(),
            turn: Arc::default(),
            token: None,
            known_since: Instant::now(),
            ruled: Ruling::Free,
            said: None,
        }
    }

    pub(super) async fn run(mut self) {
        let (mut claims, mut looks) = (self.host.claims.subscribe(), self.host.looks.subscribe());
        let (mut addresses, mut identity) = (self.writers.addresses.subscribe(), self.writers.identity.subscribe());
        let (mut look, mut starts) = (true, 0);
        loop {
            let due = if look { self.look() } else { None };
            let wait = self.reconcile(look, &mut starts).await;
            let wake = [due, wait].into_iter().flatten().min();
            look = tokio::select! {
                () = self.told.stop.cancelled() => break,
                given = self.told.given.changed() => if given.is_err() { break } else { true },
                _ = looks.changed() => true,
                () = at(wake) => true,
                () = overruled(&mut claims, &self.name, &self.ruled, self.clock) => false,
                _ = addresses.changed() => false,
                _ = identity.changed() => false,
                () = self.parts.changed() => false,
                done = finished(&mut self.reading) => {
                    self.take(done);
                    false
                }
            };
        }
        self.end().await;
    }

    /// Looks at its files, and has them read when they are others than those that were. When to look again, at the latest.
    fn look(&mut self) -> Option<Instant> {
        self.follow();
        if let Some(token) = &mut self.token {
            token.look(&self.name, &self.host.root);
        }
        if self.reading.is_some() {
            return None;
        }
        let Given { dir, settings, hasty, .. } = self.told.given.borrow().clone();
        let (now, version) = (Instant::now(), Version::of(&dir, &settings));
        match self.still.look(version, hasty && self.mistakes.is_none(), now, self.clock.now()) {
            Due::Never => None,
            Due::At(at) => Some(at),
            Due::Now => {
                let (root, name, clock) = (self.host.root.clone(), self.name.clone(), self.clock);
                let known = self.now.as_ref().map(|(workload, _)| workload.id.clone());
                let place = root.path("/etc/we-agent").join(&name);
                let read = move || read(&root, &name, &dir, settings, known.as_ref(), clock);
                self.reading = Some((now, tokio::spawn(aside(place, read))));
                None
            }
        }
    }

    /// Tells what token and roots are now, on behalf of all who wait for others.
    fn follow(&self) {
        if let Some((workload, _)) = &self.now {
            status::tell(&self.writers.local, control::local(workload));
        }
    }

    fn take(&mut self, read: Result<Result<Read, Vec<String>>, JoinError>) {
        let read = read.unwrap_or_else(|error| {
            tracing::error!(cause = %error, "the bundle cannot be read, which is a bug");
            Err(vec!["reading it failed, which is a bug in we-agent; please report it".to_owned()])
        });
        let Read { workload, settings, identity } = match read {
            Ok(read) => read,
            Err(mistakes) => return self.mistakes = Some(mistakes),
        };
        self.mistakes = Some(Vec::new());
        self.kept = identity.or(self.kept.take());
        if self.now.as_ref().is_none_or(|(before, _)| before.token != workload.token) {
            let mut token = TokenLook::new(&workload.token);
            token.look(&self.name, &self.host.root);
            self.token = Some(token);
        }
        if self.now.is_none() {
            self.known_since = Instant::now();
        }
        for note in super::inbound::notes(&workload, &settings.inbound).into_iter().flatten() {
            tracing::warn!("{note}");
        }
        self.now = Some((workload, settings));
        self.follow();
    }

    /// Lets what runs be what is wanted, as far as others let it. When to rule again, if there is a time for that.
    async fn reconcile(&mut self, look: bool, starts: &mut usize) -> Option<Instant> {
        // A part that fails is started again at the next look: not at once, and not for ever at once.
        let failed = self.parts.lose_failed();
        let barred = self.told.given.borrow().barred.clone();
        let wanted = match &self.now {
            Some((workload, settings)) if barred.is_none() => parts(workload, settings, &self.host.root),
            _ => Vec::new(),
        };
        let mut ended = self.parts.end(|part| wanted.contains(part)).await;
        if let Some(kept) = self.kept.take() {
            self.writers.identity.send_replace(kept);
        }
        if ended.iter().any(|part| matches!(part, Part::Health { .. })) {
            // The verdict was of another probe.
            self.writers.health.send_replace(Health::default());
        }
        let ruling = self.rule(barred.is_some());
        let (mut parked, mut wait) = (barred, None);
        match ruling {
            Ruling::Free => {
                status::tell(&self.registered, self.writers.addresses.borrow().clone());
                self.start(&wanted, look || !failed);
            }
            Ruling::Wait(until) => {
                self.start(&wanted[..wanted.len().min(1)], look || !failed);
                wait = until;
            }
            Ruling::Taken(other) => {
                ended.extend(self.parts.end(|part| matches!(part, Part::Address { .. })).await);
                self.start(&wanted[..wanted.len().min(1)], look || !failed);
                self.rule(false);
                parked = Some(format!(
                    "the same WorkloadGroup, network and address as workload {other}: istiod would keep one WorkloadEntry for \
                     both; remove one of the two directories, or give each an address of its own"
                ));
            }
        }
        if parked.is_some() && !ended.is_empty() {
            self.writers.registration.send_replace(Registration::default());
            self.writers.membership.send_replace(Membership::default());
        }
        self.retire(&ended);
        *starts += ended.len();
        self.tell(parked, *starts + self.parts.of().count());
        wait
    }

    fn start(&mut self, wanted: &[Part], may: bool) {
        let Some((workload, settings)) = self.now.clone().filter(|_| may) else { return };
        for part in wanted.iter().filter(|part| !self.parts.has(part)).collect::<Vec<_>>() {
            let shared = Shared {
                workload: &workload,
                settings: &settings,
                host: &self.host,
                registered: self.registered.subscribe(),
                leaving: self.told.leaving.clone(),
                turn: &self.turn,
                clock: self.clock,
            };
            let stop = self.told.stop.child_token();
            let Some(run) = part.start(&shared, &mut self.writers, stop.clone()) else { continue };
            let listens = part.listens().map(|listen| self.writers.inbound(&listen).0.subscribe());
            let span =
                tracing::info_span!(parent: None, "workload", workload = %workload.name, spiffe_id = %workload.id);
            self.parts.start(part.clone(), run, stop, listens, span);
        }
    }

    /// Claims what it is entitled to, and rules. Who is free holds its entry from then on.
    fn rule(&mut self, barred: bool) -> Ruling {
        let (now, claim) = (Instant::now(), if barred { Claim::Nothing } else { self.claim() });
        let mut ruled = Ruling::Free;
        self.host.claims.send_if_modified(|claims| {
            let before = claims.insert(self.name.clone(), claim);
            ruled = ruling(&self.name, claims, now, self.clock.now());
            if let (Ruling::Free, Some(Claim::Entry { holds, .. })) = (&ruled, claims.get_mut(&self.name)) {
                *holds = true;
            }
            claims.get(&self.name) != before.as_ref()
        });
        self.ruled = ruled.clone();
        ruled
    }

    fn claim(&self) -> Claim {
        let Some((workload, _)) = &self.now else {
            return match (&self.mistakes, &self.reading) {
                (None, Some((since, _))) => Claim::Reading { since: *since },
                _ => Claim::Nothing,
            };
        };
        let entry = |ip| workload.entry(ip).ok().flatten();
        let Some(anywhere) = entry(Ipv4Addr::UNSPECIFIED.into()) else { return Claim::Nothing };
        let primary = self.writers.addresses.borrow().primary;
        // An entry that is there already has its name from elsewhere.
        let name = if workload.existing_entry.is_some() { Some(anywhere.clone()) } else { primary.and_then(entry) };
        let identity = self.writers.identity.borrow();
        match name {
            None => Claim::Seeking { anywhere, since: self.known_since },
            Some(name) => Claim::Entry {
                name,
                anywhere,
                holds: self.parts.of().any(|part| matches!(part, Part::Control(_))),
                valid_until: identity.current.as_ref().map(|context| context.svid.not_after()),
            },
        }
    }

    /// Lets go of the sockets of parts that have ended, unless another has taken them over.
    fn retire(&self, ended: &[Part]) {
        let name = |part: &Part| part.socket(&self.name);
        let taken: Vec<_> = self.parts.of().filter_map(name).collect();
        for name in ended.iter().filter_map(name).filter(|name| !taken.contains(name)) {
            self.host.listeners.retire(&self.host.root, &name);
        }
    }

    fn tell(&mut self, parked: Option<String>, parts: usize) {
        let mut broken = self.mistakes.clone().unwrap_or_default();
        if let Some((since, _)) = self.reading.as_ref().filter(|(since, _)| since.elapsed() > SLOW) {
            broken = vec![format!("its files are being read for {} s already", since.elapsed().as_secs())];
        }
        if self.now.is_none() && self.mistakes.is_none() && broken.is_empty() && parked.is_none() {
            return; // it is not known yet what it is
        }
        let runs = self.now.as_ref().filter(|_| parked.is_none());
        if let Some(cause) = &parked {
            if !self.said.as_ref().is_some_and(|(broken, ..)| broken.contains(cause)) {
                tracing::warn!(cause, "the workload does not run");
            }
            broken.push(cause.clone());
        }
        let news = Some((broken.clone(), runs.map(|(workload, _)| workload.clone()), parts));
        if news == self.said {
            return;
        }
        self.said = news;
        let status = WorkloadStatus {
            name: self.name.clone(),
            spiffe_id: runs.map(|(workload, _)| workload.id.to_string()),
            registers: runs.is_none_or(|(workload, _)| workload.registers()),
            broken,
            ignored: runs.map(|(workload, _)| workload.ignored.clone()).unwrap_or_default(),
            facts: runs.cloned().map(|(workload, settings)| {
                let parts: Vec<_> = part::parts(&workload, &settings, &self.host.root);
                part::facts(&mut self.writers, &workload, &settings, &parts)
            }),
        };
        self.host.tell(status);
    }

    async fn end(mut self) {
        let ended = self.parts.end_all().await;
        self.host.claims.send_modify(|claims| drop(claims.insert(self.name.clone(), Claim::Nothing)));
        if self.told.removed.is_cancelled() {
            self.retire(&ended);
            if let Err(error) = outputs::remove(&self.host.root, &self.name) {
                tracing::warn!(cause = %error, "what the workload has published stays");
            }
            tracing::info!("the bundle was removed, so the workload has left; its certificate is kept");
        }
    }
}

/// Waits until what the others claim makes for another ruling. Most of it is about entries of their own.
async fn overruled(claims: &mut watch::Receiver<Claims>, name: &str, ruled: &Ruling, clock: Clock) {
    while claims.changed().await.is_ok() {
        if ruling(name, &claims.borrow_and_update(), Instant::now(), clock.now()) != *ruled {
            return;
        }
    }
}

/// Waits for the reading, if there is one, and puts it away.
async fn finished(reading: &mut Option<Reading>) -> Result<Result<Read, Vec<String>>, JoinError> {
    let Some((_, task)) = reading else { return std::future::pending().await };
    let done = task.await;
    *reading = None;
    done
}
