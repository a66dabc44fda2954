//! The course of a session, as a pure function: what has happened and when goes in, what is to be done comes out.
//!
//! Reasons to replace the stream are a set, so that none takes the place of another. One leaves it when a stream that was
//! opened for it is answered, or when it is none any more.

use super::{GRACE, OVERLAP, REPORTED};
use std::collections::BTreeSet;
use tokio::time::Instant;

/// Why the stream shall be replaced.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Reason {
    /// The server asked for it, or is not trusted any more.
    Goaway,
    /// A renewed certificate is to be proven.
    Renewed,
    /// The host has another address.
    Address,
    /// The mesh's list contradicts our verdict: a new stream registers anew.
    Disowned,
}

pub(super) type Reasons = BTreeSet<Reason>;

/// Where a session stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// The first stream is being opened.
    Opening,
    /// A stream lives.
    Held,
    /// A stream lives, and its successor is being opened.
    Moving,
    /// The stream has ended while its successor is being opened. Until then nobody needs to know.
    Adrift(Instant),
    /// The same for longer.
    Lost,
    /// The application was taken out of service; from then on the streams are closed.
    Parting(Instant),
    /// The older stream is closed; the live one follows then.
    Closing(Instant),
    /// All is done.
    Over,
}

/// What has happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Event {
    /// There is a reason to replace the stream, not before that moment.
    Reason(Reason, Instant),
    /// That is no reason any more.
    Moot(Reason),
    /// The stream that was being opened is answered. Its credential was not the best one: that is proven again then.
    Answered(Option<Instant>),
    /// It could not be opened; when it may be tried again.
    Failed(Instant),
    /// The live stream has ended.
    Ended,
    /// A moment that was asked for has come.
    Time,
    /// The session shall end; for good means that the application is taken out of service before.
    Stop { for_good: bool },
}

/// What is to be done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Action {
    /// Open a stream, for these reasons.
    Open(Reasons),
    /// The stream that was answered is the live one; the one before it, if it lives, is the older one.
    Adopt,
    /// Close the older stream.
    Retire,
    /// Tell that the registration is lost.
    Lose,
    /// Report that the application is out of service.
    Withdraw,
    /// Close the live stream.
    Close,
    /// The session has ended as it was told to.
    End,
    /// The session has ended by the last error.
    Fail,
}

/// A session as far as its course goes.
#[derive(Debug)]
pub(super) struct Machine {
    state: State,
    /// Reasons that wait for `due`, and those for which a stream is being opened.
    pending: Reasons,
    taken: Reasons,
    due: Option<Instant>,
    /// When the older stream may be closed; none when there is none.
    older: Option<Instant>,
    /// When the last one was.
    retired: Option<Instant>,
}

impl Machine {
    /// A session whose first stream is being opened.
    pub(super) fn new() -> Self {
        Self {
            state: State::Opening,
            pending: Reasons::new(),
            taken: Reasons::new(),
            due: None,
            older: None,
            retired: None,
        }
    }

    /// Whether this reason stands.
    pub(super) fn has(&self, reason: Reason) -> bool {
        self.pending.contains(&reason) || self.taken.contains(&reason)
    }

    /// For which reasons a stream is being opened.
    pub(super) fn taken(&self) -> &Reasons {
        &self.taken
    }

    /// Whether it was told to end.
    pub(super) fn is_leaving(&self) -> bool {
        matches!(self.state, State::Parting(_) | State::Closing(_) | State::Over)
    }

    /// When [`Event::Time`] is due.
    pub(super) fn next(&self) -> Option<Instant> {
        let state = match self.state {
            State::Held => self.due,
            State::Adrift(at) | State::Parting(at) | State::Closing(at) => Some(at),
            _ => None,
        };
        state.into_iter().chain(self.older).min()
    }

    /// That is no reason any more.
    pub(super) fn forget(&mut self, reason: Reason) {
        self.pending.remove(&reason);
        self.taken.remove(&reason);
    }

