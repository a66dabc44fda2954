//! The manual page and the shells' completions are made from the command line's own words and committed, so that packages
//! need no generator; these tests keep them fresh. After a change of `src/cli.rs`:
//! `WE_AGENT_REGENERATE=1 cargo test --test it man`.

use clap::{Command, CommandFactory};
use clap_complete::{Shell, generate};
use clap_mangen::Man;
use std::{error::Error, fs, path::Path};

/// How roff is told which apostrophe it has.
const PREAMBLE: &str = ".ie \\n(.g .ds Aq \\(aq\n.el .ds Aq '\n";

const FILES: &str = r#".SH FILES
.TP
/etc/we\-agent/\fIworkload\fR/
The bundle: cluster.env, mesh.yaml, root\-cert.pem, istio\-token and hosts, as "istioctl x workload entry configure" wrote them. A missing file is taken from the credential \fIworkload\fR_\fIfile\fR of the service, if there is one.
.TP
/etc/we\-agent/we\-agent.yaml
The configuration. Optional; /usr/share/doc/we\-agent/we\-agent.yaml shows every key at its default.
.TP
/run/we\-agent/\fIworkload\fR/
key.pem, cert\-chain.pem and root\-cert.pem, always of one generation.
.TP
/run/we\-agent/admin.sock
Where "we\-agent status" asks.
.TP
/run/we\-agent/permit
Made by the daemon when there is something in /etc/we\-agent that it may not read, or that others may, and when a token is to be removed (/run/we\-agent/remove.d); removed by we\-agent\-permit.service, which runs "we\-agent permit".
.TP
/var/lib/we\-agent/\fIworkload\fR/
The last certificate, so that a restart needs no control plane.
"#;

const SIGNALS: &str = r".SH ENVIRONMENT
.TP
WE_AGENT_ROOT
As \-\-root, which wins.
.TP
WE_AGENT_EXEC_SOCKET
As \-\-exec\-socket of run, which wins.
.TP
CREDENTIALS_DIRECTORY
Set by systemd: where the credentials of the service are.
.SH SIGNALS
.TP
SIGTERM, SIGINT
Stop: the session is closed, files and state stay, and the control plane keeps the registration for its grace period. A second signal ends the process at once.
";

#[test]
fn the_manual_page_is_fresh() -> Result<(), Box<dyn Error>> {
    let mut command = we_agent::cli::Cli::command();
    command.build();
    fresh("packaging/we-agent.8", &page(&command)?)
}

/// The example is the reference: every key with its default and what it is for.
#[test]
fn the_manual_page_of_the_configuration_is_fresh() -> Result<(), Box<dyn Error>> {
    let example = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("config/we-agent.yaml"))?;
    let mut page = concat!(
        ".TH we-agent.yaml 5 \"\" \"we-agent ",
        env!("CARGO_PKG_VERSION"),
        "\" \"File Formats\"\n.SH NAME\nwe\\-agent.yaml \\- configuration of we\\-agent\n.SH SYNOPSIS\n\
         /etc/we\\-agent/we\\-agent.yaml\n.SH DESCRIPTION\nOptional. The example that the package brings, \
         /usr/share/doc/we\\-agent/we\\-agent.yaml, has every key at its default:\n.PP\n.nf\n"
    )
    .to_owned();
    for line in example.lines() {
        // A point or an apostrophe at the beginning of a line would be a request; \\& is nothing.
        page += &format!("\\&{}\n", line.replace('\\', "\\e").replace('-', "\\-"));
    }
    page += ".fi\n.SH SEE ALSO\n.BR we\\-agent (8)\n";
    fresh("packaging/we-agent.yaml.5", &page)
}

#[test]
fn the_completions_are_fresh() -> Result<(), Box<dyn Error>> {
    // Named as each shell looks for it.
    for (shell, name) in [(Shell::Bash, "we-agent"), (Shell::Zsh, "_we-agent"), (Shell::Fish, "we-agent.fish")] {
        let mut words = Vec::new();
        generate(shell, &mut we_agent::cli::Cli::command(), "we-agent", &mut words);
        // clap_complete 4.6 gives a subcommand of a name with a hyphen two labels in bash.
        let words = String::from_utf8(words)?.replace("we__subcmd__agent__", "we__agent__");
        fresh(&format!("packaging/completions/{name}"), &words)?;
    }
    Ok(())
}

/// As bash has it completed: the words so far, the last of them unfinished, and what is offered.
#[test]
fn bash_completes_subcommands_and_their_options() -> Result<(), Box<dyn Error>> {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("packaging/completions/we-agent");
    for (words, offered) in [
        (&["we-agent", "sta"][..], "status"),
        (&["we-agent", "status", "--j"], "--json"),
        (&["we-agent", "wait", "--t"], "--timeout"),
        (&["we-agent", "run", "--log-format", "te"], "text"),
        (&["we-agent", "permit", "--g"], "--group"),
    ] {
        let script = r#"file=$1; shift; . "$file"; COMP_WORDS=("$@") COMP_CWORD=$(($# - 1))
            _we__agent we-agent "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD - 1]}"; echo "${COMPREPLY[*]}""#;
        let output = std::process::Command::new("bash").args(["-c", script, "bash"]).arg(&file).args(words).output()?;
        assert_eq!(String::from_utf8(output.stdout)?.trim(), offered, "{words:?}: {:?}", output.stderr);
    }
    Ok(())
}

fn fresh(name: &str, made: &str) -> Result<(), Box<dyn Error>> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(name);
    if std::env::var_os("WE_AGENT_REGENERATE").is_some() {
        fs::write(&path, made)?;
    }
    let kept = fs::read_to_string(&path).unwrap_or_default();
    assert!(made == kept, "{name} is stale: WE_AGENT_REGENERATE=1 cargo test --test it man");
    Ok(())
}

fn page(command: &Command) -> Result<String, Box<dyn Error>> {
    let man = Man::new(command.clone()).section("8").date("").manual("System Administration");
    let mut page = PREAMBLE.to_owned() + &text(|out| man.render_title(out))?;
    page += &text(|out| man.render_name_section(out))?;
    page += ".SH SYNOPSIS\n";
    let subcommands = || command.get_subcommands().filter(|sub| sub.get_name() != "help");
    for sub in subcommands() {
        let synopsis = text(|out| Man::new(sub.clone()).render_synopsis_section(out))?;
        page += &synopsis.replace(".SH SYNOPSIS\n", "");
        page += ".br\n";
    }
    page += &text(|out| man.render_description_section(out))?;
    page += ".SH COMMANDS\n";
    for sub in subcommands() {
        let about = sub.get_about().map(ToString::to_string).unwrap_or_default();
        page += &format!(".SS we\\-agent {}\n{about}.\n", sub.get_name());
        let options = text(|out| Man::new(sub.clone()).render_options_section(out))?;
        page += &options.replace(".SH OPTIONS\n", "");
    }
    page += FILES;
    page += SIGNALS;
    let statuses = command.get_after_long_help().map(ToString::to_string).unwrap_or_default();
    let statuses = statuses.lines().skip(1).filter_map(|line| line.trim().split_once(' '));
    page += ".SH EXIT STATUS\n";
    page += &statuses.map(|(code, words)| format!(".TP\n{code}\n{}\n", words.trim())).collect::<String>();
    Ok(page)
}

fn text(render: impl FnOnce(&mut dyn std::io::Write) -> std::io::Result<()>) -> Result<String, Box<dyn Error>> {
    let mut out = Vec::new();
    render(&mut out)?;
    // Each piece begins with it; it is needed once.
    Ok(String::from_utf8(out)?.replace(PREAMBLE, ""))
}
