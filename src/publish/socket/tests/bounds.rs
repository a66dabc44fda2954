//! What one user can take.
use super::*;
use std::sync::atomic::{AtomicUsize, Ordering};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::{
    Layer,
    layer::{Context, SubscriberExt as _},
};

/// Counts warnings.
#[derive(Clone, Default)]
struct Warnings(Arc<AtomicUsize>);

impl<S: Subscriber> Layer<S> for Warnings {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        if *event.metadata().level() == Level::WARN {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }
}

fn services() -> Services {
    Services {
        policy: Arc::new(Policy::new("payments", Vec::new(), Units::new(&Root::new("/nowhere")))),
        secrets: watch::channel(Secrets::default()).1,
        identity: watch::channel(Identity::default()).1,
        consumers: Consumers::new(watch::channel(status::Consumers::default()).0),
        clock: Clock::Wall,
    }
}

#[tokio::test]
async fn a_user_has_so_many_connections_and_no_more_until_one_has_ended() {
    let warnings = Warnings::default();
    let _heard = tracing::subscriber::set_default(tracing_subscriber::registry().with(warnings.clone()));
    let services = services();
    let mut crowd = Crowd::new(2);
    let mut come = || {
        let (ours, theirs) = UnixStream::pair().unwrap();
        crowd.admit(ours, &services);
        (theirs, crowd.connections.len())
    };
    let ((first, one), (_second, two), (mut third, still)) = (come(), come(), come());
    assert_eq!((one, two, still), (1, 2, 2));
    let end = timeout(SOON, third.read_u8()).await.unwrap();
    assert!(end.is_err(), "it is closed");
    for _ in 0..100 {
        assert_eq!(come().1, 2);
    }
    assert_eq!(warnings.0.load(Ordering::Relaxed), 1, "the journal has one line");
    drop(first);
    timeout(SOON, crowd.left()).await.unwrap();
    let (ours, _theirs) = UnixStream::pair().unwrap();
    crowd.admit(ours, &services);
    assert_eq!(crowd.connections.len(), 2);
}
