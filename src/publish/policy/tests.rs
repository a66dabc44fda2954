use super::*;
use tonic::Code;

#[test]
fn a_refusal_says_who_and_what_to_change() {
    let who = |user: Option<&str>, unit: Option<&str>| Who {
        peer: "uid 1001, gid 1002, pid 77".to_owned(),
        uid: 1001,
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
    assert!(text(who(None, None), Why::Stranger).contains("add {user: 1001} to"));
    assert!(text(who(None, None), Why::Nameless).ends_with("the name service does not answer"));
    assert!(text(who(None, None), Why::Unknown(UnitError::Late)).contains(
        "its unit cannot be told (systemd did not answer in time), and nothing else lets it in; if it should"
    ));
    assert!(
        text(who(None, None), Why::Gone)
            .ends_with("its process has ended, and who has its connection now is not known")
    );
    assert_eq!(
        text(who(None, None), Why::Crowded(7)),
        "refused uid 1001, gid 1002, pid 77: this user has 7 connections already, which is the most; end some of them"
    );
}

#[test]
fn only_what_is_known_is_final() {
    let refused = |name: &str| UnitError::Refused { name: name.to_owned(), text: String::new() };
    for (why, code) in [
        (Why::Stranger, Code::PermissionDenied),
        (Why::Gone, Code::PermissionDenied),
        (Why::Unknown(refused("org.freedesktop.systemd1.NoUnitForPID")), Code::PermissionDenied),
        (Why::Unknown(refused("org.freedesktop.DBus.Error.NoReply")), Code::Unavailable),
        (Why::Unknown(UnitError::Late), Code::Unavailable),
        (Why::Unknown(UnitError::Unpinned), Code::Unavailable),
        (Why::Nameless, Code::Unavailable),
        (Why::Crowded(7), Code::ResourceExhausted),
    ] {
        let who = Who { peer: String::new(), uid: 1001, user: None, unit: None };
        let denied = Denied { workload: String::new(), who, why };
        assert_eq!(denied.status().code(), code, "{denied}");
    }
}
