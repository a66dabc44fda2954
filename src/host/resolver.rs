//! What a host name means.

use std::{
    collections::{BTreeMap, HashMap},
    io,
    net::{IpAddr, SocketAddr},
    sync::{LazyLock, Mutex, PoisonError},
};
use tokio::sync::watch;

/// Looks names up: first those that the bundle's `hosts` file gives, then the system's resolver. So the agent finds its
/// control plane without a line in `/etc/hosts`.
#[derive(Debug, Clone, Default)]
pub struct Resolver {
    hosts: BTreeMap<String, Vec<IpAddr>>,
}

impl Resolver {
    /// A resolver that knows `hosts` before it asks the system. Names are compared without regard to case.
    pub fn new(hosts: BTreeMap<String, Vec<IpAddr>>) -> Self {
        Self { hosts: hosts.into_iter().map(|(name, ips)| (canonical(&name), ips)).collect() }
    }

    /// The addresses of `host`, at least one, in the order in which the system prefers them. Waits as long as the system's
    /// resolver does: the caller sets the bound. Who asks again meanwhile waits for the same answer.
    pub async fn lookup(&self, host: &str, port: u16) -> io::Result<Vec<SocketAddr>> {
        if let Ok(ip) = host.parse::<IpAddr>() {
            return Ok(vec![SocketAddr::new(ip, port)]);
        }
        if let Some(ips) = self.hosts.get(&canonical(host)).filter(|ips| !ips.is_empty()) {
            return Ok(ips.iter().map(|&ip| SocketAddr::new(ip, port)).collect());
        }
        let name = host.to_owned();
        let asked = async move { Ok(tokio::net::lookup_host((name, 0)).await?.map(|at| at.ip()).collect()) };
        let found = SYSTEM.ask(host, asked).await.map_err(|(kind, cause)| io::Error::new(kind, cause))?;
        if found.is_empty() {
            return Err(io::Error::new(io::ErrorKind::NotFound, "the name has no address"));
        }
        Ok(found.into_iter().map(|ip| SocketAddr::new(ip, port)).collect())
    }
}

/// What a name service answered; an error as its kind and text.
type Answer = Result<Vec<IpAddr>, (io::ErrorKind, String)>;

/// The system's resolver holds a thread for each question, for as long as it takes. So nothing is asked that is being asked
/// already: a name service that hangs holds one thread for each name, however often and by whom it is asked.
static SYSTEM: LazyLock<Questions> = LazyLock::new(Questions::default);

/// The questions that have no answer yet.
#[derive(Debug, Default)]
struct Questions(Mutex<HashMap<String, watch::Receiver<Option<Answer>>>>);

impl Questions {
    /// What is answered to `ask`, or to the same question that was asked before. It goes on when nobody waits any more.
    async fn ask(&self, name: &str, ask: impl Future<Output = io::Result<Vec<IpAddr>>> + Send + 'static) -> Answer {
        let mut answer = {
            let mut open = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            open.retain(|_, answer| answer.borrow().is_none() && answer.has_changed().is_ok());
            let asked = || {
                let (tell, told) = watch::channel(None);
                tokio::spawn(async move {
                    let answer = ask.await.map_err(|e| (e.kind(), e.to_string()));
                    tell.send_replace(Some(answer));
                });
                told
            };
            open.entry(canonical(name)).or_insert_with(asked).clone()
        };
        let answer = answer.wait_for(Option::is_some).await.ok().and_then(|answer| answer.clone());
        answer.unwrap_or_else(|| Err((io::ErrorKind::Interrupted, "the question was given up".to_owned())))
    }
}

fn canonical(name: &str) -> String {
    name.trim_end_matches('.').to_ascii_lowercase()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_name_service_that_hangs_is_asked_once() {
        let questions = Questions::default();
        let answer = watch::Sender::new(false);
        let slowly = |ip: [u8; 4]| {
            let mut answered = answer.subscribe();
            async move {
                answered.wait_for(|now| *now).await.unwrap();
                Ok(vec![IpAddr::from(ip)])
            }
        };
        let limit = std::time::Duration::from_secs(5);
        for _ in 0..100 {
            assert!(
                tokio::time::timeout(limit, questions.ask("istiod.example", slowly([192, 0, 2, 1]))).await.is_err()
            );
        }
        assert_eq!(answer.receiver_count(), 1, "questions pile up");
        answer.send_replace(true);
        // The first question's answer, or a new one: as long as there is one.
        assert!(questions.ask("ISTIOD.example.", slowly([192, 0, 2, 1])).await.is_ok());
        let other = questions.ask("other.example", slowly([192, 0, 2, 3])).await;
        assert_eq!(other, Ok(vec![IpAddr::from([192, 0, 2, 3])]));
    }

    #[tokio::test]
    async fn the_bundle_comes_before_the_system() {
        let ips: Vec<IpAddr> = vec!["192.0.2.7".parse().unwrap(), "2001:db8::7".parse().unwrap()];
        let hosts =
            BTreeMap::from([("Istiod.istio-system.svc".to_owned(), ips.clone()), ("localhost".to_owned(), vec![])]);
        let resolver = Resolver::new(hosts);
        let found = resolver.lookup("istiod.istio-system.SVC.", 15012).await.unwrap();
        assert_eq!(found, ips.iter().map(|&ip| SocketAddr::new(ip, 15012)).collect::<Vec<_>>());
        // A name without an address in the bundle is the system's, and literals are nobody's.
        assert!(resolver.lookup("localhost", 1).await.unwrap().iter().all(|a| a.ip().is_loopback()));
        assert_eq!(resolver.lookup("::1", 2).await.unwrap(), vec!["[::1]:2".parse().unwrap()]);
    }
}
