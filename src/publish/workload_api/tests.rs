#![allow(clippy::unwrap_used, clippy::expect_used)]
use super::*;
use crate::{
    authority::{Authority, Leaf},
    files::Root,
    host::Peer,
    proto::{X509BundlesResponse, X509svidResponse},
    publish::{Policy, budget::Budget, consumers::Consumers, socket::Connection, socket::Services},
    spiffe::{KeyKind, PrivateKey, X509Bundle, X509Context},
    status::{self, Identity, Trouble},
    systemd::Units,
    time::Clock,
};
use prost::Message;
use spiffe::BundleSource as _;
use std::{
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};
use tokio::{
    io::{AsyncBufReadExt, BufReader, Lines},
    net::UnixListener,
    process::{Child, ChildStdout, Command},
    sync::watch,
    task::{JoinHandle, JoinSet},
    time::{Instant, timeout},
};
use tokio_util::sync::CancellationToken;
use tonic::Code;
use x509_parser::prelude::{FromDer, X509Certificate};

mod clients;

const ID: &str = "spiffe://cluster.local/ns/vms/sa/payments";
/// How long a thing may take that should take milliseconds, or a client's back-off.
const SOON: Duration = Duration::from_secs(30);

/// A control plane and an identity fact, and what is left of the agent.
struct Story {
    fact: Identity,
    offers: watch::Sender<Offer>,
    mesh: Authority,
    consumers: watch::Sender<status::Consumers>,
    clock: Clock,
}

impl Story {
    fn new() -> Self {
        let mesh = Authority::root("root").intermediate("intermediate");
        let (offers, consumers) = (watch::Sender::new(Offer::default()), watch::Sender::new(Default::default()));
        Self { fact: Identity::default(), offers, mesh, consumers, clock: Clock::simulated(SystemTime::now()) }
    }

    /// A certificate for an hour, with the roots of `others`, too.
    fn issue(&self, others: &[&Authority]) -> Arc<X509Context> {
        let now = self.clock.now();
        let key = PrivateKey::generate(KeyKind::EcP256).unwrap();
        let mut answer = self.mesh.issue(key.pem(), &Leaf::new(&[ID], now));
        for other in others {
            answer.last_mut().unwrap().push_str(other.root_pem());
        }
        X509Context::from_answer(&ID.parse().unwrap(), key, &answer, now).unwrap()
    }

    fn rotate(&mut self) -> Arc<X509Context> {
        self.publish(self.issue(&[]))
    }

    fn publish(&mut self, context: Arc<X509Context>) -> Arc<X509Context> {
        self.tell(|fact| fact.current = Some(Arc::clone(&context)));
        context
    }

    fn tell(&mut self, change: impl FnOnce(&mut Identity)) {
        change(&mut self.fact);
        self.offers.send_if_modified(|offer| offer.follow(&self.fact, self.clock.now()));
    }

    fn seat(&self) -> Seat {
        Consumers::new(self.consumers.clone()).of(1000, Some(4711)).seat("workload_api")
    }

    /// A call that has asked.
    fn call(&self, name: &str) -> Updates {
        let mut call = Updates::new(name, &headers("true"), self.seat()).unwrap();
        call.hear(Some(Bytes::new())).unwrap();
        call.hear(None).unwrap();
        call
    }

    /// What is said next; none when there is nothing to say.
    fn next<M: Message + Default>(&self, call: &mut Updates) -> Option<Result<M, Status>> {
        match call.next(&self.offers.borrow(), self.clock.now()) {
            Next::Wait => None,
            Next::Answer(message) => Some(Ok(M::decode(&message.message()[..]).unwrap())),
            Next::End(status) => Some(Err(status)),
        }
    }

    fn svid(&self, call: &mut Updates) -> Option<Vec<u8>> {
        self.next::<X509svidResponse>(call).map(|answer| answer.unwrap().svids.remove(0).x509_svid)
    }

    fn roots(&self, call: &mut Updates) -> Option<Vec<u8>> {
        self.next::<X509BundlesResponse>(call).map(|answer| {
            let mut bundles = answer.unwrap().bundles;
            assert_eq!(bundles.len(), 1);
            bundles.remove("spiffe://cluster.local").unwrap()
        })
    }
}

