//! Whether the mesh's list and our verdict agree, and what is done when they do not: the list is the only
//! acknowledgement that a report ever gets, and the only sign that somebody has deleted the entry. Pure.
//!
//! Only services that have listed us once are watched, so whoever never listed us contradicts nothing: a mesh may have
//! reasons of its own, say the gateway of another network in our place.

use std::time::Duration;
use tokio::time::Instant;

/// A contradiction that lasts longer is reported again, and as often: a report that is lost once may be lost twice.
const REPORT: Duration = Duration::from_secs(3);
/// Once a new stream has registered, for that long: istiod writes nothing while its own picture of the cluster is old, as
/// it is for up to a minute after an outage of the API server. Then as rarely as it may register anew.
const HURRY: Duration = Duration::from_secs(120);
/// One that lasts longer takes a new stream, which registers anew.
const ANEW: Duration = Duration::from_secs(10);
/// Between two of those, at first; doubled by each, up to the most, until the list has agreed for as long.
const GAP: Duration = Duration::from_secs(30);
const MOST: Duration = Duration::from_secs(3600);

/// What is to be done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Step {
    /// Report the verdict again.
    Report,
    /// Open a new stream; whether it is the first for this contradiction, which is worth a line.
    Anew { first: bool },
}

/// A contradiction.
#[derive(Debug)]
struct Row {
    /// Whether our verdict would have us listed.
    wanted: bool,
    report_at: Instant,
    anew_at: Instant,
    /// A line was written.
    told: bool,
    /// When a stream was opened since it began: the entry is there, and what the list says is what the mesh wants.
    registered: Option<Instant>,
}

/// Verdict and list, side by side.
#[derive(Debug)]
pub(super) struct Agreement {
    row: Option<Row>,
    agreed: Option<Instant>,
    /// No new stream before that.
    earliest: Option<Instant>,
    gap: Duration,
}

impl Agreement {
    pub(super) fn new() -> Self {
        Self { row: None, agreed: None, earliest: None, gap: GAP }
    }

    /// Takes in what is true now: whether the verdict would have us `listed`, none while there is none, and whether the
    /// mesh has, none while no service is known to select us. True when a contradiction has ended by that.
    pub(super) fn weigh(&mut self, wanted: Option<bool>, listed: Option<bool>, now: Instant) -> bool {
        match (wanted, listed) {
            (Some(wanted), Some(listed)) if wanted != listed => {
                if self.row.as_ref().is_none_or(|row| row.wanted != wanted) {
                    if self.agreed.take().is_some_and(|agreed| now - agreed >= self.gap) {
                        self.gap = GAP;
                    }
                    let told = self.row.as_ref().is_some_and(|row| row.told);
                    self.row = Some(Row { told, ..self.begin(wanted, now) });
                }
                false
            }
            _ => {
                self.agreed.get_or_insert(now);
                self.row.take().is_some()
            }
        }
    }

    fn begin(&self, wanted: bool, now: Instant) -> Row {
        let anew_at = self.earliest.map_or(now + ANEW, |earliest| earliest.max(now + ANEW));
        Row { wanted, report_at: now + REPORT, anew_at, told: false, registered: None }
    }

    /// A new stream was answered, for whatever reason: it has registered anew, and reported.
    pub(super) fn registered(&mut self, now: Instant) {
        if let Some(Row { wanted, told, registered, .. }) = self.row {
            self.row = Some(Row { told, registered: Some(registered.unwrap_or(now)), ..self.begin(wanted, now) });
        }
    }

    /// Whether the list contradicts a verdict that it had every chance to follow.
    pub(super) fn is_final(&self) -> bool {
        self.row.as_ref().is_some_and(|row| row.registered.is_some())
    }

    /// When [`Agreement::due`] has something to say.
    pub(super) fn next(&self) -> Option<Instant> {
        self.row.as_ref().map(|row| row.report_at.min(row.anew_at))
    }

