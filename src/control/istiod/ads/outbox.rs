//! What a stream still has to say. Nothing queues up: of each thing the newest alone is kept until it is fetched, so a
//! server that does not read costs no memory, and a report of health never waits behind acknowledgements.

use super::{HEALTH, wire::Ask};
use crate::proto::{envoy::config::core::v3::Node, google::rpc::Status as Detail};
use std::{
    collections::{BTreeMap, BTreeSet},
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll, Waker},
};

/// What we ask for of one type. Only an answer to it can be acknowledged or refused: error details on a type that was
/// not asked for crash istiod, and cannot be built here.
#[derive(Debug, Default)]
struct Subscription {
    wanted: BTreeSet<String>,
    /// What was asked for already.
    asked: Option<BTreeSet<String>>,
    /// Version and nonce of the last answer, empty before it.
    version: String,
    nonce: String,
    /// An answer that is to be acknowledged, or refused with a detail.
    owed: Option<Option<Detail>>,
}

#[derive(Debug, Default)]
struct State {
    /// Said with the first request of the stream only.
    node: Option<Node>,
    subscriptions: BTreeMap<&'static str, Subscription>,
    /// The verdict to report; none when it was.
    report: Option<Option<Detail>>,
    closed: bool,
    waker: Option<Waker>,
}

/// The sending half of a stream: filled by [`super::Stream`], fetched by the call that carries its requests.
#[derive(Debug, Clone)]
pub(super) struct Outbox(Arc<Mutex<State>>);

impl Outbox {
    /// Nothing is to be said yet, and the first request will tell that we are `node`.
    pub(super) fn new(node: Node) -> Self {
        Self(Arc::new(Mutex::new(State { node: Some(node), ..State::default() })))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        let mut state = self.lock();
        let done = change(&mut state);
        if let Some(waker) = state.waker.take() {
            drop(state);
            waker.wake();
        }
        done
    }

    /// These resources of a type are wanted, and no others; of clusters none are named, and all are meant.
    pub(super) fn want(&self, type_url: &'static str, names: BTreeSet<String>) {
        self.change(|state| state.subscriptions.entry(type_url).or_default().wanted = names);
    }

    /// This verdict is to be reported, instead of one that was not fetched yet.
    pub(super) fn report(&self, detail: Option<Detail>) {
        self.change(|state| state.report = Some(detail));
    }

    /// An answer has come, and is acknowledged, or refused. False when nobody has asked for that type.
    pub(super) fn answered(
        &self,
        type_url: &'static str,
        version: String,
        nonce: String,
        refusal: Option<Detail>,
    ) -> bool {
        self.change(|state| {
            let Some(subscription) = state.subscriptions.get_mut(type_url).filter(|s| s.asked.is_some()) else {
                return false;
            };
            if refusal.is_none() {
                subscription.version = version;
            }
            subscription.nonce = nonce;
            subscription.owed = Some(refusal);
            true
        })
    }

    /// Half-closes the stream once all is said.
    pub(super) fn close(&self) {
        self.change(|state| state.closed = true);
    }
}

impl State {
    /// The next request. Subscriptions go first: they say who we are, and istiod drops a report that comes before.
    fn next(&mut self) -> Option<Ask> {
        for (type_url, subscription) in &mut self.subscriptions {
            if subscription.asked.as_ref() != Some(&subscription.wanted) {
                return Some(subscription.ask(type_url, self.node.take()));
            }
        }
        if self.node.is_none()
            && let Some(detail) = self.report.take()
        {
            return Some(Ask { detail, ..Ask::of(HEALTH) });
        }
        self.subscriptions.iter_mut().find_map(|(type_url, subscription)| subscription.acknowledge(type_url))
    }
}

impl Subscription {
    fn ask(&mut self, type_url: &'static str, node: Option<Node>) -> Ask {
        let before = self.asked.replace(self.wanted.clone()).unwrap_or_default();
        Ask {
            node,
            subscribe: self.wanted.difference(&before).cloned().collect(),
            unsubscribe: before.difference(&self.wanted).cloned().collect(),
            names: self.wanted.iter().cloned().collect(),
            version: self.version.clone(),
            nonce: self.nonce.clone(),
            ..Ask::of(type_url)
        }
    }