fn headers(security: &'static str) -> HeaderMap {
    [(SECURITY_HEADER.parse().unwrap(), security.parse().unwrap())].into_iter().collect()
}

/// One certificate after the other.
fn chain(context: &X509Context) -> Vec<u8> {
    context.svid.chain().iter().flat_map(|certificate| certificate.to_vec()).collect()
}

fn der(bundle: &X509Bundle) -> Vec<u8> {
    bundle.roots().flat_map(|root| root.to_vec()).collect()
}

#[test]
fn an_svid_is_complete_and_as_clients_need_it() {
    let mut story = Story::new();
    let context = story.rotate();
    let answer: X509svidResponse = story.next(&mut story.call("FetchX509SVID")).unwrap().unwrap();
    let [svid] = &answer.svids[..] else { panic!("{} SVIDs", answer.svids.len()) };
    assert_eq!((svid.spiffe_id.as_str(), svid.hint.as_str()), (ID, ""));
    let (rest, leaf) = X509Certificate::from_der(&svid.x509_svid).unwrap();
    assert_eq!(leaf.raw_serial_as_string().replace(':', ""), context.svid.serial());
    let (rest, intermediate) = X509Certificate::from_der(rest).unwrap();
    assert!(intermediate.is_ca() && rest.is_empty());
    let pem = rcgen::KeyPair::try_from(svid.x509_svid_key.as_slice()).unwrap().serialize_pem();
    assert_eq!(PrivateKey::from_pem(&pem).unwrap().public(), context.svid.key().public());
    let (rest, root) = X509Certificate::from_der(&svid.bundle).unwrap();
    assert!(root.subject() == root.issuer() && rest.is_empty());
}

#[test]
fn a_call_is_held_until_there_is_a_certificate_and_gets_one_message_per_change() {
    let mut story = Story::new();
    let mut call = Updates::new("FetchX509SVID", &headers("true"), story.seat()).unwrap();
    let first = story.rotate();
    assert_eq!(story.svid(&mut call), None, "nothing was asked yet");
    call.hear(Some(Bytes::new())).unwrap();
    assert_eq!(story.svid(&mut call), Some(chain(&first)));

    let mut story = Story::new();
    let mut call = story.call("FetchX509SVID");
    assert_eq!(story.svid(&mut call), None);
    let trouble = Trouble::met(None, "x", "y".into(), story.clock.now());
    story.tell(|fact| fact.trouble = Some(trouble));
    assert_eq!(story.svid(&mut call), None, "an error on the way is not the end of it");
    let first = story.rotate();
    assert_eq!(story.svid(&mut call), Some(chain(&first)));
    story.tell(|fact| fact.trouble = None);
    assert_eq!(story.svid(&mut call), None, "the SVID is the same");
    for _ in 0..3 {
        let newest = story.rotate();
        assert_eq!(story.svid(&mut call), Some(chain(&newest)));
        assert_eq!(story.svid(&mut call), None);
    }
}

#[test]
fn bundles_are_sent_when_they_change() {
    let (mut story, next_mesh) = (Story::new(), Authority::root("next"));
    let (mut roots, mut svids) = (story.call("FetchX509Bundles"), story.call("FetchX509SVID"));
    assert_eq!(story.roots(&mut roots), None);
    let first = story.rotate();
    assert_eq!(story.roots(&mut roots), Some(der(&first.bundle)));
    story.rotate();
    assert_eq!(story.roots(&mut roots), None, "the roots are the same");
    let second = story.publish(story.issue(&[&next_mesh]));
    assert_eq!(story.roots(&mut roots), Some(der(&second.bundle)));
    assert_eq!(second.bundle.roots().count(), 2);
    // Other roots for the same certificate.
    assert_eq!(story.svid(&mut svids), Some(chain(&second)));
    let svid = PrivateKey::from_pem(second.svid.key().pem()).unwrap();
    let answer = [second.svid.chain_pem(), first.bundle.pem()];
    let third = X509Context::from_answer(&ID.parse().unwrap(), svid, &answer, story.clock.now()).unwrap();
    story.publish(Arc::clone(&third));
    assert_eq!(story.svid(&mut svids), Some(chain(&second)));
    assert_eq!(story.roots(&mut roots), Some(der(&first.bundle)));
}

