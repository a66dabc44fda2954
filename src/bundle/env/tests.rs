#![allow(clippy::unwrap_used)]
use super::*;
use proptest::prelude::*;

fn read(text: &str) -> Result<BTreeMap<String, String>, Vec<(usize, EnvProblem)>> {
    parse(Path::new("cluster.env"), text, &Env::default())
        .map(|env| env.iter().map(|(k, v)| (k.to_owned(), v.value.clone())).collect())
        .map_err(|errors| errors.into_iter().map(|e| (e.line, e.problem)).collect())
}

#[test]
fn all_bad_lines_are_told_at_once_with_their_numbers() {
    let text =
        "A='1\n2'\nmy-key='v w'\nB = 1\nC= secret\nD=$(id)\nE=1\nF=\"$1\"\nexport -n E\nUID=0\nG=a&b\nH=~bob/x\n";
    assert_eq!(
        read(text).unwrap_err(),
        [
            (3, EnvProblem::Command("my-key".into())),
            (4, EnvProblem::Command("B".into())),
            (5, EnvProblem::Word("C".into())),
            (6, EnvProblem::Evaluates("a command substitution ($(…))")),
            (8, EnvProblem::ShellVariable("1".into())),
            (9, EnvProblem::Command("-n".into())),
            (10, EnvProblem::Reserved("UID".into())),
            (11, EnvProblem::Syntax('&')),
            (12, EnvProblem::Evaluates("the home directory of another user (~name)")),
        ]
    );
}

#[test]
fn carriage_returns_are_one_complaint() {
    assert_eq!(read("A=1\r\n\r\nB='2'\r\n# c\r\n").unwrap_err(), [(1, EnvProblem::CarriageReturn(3))]);
    assert_eq!(read("A='1\r2' # c\r\n").unwrap()["A"], "1\r2");
}

#[test]
fn what_is_never_closed_is_told_where_it_opens() {
    for (text, line) in [("A=1\nB='x\ny\n", 2), ("\n\nB=\"x\n", 3), ("A=${B", 1), ("x 'y\nA=1\n", 1)] {
        assert_eq!(read(text).unwrap_err()[0].0, line, "{text}");
    }
}

#[test]
fn a_second_file_builds_on_the_first() {
    let first = parse(Path::new("sidecar.env"), "A=1\nB=2\n", &Env::default()).unwrap();
    let both = parse(Path::new("cluster.env"), "\nA=$B/3\n", &first).unwrap();
    let a = both.variable("A").unwrap();
    assert_eq!((a.value.as_str(), a.file.as_path(), a.line), ("2/3", Path::new("cluster.env"), 2));
    assert_eq!(both.variable("B").unwrap().file, Path::new("sidecar.env"));
}

#[test]
fn values_are_never_in_a_message() {
    for text in [
        "A= s3cret",
        "A='' s3cret",
        "x-y='s3cret'",
        "A=(s3cret)",
        "A=$(s3cret)",
        "A=\"`s3cret`\"",
        "'s3cret'",
        "s3cret-a-line-of-a-key-or-a-token==",
    ] {
        for e in parse(Path::new("cluster.env"), text, &Env::default()).unwrap_err() {
            assert!(!e.to_string().contains("s3cret"), "{e}");
        }
    }
}

#[test]
fn expansions_have_a_budget() {
    let doubled = format!("A=x\n{}", "A=$A$A\n".repeat(34));
    assert!(doubled.len() < 451);
    let refused = read(&doubled).unwrap_err();
    assert_eq!(refused, [(19, EnvProblem::Expands(256 * 1024))], "told once, where it goes beyond");
    assert!(read(&format!("HOME={}\n{}", "x".repeat(60_000), "B=~\n".repeat(5))).is_err());
    // What is refused ends there: the rest is read on, and costs nothing.
    assert_eq!(read(&format!("{doubled}C=$(x)\n")).unwrap_err().len(), 2);
    assert_eq!(read("A=x\nB=$A$A\nC=$B$B\n").unwrap()["C"], "xxxx");
}

proptest! {
    #[test]
    fn any_text_is_read_or_refused(text in "[ABx=\\\\'\"$`{}~:;#& \t\n\r\u{0}\u{feff}1é-]{0,60}") {
        let lines = text.matches('\n').count() + 1;
        if let Err(errors) = parse(Path::new("f"), &text, &Env::default()) {
            prop_assert!(!errors.is_empty() && errors.iter().all(|e| e.line >= 1 && e.line <= lines));
        }
    }

    #[test]
    fn istioctl_quoting_is_read_back(value in "(?s).{0,40}") {
        prop_assume!(!value.contains('\0'));
        let text = format!("A='{}'\n", value.replace('\'', "'\"'\"'"));
        prop_assert_eq!(&read(&text).unwrap()["A"], &value);
    }
}
