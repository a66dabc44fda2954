use super::*;

#[test]
fn a_refusal_is_said_once_a_minute_for_each_user() {
    let (mut refusals, start) = (Refusals::default(), Instant::now());
    let at = |seconds| start + Duration::from_secs(seconds);
    assert_eq!(refusals.count(1000, at(0)), Some(0));
    assert_eq!(refusals.count(1000, at(1)), None);
    assert_eq!(refusals.count(1000, at(59)), None);
    assert_eq!(refusals.count(1001, at(59)), Some(0));
    assert_eq!(refusals.count(1000, at(60)), Some(2));
    assert_eq!(refusals.count(1000, at(61)), None);
}

#[test]
fn many_users_share_a_line_and_no_memory() {
    let (mut refusals, start) = (Refusals::default(), Instant::now());
    let said = (0..10_000).filter(|uid| refusals.count(*uid, start).is_some()).count();
    assert_eq!((said, refusals.0.len()), (MAX_COUNTED + 1, MAX_COUNTED + 1));
    // Those that are old make room.
    assert_eq!(refusals.count(20_000, start + SAY_EVERY), Some(10_000 - MAX_COUNTED as u64 - 1));
    assert_eq!(refusals.count(20_001, start + SAY_EVERY), Some(0));
}

#[test]
fn a_refusal_says_who_and_what_to_change() {
    let who = |user: Option<&str>, unit: Option<&str>| Who {
        peer: "uid 1001, gid 1002, pid 77".to_owned(),
        user: user.map(str::to_owned),
        unit: unit.map(str::to_owned),
    };
    let text = |who, why| Denied { workload: "payments".to_owned(), who, why }.to_string();
    assert_eq!(
        text(who(Some("bob"), None), Why::Stranger),
        "refused uid 1001, gid 1002, pid 77, user bob: no entry of socket.allow lets it in; if it should have the key, \
         add {user: bob} to workloads.payments.socket.allow in we-agent.yaml"
    );
    assert!(text(who(Some("bob"), Some("cron.service")), Why::Stranger).contains("add {unit: cron.service} to"));
    assert!(text(who(None, None), Why::Unknown(UnitError::Late)).contains(
        "its unit cannot be told (systemd did not answer in time), and nothing else lets it in; if it should"
    ));
    assert!(
        text(who(None, None), Why::Gone)
            .ends_with("its process has ended, and who has its connection now is not known")
    );
}
