#![allow(clippy::unwrap_used)]
use super::named;

#[test]
fn a_path_is_a_name_with_escapes() {
    for (path, name) in [
        ("nginx_2eservice", Some("nginx.service")),
        ("pg_4015_2dmain_2eservice", Some("pg@15-main.service")),
        ("a_5fb_2eservice", Some("a_b.service")),
        ("_31password_2eservice", Some("1password.service")),
        ("d_c3_a9_2eservice", Some("dé.service")),
        ("", None),
        ("nginx_2", None),
        ("nginx_zz", None),
        ("a_ff", None),
    ] {
        let path = format!("/org/freedesktop/systemd1/unit/{path}");
        assert_eq!(named(&path).as_deref(), name, "{path}");
    }
    assert_eq!(named("/org/freedesktop/systemd1/job/5"), None);
}
