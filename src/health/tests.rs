#![allow(clippy::unwrap_used)]
use super::*;
use crate::workload::ProbeMethod;
use std::{cell::Cell, future::pending, time::Duration};

fn probe(method: ProbeMethod) -> ReadinessProbe {
    ReadinessProbe {
        initial_delay: Duration::from_secs(2),
        timeout: Duration::from_secs(1),
        period: Duration::from_secs(10),
        success_threshold: 1,
        failure_threshold: 1,
        method,
    }
}

fn exec(command: &str) -> ProbeMethod {
    ProbeMethod::Exec { command: vec!["/bin/sh".to_owned(), "-c".to_owned(), command.to_owned()] }
}

/// Runs the loop against a script of (duration, outcome), and gives the second at which each probe began and at which
/// each verdict was said.
async fn play(script: &[(u64, bool)]) -> (Vec<u64>, Vec<(u64, bool)>) {
    let start = Instant::now();
    let begun = Cell::new(0);
    let starts = std::cell::RefCell::new(Vec::new());
    let (fact, mut seen) = watch::channel(Health::Unknown);
    let attempt = || {
        let step = script.get(begun.replace(begun.get() + 1)).copied();
        let starts = &starts;
        async move {
            let Some((takes, good)) = step else { return pending().await };
            starts.borrow_mut().push(start.elapsed().as_secs());
            sleep(Duration::from_secs(takes)).await;
            if good { Ok(()) } else { Err(Unhealthy::new("no")) }
        }
    };
    let probe = probe(exec("true"));
    let mut verdicts = Vec::new();
    let watching = async {
        while seen.changed().await.is_ok() {
            match *seen.borrow_and_update() {
                Health::Healthy => verdicts.push((start.elapsed().as_secs(), true)),
                Health::Unhealthy { .. } => verdicts.push((start.elapsed().as_secs(), false)),
                _ => {}
            }
        }
    };
    tokio::select! {
        () = keep_verdict(&probe, attempt, Vec::new(), &fact) => {}
        () = watching => {}
        () = sleep(Duration::from_secs(1000)) => {}
    }
    drop(fact);
    (starts.into_inner(), verdicts)
}

#[tokio::test(start_paused = true)]
async fn ticks_begin_when_the_first_probe_has_ended() {
    let (starts, verdicts) = play(&[(3, false), (0, false), (0, true), (0, true)]).await;
    assert_eq!(starts, [2, 15, 25, 35]);
    assert_eq!(verdicts, [(5, false), (25, true)]);
}

#[tokio::test(start_paused = true)]
async fn an_overrun_tick_fires_at_once_and_only_once() {
    // The second probe takes 32 s: the ticks at 22, 32 and 42 become one at 44, the next is on the old beat.
    let (starts, _) = play(&[(0, true), (32, true), (0, true), (0, true)]).await;
    assert_eq!(starts, [2, 12, 44, 52]);
}

/// A port that we cannot serve is no endpoint, whatever the application says, and that is said within no time.
#[tokio::test]
async fn a_listener_that_cannot_serve_makes_the_workload_unhealthy() {
    const SLOW: Duration = Duration::from_secs(3600);
    let (fact, mut seen) = watch::channel(Health::Unknown);
    let (place, told) = watch::channel(InboundPlace::Absent);
    let at = "127.0.0.1:1".parse().unwrap();
    let to = crate::host::Local::Tcp("127.0.0.1:2".parse().unwrap());
    let detours = vec![Detour { listen: (None, 1), place: told, to, proxy_header: false }];
    let settings = ProbeSettings { allow_exec: true, detours, ..ProbeSettings::default() };
    let (_addresses, addresses) = watch::channel(Addresses::default());
    let shutdown = CancellationToken::new();
    let probe = ReadinessProbe { period: SLOW, initial_delay: Duration::ZERO, ..probe(exec("true")) };
    let running = tokio::spawn(run(Some(probe), settings, addresses, fact, shutdown.clone()));
    seen.wait_for(|health| *health == Health::Healthy).await.unwrap();
    for news in [
        InboundPlace::Deaf { at, cause: "the certificate has expired".to_owned() },
        InboundPlace::Failed("cannot listen on port 1".to_owned()),
    ] {
        let cause = news.unserved().unwrap().to_owned();
        place.send_replace(news);
        let changed = Instant::now();
        seen.wait_for(|health| matches!(health, Health::Unhealthy { message } if *message == cause)).await.unwrap();
        place.send_replace(InboundPlace::Bound(at));
        seen.wait_for(|health| *health == Health::Healthy).await.unwrap();
        assert!(changed.elapsed() < SLOW / 2, "{:?}", changed.elapsed());
    }
    shutdown.cancel();
    running.await.unwrap();
}

#[tokio::test]
async fn nothing_is_said_without_a_probe_or_before_the_first_verdict() {
    for probe in [None, Some(probe(exec("true")))] {
        let (fact, seen) = watch::channel(Health::Unknown);
        let (_addresses, addresses) = watch::channel(Addresses::default());
        let shutdown = CancellationToken::new();
        shutdown.cancel(); // within the initial delay
        let settings = ProbeSettings { allow_exec: true, ..ProbeSettings::default() };
        run(probe, settings, addresses, fact, shutdown).await;
        assert!(matches!(*seen.borrow(), Health::Unknown | Health::Delayed { .. }));
    }
}

#[tokio::test(start_paused = true)]
async fn an_initial_delay_is_told_with_its_end() {
    let (fact, mut seen) = watch::channel(Health::Unknown);
    let probe = ReadinessProbe { initial_delay: Duration::from_secs(3600), ..probe(exec("true")) };
    let before = SystemTime::now();
    let watching = async {
        let told = seen.wait_for(|health| *health != Health::Unknown).await.unwrap().clone();
        let Health::Delayed { until } = told else { panic!("{told:?}") };
        assert!(until >= before + Duration::from_secs(3600));
        seen.wait_for(|health| *health == Health::Healthy).await.unwrap();
    };
    tokio::select! {
        () = keep_verdict(&probe, || async { Ok(()) }, Vec::new(), &fact) => {}
        () = watching => {}
    }
}

#[tokio::test]
async fn without_local_consent_no_command_runs() {
    let (fact, mut seen) = watch::channel(Health::Unknown);
    let (_addresses, addresses) = watch::channel(Addresses::default());
    let shutdown = CancellationToken::new();
    let loops = run(Some(probe(exec("true"))), ProbeSettings::default(), addresses, fact, shutdown.clone());
    let looking = async {
        seen.changed().await.unwrap();
        match &*seen.borrow() {
            Health::Parked { cause } => {
                assert!(cause.contains("allowExec: true") && cause.contains("/etc/we-agent/we-agent.yaml"), "{cause}");
            }
            other => panic!("{other:?}"),
        }
        shutdown.cancel();
    };
    tokio::join!(loops, looking);
}

#[test]
fn texts_of_failures_are_bounded() {
    assert_eq!(Unhealthy::new("ä".repeat(5000)).to_string().chars().count(), LONGEST_TEXT);
}
