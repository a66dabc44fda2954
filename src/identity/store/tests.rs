#![allow(clippy::unwrap_used)]
use super::*;
use crate::{
    authority::{Authority, Leaf},
    spiffe::KeyKind,
};
use std::{fs, os::unix::fs::PermissionsExt as _, path::PathBuf, time::Duration};

const ID: &str = "spiffe://cluster.local/ns/vms/sa/payments";

struct Case {
    host: tempfile::TempDir,
    authority: Authority,
    id: SpiffeId,
    now: SystemTime,
}

impl Case {
    fn new() -> Self {
        let now = SystemTime::UNIX_EPOCH + Duration::from_nanos(1_795_000_000_123_456_789);
        Self {
            host: tempfile::tempdir().unwrap(),
            authority: Authority::root("mesh").intermediate("istiod"),
            id: ID.parse().unwrap(),
            now,
        }
    }

    fn store(&self) -> Store {
        Store::open(&Root::new(self.host.path()), "/var/lib/we-agent/payments").unwrap()
    }

    fn dir(&self) -> PathBuf {
        self.host.path().join("var/lib/we-agent/payments")
    }

    fn context(&self, now: SystemTime) -> Arc<X509Context> {
        let key = PrivateKey::generate(KeyKind::EcP256).unwrap();
        let answer = self.authority.issue(key.pem(), &Leaf::new(&[ID], now));
        X509Context::from_answer(&self.id, key, &answer, now).unwrap()
    }

    fn anchors(&self) -> X509Bundle {
        X509Bundle::from_pem(Authority::root("operator").root_pem()).unwrap()
    }

    fn files(&self) -> Vec<String> {
        let mut files: Vec<_> =
            fs::read_dir(self.dir()).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        files.sort();
        files
    }
}

fn serial(stored: &Option<Stored>) -> Option<&str> {
    stored.as_ref().map(|s| s.context.svid.serial())
}

#[test]
fn what_is_saved_is_loaded_with_its_predecessor() {
    let case = Case::new();
    let (store, anchors) = (case.store(), case.anchors());
    assert!(store.load(&case.id, case.now).unwrap().current.is_none());

    let contexts: Vec<_> = (0..3).map(|i| case.context(case.now + Duration::from_secs(i))).collect();
    store.save(&contexts[0], None, &anchors).unwrap();
    store.save(&contexts[1], Some(&contexts[0]), &anchors).unwrap();
    store.save(&contexts[2], Some(&contexts[1]), &anchors).unwrap();

    let loaded = case.store().load(&case.id, case.now).unwrap();
    let current = loaded.current.as_ref().unwrap();
    assert_eq!(current.context.svid.serial(), contexts[2].svid.serial());
    assert_eq!(current.context.svid.key().pem(), contexts[2].svid.key().pem());
    assert_eq!(current.context.svid.chain(), contexts[2].svid.chain());
    assert_eq!(current.context.bundle, contexts[2].bundle);
    assert_eq!(current.context.received, contexts[2].received);
    assert_eq!(current.anchors, anchors);
    assert_eq!(serial(&loaded.previous), Some(contexts[1].svid.serial()));
    assert!(loaded.passed_over.is_empty());
    assert_eq!(case.files().len(), 2, "the oldest is gone");
    for file in case.files() {
        assert_eq!(fs::metadata(case.dir().join(file)).unwrap().permissions().mode() & 0o777, 0o600);
    }
    assert_eq!(fs::metadata(case.dir()).unwrap().permissions().mode() & 0o777, 0o700);
}

#[test]
fn the_pair_that_works_is_kept_while_newer_ones_are_refused() {
    let case = Case::new();
    let (store, anchors) = (case.store(), case.anchors());
    let works = case.context(case.now);
    store.save(&works, None, &anchors).unwrap();
    for _ in 0..3 {
        store.save(&case.context(case.now), Some(&works), &anchors).unwrap();
    }
    let loaded = store.load(&case.id, case.now).unwrap();
    assert_eq!(serial(&loaded.previous), Some(works.svid.serial()));
    assert_eq!(case.files().len(), 2);
}

