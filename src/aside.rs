//! What may wait for ever, for a disk or for a name service, is done aside: on a thread of the runtime, while the event loop
//! goes on.
//!
//! Who may use which thread is decided here and nowhere else (`clippy.toml` keeps it so). Each thing that can hang, a file, a
//! directory, a name, has one thread at most, whoever asks for it and however often: what hangs keeps nobody waiting but
//! those who need it, and there is no pool that anybody could fill. As long as nothing hangs, one thread does it all, for each
//! has memory of its own (a stack, an arena); it ends soon after its work, so that none is there while nothing happens.

use std::{
    collections::HashMap,
    ffi::{OsStr, OsString},
    future::pending,
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError, Weak},
    thread,
    time::Duration,
};
use tokio::{
    sync::{self, Semaphore, oneshot, watch},
    task::spawn_blocking,
    time::{error::Elapsed, sleep, timeout},
};
use tracing::warn;

/// How long a thread waits for more to do: those of a start follow each other.
pub(crate) const IDLE: Duration = Duration::from_millis(100);
/// How long the one thread is waited for by who could have another. A sync of a disk takes as long.
const MOMENT: Duration = Duration::from_millis(20);
/// More things than any configuration has: the number of threads is bounded by the things that they wait for.
pub(crate) const MOST: usize = 1 << 16;

/// From one try to get a thread to the next, where there was none.
const AGAIN: Duration = Duration::from_millis(500);

/// The turns of those who wait, by what they wait for.
static TURNS: LazyLock<Mutex<HashMap<OsString, Weak<sync::Mutex<()>>>>> = LazyLock::new(Mutex::default);

/// The one thread.
static ONE: Semaphore = Semaphore::const_new(1);

/// Does `work`, which waits for `what` (a path, or else words), when all is done that was begun before for the same. Work that
/// was begun goes on when nobody waits any more.
pub(crate) async fn aside<T: Send + 'static>(what: impl AsRef<OsStr>, work: impl FnOnce() -> T + Send + 'static) -> T {
    let turn = turn(what.as_ref()).lock_owned().await;
    let (one, (tell, told)) = (timeout(MOMENT, ONE.acquire()).await, oneshot::channel());
    let begun = begin(move || {
        let done = catch_unwind(AssertUnwindSafe(work));
        drop((turn, one));
        let _ = tell.send(done);
    });
    if !begun {
        warn!(
            "the system gives no thread for {}, so that is late: see TasksMax= and the limits of the host",
            what.as_ref().display()
        );
        tokio::spawn(begin_later());
    }
    match told.await {
        Ok(Ok(done)) => done,
        // A bug stays a bug, wherever it ran.
        Ok(Err(panic)) => resume_unwind(panic),
        Err(_) => pending().await, // the runtime is going down
    }
}

/// Whether there is a thread for it. If not, the runtime panics, but has it in its queue, from which the next thread takes it.
fn begin(job: impl FnOnce() + Send + 'static) -> bool {
    #[expect(clippy::disallowed_methods, reason = "this is the place")]
    catch_unwind(AssertUnwindSafe(|| spawn_blocking(job))).is_ok()
}

/// Has a thread look into the queue as soon as there may be one: nobody else may be left who asks for one.
async fn begin_later() {
    loop {
        sleep(AGAIN).await;
        // Asked of the system first, for the runtime would panic once more.
        if thread::Builder::new().spawn(|| {}).is_ok() && begin(|| {}) {
            return;
        }
    }
}

/// The same with a bound on the wait.
///
/// # Errors
/// When it is not done in time.
pub(crate) async fn within<T: Send + 'static>(
    bound: Duration,
    what: impl AsRef<OsStr>,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, Elapsed> {
    timeout(bound, aside(what, work)).await
}