    /// What is due at this moment.
    pub(super) fn due(&mut self, now: Instant) -> Option<Step> {
        let row = self.row.as_mut()?;
        if row.anew_at <= now {
            let first = !std::mem::replace(&mut row.told, true);
            row.anew_at = now + self.gap;
            self.earliest = Some(row.anew_at);
            self.gap = (self.gap * 2).min(MOST);
            return Some(Step::Anew { first });
        }
        if row.report_at <= now {
            let late = row.registered.is_some_and(|registered| now - registered > HURRY);
            row.report_at = now + if late { GAP } else { REPORT };
            return Some(Step::Report);
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEALTHY: Option<bool> = Some(true);
    const UNHEALTHY: Option<bool> = Some(false);
    const LISTED: Option<bool> = Some(true);
    const GONE: Option<bool> = Some(false);

    fn s(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    /// What is done until `end`, and when, in seconds from `begin`.
    fn steps(agreement: &mut Agreement, begin: Instant, end: Duration) -> Vec<(u64, Step)> {
        let mut steps = Vec::new();
        while let Some(at) = agreement.next().filter(|at| *at <= begin + end) {
            steps.extend(agreement.due(at).map(|step| ((at - begin).as_secs(), step)));
        }
        steps
    }

    #[test]
    fn who_vanishes_reports_again_and_then_registers_anew() {
        let (mut agreement, now) = (Agreement::new(), Instant::now());
        assert!(!agreement.weigh(HEALTHY, LISTED, now) && agreement.next().is_none());
        assert!(!agreement.weigh(HEALTHY, GONE, now));
        let (report, anew) = (Step::Report, Step::Anew { first: true });
        assert_eq!(steps(&mut agreement, now, s(10)), [(3, report), (6, report), (9, report), (10, anew)]);
        agreement.registered(now + s(10));
        assert!(agreement.is_final() && agreement.weigh(HEALTHY, LISTED, now + s(11)), "it is over");
        assert!(!agreement.is_final() && agreement.next().is_none());
    }

    #[test]
    fn a_lost_report_is_repeated_until_it_is_heard() {
        for (wanted, listed) in [(HEALTHY, GONE), (UNHEALTHY, LISTED)] {
            let (mut agreement, now) = (Agreement::new(), Instant::now());
            agreement.weigh(wanted, listed, now);
            let steps = steps(&mut agreement, now, s(600));
            let reports: Vec<_> = steps.iter().filter(|(_, step)| *step == Step::Report).map(|(at, _)| *at).collect();
            assert!(reports.windows(2).all(|pair| pair[1] - pair[0] == 3), "heard within seconds: {reports:?}");
            assert_eq!(reports.last(), Some(&600));
        }
    }

    #[test]
    fn a_mesh_with_reasons_of_its_own_is_asked_more_and_more_rarely_and_told_of_once() {
        let (mut agreement, now) = (Agreement::new(), Instant::now());
        agreement.weigh(HEALTHY, GONE, now);
        let mut anew = Vec::new();
        while let Some(at) = agreement.next().filter(|at| *at <= now + s(8_000)) {
            if let Some(Step::Anew { first }) = agreement.due(at) {
                anew.push(((at - now).as_secs(), first));
                agreement.registered(at);
            }
        }
        let times = [10, 40, 100, 220, 460, 940, 1900, 3820, 7420];
        assert_eq!(anew.iter().map(|(at, _)| *at).collect::<Vec<_>>(), times);
        assert_eq!(anew.iter().filter(|(_, first)| *first).count(), 1);
    }

    #[test]
    fn the_gap_outlives_a_contradiction_but_not_a_long_peace() {
        let (mut agreement, now) = (Agreement::new(), Instant::now());
        agreement.weigh(HEALTHY, GONE, now);
        steps(&mut agreement, now, s(10));
        agreement.weigh(HEALTHY, LISTED, now + s(11));
        agreement.weigh(HEALTHY, GONE, now + s(12));
        assert_eq!(steps(&mut agreement, now, s(40)).last(), Some(&(40, Step::Anew { first: true })));
        agreement.weigh(HEALTHY, LISTED, now + s(41));
        let later = now + s(400);
        agreement.weigh(HEALTHY, GONE, later);
        steps(&mut agreement, later, s(10));
        assert_eq!(agreement.gap, GAP * 2, "peace was long enough to forget");
    }

    #[test]
    fn without_a_verdict_or_a_service_there_is_nothing_to_contradict() {
        let (mut agreement, now) = (Agreement::new(), Instant::now());
        for (wanted, listed) in [(None, LISTED), (None, GONE), (HEALTHY, None), (UNHEALTHY, GONE), (HEALTHY, LISTED)] {
            assert!(!agreement.weigh(wanted, listed, now) && agreement.next().is_none());
        }
        // A verdict that turns begins anew; a service that goes away ends it.
        agreement.weigh(HEALTHY, GONE, now);
        agreement.weigh(UNHEALTHY, LISTED, now + s(2));
        assert_eq!(agreement.next(), Some(now + s(5)));
        assert!(agreement.weigh(UNHEALTHY, None, now + s(6)));
    }
}