#[test]
fn a_damaged_generation_is_set_aside_wherever_it_was_cut() {
    let case = Case::new();
    let (good, newest) = (case.context(case.now), case.context(case.now));
    let anchors = case.anchors();
    let text = serialise(&newest, &anchors);
    assert!(parse(&text, &case.id, case.now).is_ok());
    for cut in 0..text.len() - 1 {
        let error = parse(&text[..cut], &case.id, case.now);
        if cut != text.len() - 2 {
            assert!(error.unwrap_err().is_damage(), "cut at {cut}");
        }
    }

    let store = case.store();
    store.save(&good, None, &anchors).unwrap();
    store.save(&newest, Some(&good), &anchors).unwrap();
    let name = case.files().pop().unwrap();
    fs::write(case.dir().join(&name), &text[..text.len() / 2]).unwrap();
    let loaded = store.load(&case.id, case.now).unwrap();
    assert_eq!(serial(&loaded.current), Some(good.svid.serial()), "the older one serves");
    assert_eq!(loaded.passed_over[0].file, format!("{name}.unusable"));
    assert!(loaded.passed_over[0].reason.to_string().starts_with("it is cut off or damaged at line "));
    assert!(case.dir().join(format!("{name}.unusable")).exists());

    store.save(&newest, Some(&good), &anchors).unwrap();
    let loaded = store.load(&case.id, case.now).unwrap();
    assert_eq!(serial(&loaded.current), Some(newest.svid.serial()));
    assert_eq!(serial(&loaded.previous), Some(good.svid.serial()));
}

#[test]
fn flipped_bits_never_give_a_wrong_pair_and_never_quote_the_key() {
    let case = Case::new();
    let context = case.context(case.now);
    let text = serialise(&context, &case.anchors());
    let secret: Vec<_> = context.svid.key().pem().lines().filter(|line| !line.starts_with('-')).collect();
    let mut random = fastrand::Rng::with_seed(7);
    for _ in 0..400 {
        let mut broken = text.to_vec();
        let at = random.usize(..broken.len());
        broken[at] ^= 1 << random.u8(..8);
        match parse(&broken, &case.id, case.now) {
            Ok(stored) => assert_eq!(stored.context.svid.key().public(), context.svid.key().public()),
            Err(error) => {
                let said = format!("{error} {error:?}");
                assert!(secret.iter().all(|line| !said.contains(line)), "bit at {at}");
            }
        }
    }
}

#[test]
fn clocks_and_other_identities_are_no_damage() {
    let case = Case::new();
    let store = case.store();
    store.save(&case.context(case.now), None, &case.anchors()).unwrap();
    let before = case.files();
    let (early, late) = (case.now - Duration::from_secs(3600), case.now + Duration::from_secs(7200));
    for (now, said) in [(early, "check the clocks"), (late, "the certificate expired at")] {
        let loaded = store.load(&case.id, now).unwrap();
        assert!(loaded.current.is_none());
        assert!(loaded.passed_over[0].reason.to_string().contains(said));
    }
    let other = "spiffe://cluster.local/ns/vms/sa/other".parse().unwrap();
    let loaded = store.load(&other, case.now).unwrap();
    assert_eq!(loaded.passed_over[0].reason.to_string(), format!("it is for {ID}, not for {other}"));
    assert_eq!(case.files(), before, "every file keeps its name");
    assert!(store.load(&case.id, case.now).unwrap().current.is_some());
}

#[test]
fn a_newer_agents_generation_survives_us() {
    let case = Case::new();
    let (store, anchors) = (case.store(), case.anchors());
    store.save(&case.context(case.now), None, &anchors).unwrap();
    let newer = "svid-000000000007-ff.json";
    fs::write(case.dir().join(newer), r#"{"format": 2, "sealed": "…"}"#).unwrap();
    let loaded = store.load(&case.id, case.now).unwrap();
    assert!(loaded.current.is_some());
    assert!(matches!(loaded.passed_over[0].reason, StoreError::Newer(2)));
    let next = case.context(case.now);
    store.save(&next, None, &anchors).unwrap();
    assert_eq!(case.files(), [newer.to_owned(), format!("svid-000000000008-{}.json", next.svid.serial())]);
}

#[test]
fn squatted_names_and_left_overs_do_not_stop_it() {
    let case = Case::new();
    let (context, anchors) = (case.context(case.now), case.anchors());
    case.store().save(&context, None, &anchors).unwrap();
    fs::create_dir(case.dir().join("svid-000000000005-aa.json")).unwrap();
    std::os::unix::fs::symlink("/etc/hostname", case.dir().join("svid-000000000006-aa.json")).unwrap();
    fs::write(case.dir().join("svid-000000000007-aa.json.unfinished"), "half").unwrap();
    fs::write(case.dir().join("notes.txt"), "a person's").unwrap();
    let store = case.store();
    assert!(!case.files().iter().any(|name| name.ends_with(".unfinished")));
    let loaded = store.load(&case.id, case.now).unwrap();
    assert_eq!(serial(&loaded.current), Some(context.svid.serial()));
    assert_eq!(loaded.passed_over.len(), 2);
    for _ in 0..6 {
        let name = case.files().into_iter().find(|name| name.ends_with(".json")).unwrap();
        fs::write(case.dir().join(name), "{").unwrap();
        store.load(&case.id, case.now).unwrap();
        store.save(&case.context(case.now), None, &anchors).unwrap();
    }
    assert_eq!(case.files().len(), 1 + 1 + MAX_ASIDE, "notes, one generation, what was set aside: {:?}", case.files());
}