#[test]
fn who_takes_what_is_kept_until_the_stream_ends() {
    let mut story = Story::new();
    let consumers = story.consumers.clone();
    let seen = || {
        let all = consumers.borrow();
        all.iter().map(|((_, takes), c)| (*takes, c.sent.clone(), c.accepted.clone())).collect::<Vec<_>>()
    };
    let (mut svids, mut roots) = (story.call("FetchX509SVID"), story.call("FetchX509Bundles"));
    assert_eq!(seen(), [("FetchX509SVID", None, None), ("FetchX509Bundles", None, None)]);
    let first = story.rotate();
    assert!(story.svid(&mut svids).is_some() && story.roots(&mut roots).is_some());
    let serial: Arc<str> = first.svid.serial().into();
    let all = seen();
    assert_eq!(all[0], ("FetchX509SVID", Some(serial.clone()), Some(serial.clone())));
    assert!(all[1].1.is_some() && all[1].1 != Some(serial), "{all:?}");
    let who = story.consumers.borrow().values().map(|c| (c.protocol, c.uid, c.pid)).collect::<Vec<_>>();
    assert_eq!(who, [("workload_api", 1000, Some(4711)); 2]);

    let next = story.rotate();
    assert!(story.svid(&mut svids).is_some());
    assert_eq!(seen()[0].1.as_deref(), Some(next.svid.serial()));
    assert_eq!(seen()[1], all[1], "the roots are the same");
    drop((svids, roots));
    assert_eq!(seen(), []);
}

#[tokio::test(start_paused = true)]
async fn only_dead_credentials_are_a_refusal() {
    let mut story = Story::new();
    let (mut early, mut open) = (story.call("FetchX509SVID"), story.call("FetchX509SVID"));
    let context = story.rotate();
    assert!(story.svid(&mut open).is_some());
    tokio::time::advance(Duration::from_secs(3601)).await;
    assert!(!context.svid.is_valid(story.clock.now()));
    assert_eq!(story.svid(&mut early), None, "an expired certificate is none");
    let cause = "the token has expired; write a new one".to_owned();
    let trouble = Trouble::met(None, "credentials_dead", cause, story.clock.now());
    story.tell(|fact| {
        fact.credentials_dead = true;
        fact.trouble = Some(trouble);
    });
    let refusal = story.next::<X509svidResponse>(&mut early).unwrap().err().unwrap();
    assert_eq!(refusal.code(), Code::PermissionDenied);
    assert!(refusal.message().ends_with("write a new one"), "{refusal}");
    assert_eq!(story.svid(&mut open), None, "what a client has is not taken away");
}

#[test]
fn every_call_needs_the_security_header_and_jwt_is_not_offered() {
    use Code::{InvalidArgument, Ok, Unimplemented};
    let story = Story::new();
    for (names, code) in [
        (&["FetchX509SVID", "FetchX509Bundles"][..], Ok),
        (&["FetchJWTSVID", "FetchJWTBundles", "ValidateJWTSVID", "FetchWITSVID"], Unimplemented),
    ] {
        for name in names {
            let code_of = |headers| Updates::new(name, &headers, story.seat()).err().map_or(Ok, |status| status.code());
            let codes = [HeaderMap::new(), headers("True"), headers("true")].map(code_of);
            assert_eq!(codes, [InvalidArgument, InvalidArgument, code], "{name}");
        }
    }
}

#[test]
fn a_call_has_one_message() {
    let story = Story::new();
    let asked = |messages: &[Option<Bytes>]| {
        let mut call = Updates::new("FetchX509SVID", &headers("true"), story.seat()).unwrap();
        messages.iter().try_for_each(|message| call.hear(message.clone())).err().map(|status| status.code())
    };
    assert_eq!(asked(&[None]), Some(Code::Unimplemented));
    assert_eq!(asked(&[Some(Bytes::new()), None]), None);
    assert_eq!(asked(&[Some(Bytes::new()), Some(Bytes::new())]), Some(Code::Unimplemented));
}
