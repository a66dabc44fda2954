#![allow(clippy::unwrap_used)]
use super::*;
use crate::{
    authority::{Authority, Leaf},
    spiffe::{KeyKind, PrivateKey, X509Context},
    status::Identity,
};
use proptest::{collection::vec, prelude::*, sample::subsequence};
use std::{
    collections::{BTreeSet, VecDeque},
    sync::LazyLock,
    time::Duration,
};

const ID: &str = "spiffe://cluster.local/ns/vms/sa/payments";

fn identity(now: SystemTime) -> (Offer, String) {
    let key = PrivateKey::generate(KeyKind::EcP256).unwrap();
    let answer = Authority::root("mesh").issue(key.pem(), &Leaf::new(&[ID], now));
    let context = X509Context::from_answer(&ID.parse().unwrap(), key, &answer, now).unwrap();
    let (mut offer, serial) = (Offer::default(), context.svid.serial().to_owned());
    assert!(offer.follow(&Identity { current: Some(context), ..Identity::default() }, now));
    (offer, serial)
}

fn all(names: &[Name], nonce: &str) -> Ask {
    Ask { names: Names::Exactly(names.to_vec()), nonce: nonce.to_owned(), ..Ask::default() }
}

fn sent(subscription: &mut Subscription, offer: &Offer, now: SystemTime) -> Option<(String, Vec<Name>)> {
    let reply = subscription.reply(offer, now)?;
    Some((reply.nonce, reply.secrets.iter().map(|secret| secret.name).collect()))
}

#[test]
fn an_answer_is_held_until_there_is_a_certificate_and_sent_once() {
    let now = SystemTime::now();
    let mut subscription = Subscription::default();
    assert_eq!(subscription.hear(&all(&[Name::Default], "")), None);
    assert_eq!(sent(&mut subscription, &Offer::default(), now), None);
    let (secrets, serial) = identity(now);
    assert_eq!(sent(&mut subscription, &secrets, now), Some(("1".to_owned(), vec![Name::Default])));
    assert_eq!(sent(&mut subscription, &secrets, now), None);
    let accepted = vec![(Name::Default, serial.into())];
    assert_eq!(subscription.hear(&all(&[Name::Default], "1")), Some(Verdict::Accepted(accepted)));
    assert_eq!(sent(&mut subscription, &secrets, now), None, "an ACK is not answered");
    let (next, _) = identity(now);
    assert_eq!(sent(&mut subscription, &next, now), Some(("2".to_owned(), vec![Name::Default])));
}

#[test]
fn an_expired_certificate_is_not_handed_out_but_its_roots_are() {
    let now = SystemTime::now();
    let (secrets, _) = identity(now);
    let mut subscription = Subscription::default();
    subscription.hear(&all(&[Name::Default, Name::RootCa], ""));
    let late = now + Duration::from_secs(3600);
    assert_eq!(sent(&mut subscription, &secrets, late), Some(("1".to_owned(), vec![Name::RootCa])));
    let (renewed, _) = identity(late);
    assert_eq!(sent(&mut subscription, &renewed, late).unwrap().1, [Name::Default, Name::RootCa]);
}

#[test]
fn a_refusal_is_not_answered_and_the_next_version_is_the_retry() {
    let now = SystemTime::now();
    let (secrets, serial) = identity(now);
    let mut subscription = Subscription::default();
    subscription.hear(&all(&[Name::Default], ""));
    sent(&mut subscription, &secrets, now).unwrap();
    let refusal = Ask { refusal: Some("no".to_owned()), ..all(&[Name::Default], "1") };
    let refused = Verdict::Refused(vec![(Name::Default, serial.into())], "no".to_owned());
    assert_eq!(subscription.hear(&refusal), Some(refused));
    assert_eq!(subscription.hear(&refusal), None, "it is heard once");
    assert_eq!(sent(&mut subscription, &secrets, now), None);
    assert!(sent(&mut subscription, &identity(now).0, now).is_some());
}

#[test]
fn a_stale_request_changes_nothing_and_a_new_stream_begins_anew() {
    let now = SystemTime::now();
    let mut subscription = Subscription::default();
    // A nonce of the stream before this one.
    subscription.hear(&all(&[Name::Default], "7"));
    sent(&mut subscription, &identity(now).0, now).unwrap();
    let (secrets, serial) = identity(now);
    assert_eq!(sent(&mut subscription, &secrets, now).unwrap().0, "2");
    assert_eq!(subscription.hear(&all(&[], "1")), None, "it answers what is no longer the last");
    assert_eq!(subscription.names().collect::<Vec<_>>(), [Name::Default]);
    let more = subscription.hear(&all(&[Name::Default, Name::RootCa], "2"));
    assert_eq!(more, Some(Verdict::Accepted(vec![(Name::Default, serial.into())])));
    assert_eq!(sent(&mut subscription, &secrets, now).unwrap().1, [Name::RootCa], "what is new is sent");
    subscription.hear(&all(&[], "3"));
    assert_eq!(sent(&mut subscription, &identity(now).0, now), None, "nothing is wanted any more");
}

#[test]
fn incrementally_names_come_and_go_whatever_the_nonce() {
    let now = SystemTime::now();
    let (secrets, _) = identity(now);
    let change = |add: &[Name], drop: &[Name], nonce: &str| Ask {
        names: Names::Change { add: add.to_vec(), drop: drop.to_vec() },
        nonce: nonce.to_owned(),
        ..Ask::default()
    };
    let mut subscription = Subscription::default();
    subscription.hear(&change(&[Name::Default], &[], ""));
    assert_eq!(sent(&mut subscription, &secrets, now).unwrap().1, [Name::Default]);
    subscription.hear(&change(&[Name::RootCa], &[], ""));
    assert_eq!(sent(&mut subscription, &secrets, now).unwrap().1, [Name::RootCa]);
    subscription.hear(&change(&[Name::Default], &[], "2"));
    assert_eq!(sent(&mut subscription, &secrets, now).unwrap().1, [Name::Default], "asked for again, sent again");
    subscription.hear(&change(&[], &[Name::Default], ""));
    assert_eq!(sent(&mut subscription, &identity(now).0, now).unwrap().1, [Name::RootCa]);
}