fn turn(what: &OsStr) -> Arc<sync::Mutex<()>> {
    let mut turns = locked(&TURNS);
    turns.retain(|_, turn| turn.strong_count() > 0);
    if let Some(turn) = turns.get(what).and_then(Weak::upgrade) {
        return turn;
    }
    let turn = Arc::default();
    turns.insert(what.to_owned(), Arc::downgrade(&turn));
    turn
}

/// Questions to somebody who may never answer. Nothing is asked that is being asked already: who comes meanwhile gets the
/// same answer.
#[derive(Debug)]
pub(crate) struct Questions<A>(Mutex<HashMap<String, watch::Receiver<Option<A>>>>);

impl<A> Default for Questions<A> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<A: Clone + Send + Sync + 'static> Questions<A> {
    /// What is answered to `ask`, or to the same `question` that was asked before. Who asks sets the bound.
    pub(crate) async fn ask(&self, question: &str, ask: impl FnOnce() -> A + Send + 'static) -> A {
        let mut told = {
            let mut open = locked(&self.0);
            open.retain(|_, answer| answer.borrow().is_none() && answer.has_changed().is_ok());
            let begin = || {
                let (tell, told) = watch::channel(None);
                let asked = aside(format!("question {question}"), ask);
                tokio::spawn(async move { tell.send_replace(Some(asked.await)) });
                told
            };
            open.entry(question.to_owned()).or_insert_with(begin).clone()
        };
        match told.wait_for(Option::is_some).await.ok().and_then(|answer| answer.clone()) {
            Some(answer) => answer,
            None => pending().await, // the runtime is going down
        }
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use std::sync::{
        atomic::{AtomicUsize, Ordering::Relaxed},
        mpsc,
    };

    #[tokio::test]
    async fn what_hangs_holds_one_thread_and_nobody_else() {
        let (release, hangs) = mpsc::channel::<()>();
        let (here, there) = ("/hangs/token", "/answers/token");
        let brief = Duration::from_millis(50);
        assert!(within(brief, here, move || hangs.recv().is_err()).await.is_err());
        // The next one waits for its turn, and not for ever; its work is not begun.
        for _ in 0..3 {
            assert!(within(brief, here, || panic!("a second thread hangs")).await.is_err());
        }
        assert_eq!(aside(there, || 1).await, 1);
        drop(release);
        assert_eq!(aside(here, || 2).await, 2);
    }

    #[tokio::test]
    async fn a_panic_is_the_panic_of_who_waits_and_ends_the_turn() {
        let failed = tokio::spawn(aside("/panics", || panic!("by intent"))).await;
        assert!(failed.unwrap_err().is_panic());
        assert_eq!(aside("/panics", || 1).await, 1);
    }

    #[tokio::test]
    async fn a_question_is_asked_once_however_many_wait_for_the_answer() {
        static ASKED: AtomicUsize = AtomicUsize::new(0);
        let questions = Arc::new(Questions::default());
        let (answer, answers) = mpsc::channel();
        let answers = Arc::new(Mutex::new(answers));
        let slowly = || {
            let answers = answers.clone();
            move || {
                ASKED.fetch_add(1, Relaxed);
                answers.lock().unwrap().recv().unwrap()
            }
        };
        let waiting: Vec<_> = (0..600)
            .map(|_| {
                let (questions, slowly) = (questions.clone(), slowly());
                tokio::spawn(async move { questions.ask("istiod.example", slowly).await })
            })
            .collect();
        // Others are asked meanwhile.
        assert_eq!(questions.ask("other.example", || 3).await, 3);
        // Nobody waits any more, and it goes on.
        assert!(timeout(Duration::from_millis(50), questions.ask("istiod.example", slowly())).await.is_err());
        answer.send(7).unwrap();
        for waits in waiting {
            assert_eq!(waits.await.unwrap(), 7);
        }
        assert_eq!(ASKED.load(Relaxed), 1, "questions pile up");
        answer.send(8).unwrap();
        assert_eq!(questions.ask("istiod.example", slowly()).await, 8, "an old answer");
    }
}