    /// The transition.
    pub(super) fn on(&mut self, event: Event, now: Instant) -> Vec<Action> {
        let mut actions = Vec::new();
        match event {
            Event::Stop { for_good } => self.stop(for_good, now, &mut actions),
            Event::Reason(reason, at) => self.want(reason, at),
            Event::Moot(reason) => self.forget(reason),
            Event::Answered(again) => {
                self.answered(again, now, &mut actions);
                // Whether the new stream is good for what was wanted meanwhile is seen before another is opened.
                return actions;
            }
            Event::Failed(again) => match self.state {
                State::Moving => {
                    self.state = State::Held;
                    for reason in std::mem::take(&mut self.taken) {
                        self.want(reason, again);
                    }
                }
                State::Opening | State::Adrift(_) | State::Lost => self.end(Action::Fail, &mut actions),
                _ => {}
            },
            Event::Ended => match self.state {
                State::Held => self.end(Action::Fail, &mut actions),
                State::Moving => self.state = State::Adrift(now + GRACE),
                State::Parting(_) | State::Closing(_) => self.end(Action::End, &mut actions),
                _ => {}
            },
            Event::Time => {}
        }
        self.time(now, &mut actions);
        actions
    }

    fn want(&mut self, reason: Reason, at: Instant) {
        self.pending.insert(reason);
        self.due = Some(self.due.map_or(at, |due| due.min(at)));
    }

    fn answered(&mut self, again: Option<Instant>, now: Instant, actions: &mut Vec<Action>) {
        match self.state {
            State::Moving => {
                self.retire(now, actions); // should there still be one
                self.older = Some(now + OVERLAP);
            }
            State::Opening | State::Adrift(_) | State::Lost => {}
            _ => return,
        }
        self.state = State::Held;
        self.taken.clear();
        actions.push(Action::Adopt);
        if let Some(at) = again {
            self.want(Reason::Renewed, at);
        }
    }

    fn stop(&mut self, for_good: bool, now: Instant, actions: &mut Vec<Action>) {
        match self.state {
            State::Held | State::Moving if for_good => {
                actions.push(Action::Withdraw);
                self.state = State::Parting(now + REPORTED);
            }
            State::Held | State::Moving => self.state = State::Parting(now),
            State::Opening | State::Adrift(_) | State::Lost => self.end(Action::End, actions),
            _ => {}
        }
    }

    /// What is due at this moment.
    fn time(&mut self, now: Instant, actions: &mut Vec<Action>) {
        if self.older.is_some_and(|at| at <= now) {
            self.retire(now, actions);
        }
        match self.state {
            State::Held if self.pending.is_empty() => self.due = None,
            State::Held if self.due.is_some_and(|at| at <= now) => {
                self.due = None;
                self.taken = std::mem::take(&mut self.pending);
                self.state = State::Moving;
                actions.push(Action::Open(self.taken.clone()));
            }
            State::Adrift(at) if at <= now => {
                self.state = State::Lost;
                actions.push(Action::Lose);
            }
            State::Parting(at) if at <= now => {
                self.retire(now, actions);
                self.state = State::Closing(self.retired.map_or(now, |retired| retired + OVERLAP));
                self.time(now, actions);
            }
            State::Closing(at) if at <= now => {
                actions.push(Action::Close);
                self.end(Action::End, actions);
            }
            _ => {}
        }
    }

    /// Always the older first: istiod forgets to mark an entry whose newer stream ended before the older.
    fn retire(&mut self, now: Instant, actions: &mut Vec<Action>) {
        if self.older.take().is_some() {
            self.retired = Some(now);
            actions.push(Action::Retire);
        }
    }

    fn end(&mut self, how: Action, actions: &mut Vec<Action>) {
        if self.older.take().is_some() {
            actions.push(Action::Retire);
        }
        self.state = State::Over;
        actions.push(how);
    }
}

#[cfg(test)]
mod tests;