#[test]
fn what_is_not_here_is_said_once_and_holds_up_nothing_else() {
    let now = SystemTime::now();
    let ask = Ask {
        names: Names::Change { add: vec![Name::Default], drop: Vec::new() },
        unknown: vec!["other".to_owned()],
        ..Ask::default()
    };
    let mut subscription = Subscription::default();
    subscription.hear(&ask);
    let none = Offer::default();
    let reply = subscription.reply(&none, now).unwrap();
    assert_eq!((reply.unknown, reply.secrets.len()), (vec!["other".to_owned()], 0));
    assert!(subscription.reply(&none, now).is_none() && !subscription.has_all());
    let (secrets, _) = identity(now);
    let reply = subscription.reply(&secrets, now).unwrap();
    assert_eq!((reply.unknown.len(), reply.secrets.len()), (0, 1));
}

#[test]
fn no_name_but_the_two_is_answered() {
    for (name, code) in [
        ("file-root:/etc/certs/root.pem", tonic::Code::Unimplemented),
        ("file-cert:/etc/certs/cert.pem~/etc/certs/key.pem", tonic::Code::Unimplemented),
        ("kubernetes://gateway-cert", tonic::Code::NotFound),
        ("Default", tonic::Code::NotFound),
        ("", tonic::Code::NotFound),
    ] {
        let refused = Name::parse(name).unwrap_err();
        assert_eq!(refused.code(), code, "{name}");
        assert!(refused.message().contains("default"), "it says what there is: {refused}");
    }
    let long = Name::parse(&"x".repeat(100_000)).unwrap_err();
    assert!(long.message().len() < 400, "a name does not come back at any length");
}

/// What may happen on a stream, in any order.
#[derive(Debug, Clone)]
enum Event {
    /// Another certificate is there.
    Switch(usize),
    /// A response arrives at the consumer, which takes or refuses it.
    Arrives { refused: bool },
    /// The consumer wants other names.
    Wants(Vec<Name>),
    /// A request arrives here.
    IsHeard,
}

fn event() -> impl Strategy<Value = Event> {
    prop_oneof![
        (0..3_usize).prop_map(Event::Switch),
        any::<bool>().prop_map(|refused| Event::Arrives { refused }),
        subsequence(vec![Name::Default, Name::RootCa], 0..=2).prop_map(Event::Wants),
        Just(Event::IsHeard),
    ]
}

/// A stream with both of its ends, and what is under way between them.
#[derive(Default)]
struct Stream {
    here: Subscription,
    newest: usize,
    responses: VecDeque<(String, Vec<Version>)>,
    requests: VecDeque<Ask>,
    /// The consumer: what it wants, has, and has refused; and the last nonce that it has seen.
    wants: Vec<Name>,
    has: BTreeMap<Name, Arc<str>>,
    refused: BTreeSet<Version>,
    nonce: String,
}

static SECRETS: LazyLock<Vec<Offer>> = LazyLock::new(|| (0..3).map(|_| identity(SystemTime::now()).0).collect());

impl Stream {
    fn ask(&mut self, refusal: Option<String>) {
        let names = Names::Exactly(self.wants.clone());
        self.requests.push_back(Ask { names, nonce: self.nonce.clone(), refusal, ..Ask::default() });
    }

    fn reply(&mut self) {
        if let Some(reply) = self.here.reply(&SECRETS[self.newest], SystemTime::now()) {
            let versions = reply.secrets.iter().map(|secret| (secret.name, secret.version.clone())).collect();
            self.responses.push_back((reply.nonce, versions));
        }
    }

    fn happens(&mut self, event: Event) {
        match event {
            Event::Switch(newest) => self.newest = newest,
            Event::Wants(names) => {
                self.wants = names;
                self.ask(None);
            }
            Event::IsHeard => {
                self.requests.pop_front().iter().for_each(|ask| drop(self.here.hear(ask)));
            }
            Event::Arrives { refused } => {
                let Some((nonce, versions)) = self.responses.pop_front() else { return };
                self.nonce = nonce;
                match refused {
                    true => self.refused.extend(versions),
                    false => self.has.extend(versions),
                }
                self.ask(refused.then(|| "no".to_owned()));
            }
        }
        self.reply();
    }
}

proptest! {
    /// However switches, answers and changes of mind cross on the way: in the end it has the newest of all that it wants,
    /// unless it was that which it refused.
    #[test]
    fn every_consumer_ends_on_the_newest(events in vec(event(), 0..80)) {
        let mut stream = Stream { wants: vec![Name::Default], ..Stream::default() };
        stream.ask(None);
        events.into_iter().for_each(|event| stream.happens(event));
        while !(stream.requests.is_empty() && stream.responses.is_empty()) {
            stream.happens(Event::IsHeard);
            stream.happens(Event::Arrives { refused: false });
        }
        for name in &stream.wants {
            let newest = SECRETS[stream.newest].secret(*name, SystemTime::now()).unwrap().version.clone();
            let refused = stream.refused.contains(&(*name, newest.clone()));
            prop_assert!(refused || stream.has.get(name) == Some(&newest), "{name:?}: {:?} and not {newest}", stream.has);
        }
    }
}