    fn acknowledge(&mut self, type_url: &'static str) -> Option<Ask> {
        let detail = self.owed.take()?;
        Some(Ask {
            names: self.wanted.iter().cloned().collect(),
            version: self.version.clone(),
            nonce: self.nonce.clone(),
            answers: true,
            detail,
            ..Ask::of(type_url)
        })
    }
}

impl tokio_stream::Stream for Outbox {
    type Item = Ask;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Ask>> {
        let mut state = self.lock();
        match state.next() {
            Some(ask) => Poll::Ready(Some(ask)),
            None if state.closed => Poll::Ready(None),
            None => {
                state.waker = Some(cx.waker().clone());
                Poll::Pending
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::istiod::ads::{CLUSTERS, ENDPOINTS};

    fn names(names: &[&str]) -> BTreeSet<String> {
        names.iter().map(|name| (*name).to_owned()).collect()
    }

    fn fetched(outbox: &Outbox) -> Vec<Ask> {
        std::iter::from_fn(|| outbox.lock().next()).collect()
    }

    #[test]
    fn a_flood_of_answers_owes_one_acknowledgement_and_delays_no_report() {
        let outbox = Outbox::new(Node::default());
        outbox.want(ENDPOINTS, names(&["a"]));
        assert_eq!(fetched(&outbox).len(), 1);
        for n in 0..10_000 {
            assert!(outbox.answered(ENDPOINTS, format!("v{n}"), format!("n{n}"), None));
        }
        let failing = || Some(Detail { code: 13, message: "down".to_owned() });
        outbox.report(None);
        outbox.report(failing());
        let asks = fetched(&outbox);
        assert_eq!(asks.iter().map(|ask| ask.type_url).collect::<Vec<_>>(), [HEALTH, ENDPOINTS]);
        assert_eq!((&asks[0].detail, asks[1].nonce.as_str(), asks[1].version.as_str()), (&failing(), "n9999", "v9999"));
    }

    #[test]
    fn who_we_are_is_said_once_and_first() {
        let outbox = Outbox::new(Node { id: "sidecar~".to_owned(), ..Node::default() });
        outbox.report(None);
        assert!(fetched(&outbox).is_empty(), "istiod drops a report that comes before the first subscription");
        outbox.want(ENDPOINTS, names(&["a", "b"]));
        outbox.want(ENDPOINTS, names(&["b", "c"]));
        let asks = fetched(&outbox);
        assert_eq!(asks.iter().map(|ask| ask.type_url).collect::<Vec<_>>(), [ENDPOINTS, HEALTH]);
        assert!(asks[0].node.is_some() && asks[1].node.is_none());
        assert_eq!((&asks[0].subscribe, &asks[0].unsubscribe), (&vec!["b".to_owned(), "c".to_owned()], &vec![]));
        outbox.want(ENDPOINTS, names(&["c", "d"]));
        outbox.want(ENDPOINTS, names(&["c", "d"]));
        let [ask] = &fetched(&outbox)[..] else { panic!("one change is one request") };
        assert_eq!((&ask.subscribe, &ask.unsubscribe), (&vec!["d".to_owned()], &vec!["b".to_owned()]));
        assert!(ask.node.is_none() && !ask.answers);
    }

    #[test]
    fn what_was_not_asked_for_is_never_answered() {
        let outbox = Outbox::new(Node::default());
        let refusal = Some(Detail::default());
        assert!(!outbox.answered(CLUSTERS, "v".to_owned(), "n".to_owned(), refusal.clone()));
        outbox.want(CLUSTERS, BTreeSet::new());
        assert_eq!(fetched(&outbox).len(), 1);
        assert!(outbox.answered(CLUSTERS, "v".to_owned(), "n".to_owned(), refusal));
        let [ask] = &fetched(&outbox)[..] else { panic!("one refusal") };
        assert_eq!((ask.version.as_str(), ask.nonce.as_str(), ask.detail.is_some()), ("", "n", true));
    }
}
