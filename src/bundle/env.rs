//! `cluster.env` as data. Istio's start script lets a shell run this file; nothing is ever run here: it is read as
//! words, by the rules of that shell (bash with `-ea`), and whatever is more than an assignment is refused by line.

mod words;

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};
use words::Reader;

/// One variable and where it was last set.
#[derive(Clone, PartialEq, Eq)]
pub struct Variable {
    /// Its value; an empty value is a value, not absence.
    pub value: String,
    /// File that set it.
    pub file: PathBuf,
    /// Line of the assignment, from 1.
    pub line: usize,
    /// Variables without a value that it is made of.
    pub unset: Vec<String>,
}

/// Where, not what: people put secrets into environment files.
impl std::fmt::Debug for Variable {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}:{}", self.file.display(), self.line)
    }
}

/// Variables by name, as the files leave them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Env(BTreeMap<String, Variable>);

impl Env {
    /// The value, if it is set.
    pub fn get(&self, name: &str) -> Option<&str> {
        self.0.get(name).map(|v| v.value.as_str())
    }

    /// The value, if it is set and not empty (`${NAME:-…}` of the shell).
    pub fn filled(&self, name: &str) -> Option<&str> {
        self.get(name).filter(|v| !v.is_empty())
    }

    /// The variable with its origin.
    pub fn variable(&self, name: &str) -> Option<&Variable> {
        self.0.get(name)
    }

    /// All of them, sorted by name.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Variable)> {
        self.0.iter().map(|(name, variable)| (name.as_str(), variable))
    }
}

/// What is wrong with a line.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EnvProblem {
    /// A word that a shell would run.
    #[error("{0:?} begins no assignment; a shell would run it as a command: write NAME='value' or remove the line")]
    Command(String),
    /// A further word after an assignment. It is not shown: it may be the value.
    #[error("a word after {0}= is no assignment: no blanks beside the =, and put a value with blanks in single quotes")]
    Word(String),
    /// A name the shell keeps for itself.
    #[error("{0} belongs to the shell and cannot be assigned: use another name")]
    Reserved(String),
    /// Something that a shell would evaluate.
    #[error("{0} is not evaluated: write the value itself, in single quotes")]
    Evaluates(&'static str),
    /// An expansion of a variable that only a running shell has.
    #[error("${0} is filled in by the shell itself and has no value here: write the value")]
    ShellVariable(String),
    /// `~` without `HOME`.
    #[error("~ needs HOME, which is not set in this file: write the path, or '~' in quotes if the character is meant")]
    NoHome,
    /// `&`, `|`, `<`, `>`, a bracket or a misplaced `;`.
    #[error("{0:?} is shell syntax: put the value in single quotes")]
    Syntax(char),
    /// A quote or brace that is never closed.
    #[error("{0} is never closed")]
    Unterminated(&'static str),
    /// A backslash is the last character.
    #[error("the file ends in a backslash: remove it")]
    TrailingBackslash,
    /// Carriage returns outside quotes; a shell would keep them in the values.
    #[error(
        "{0} line(s) end in CR LF, and the CR would become part of the value: convert the file (sed -i 's/\\r$//')"
    )]
    CarriageReturn(usize),
    /// Expansions that grow without bound.
    #[error(
        "the variables put in so far are longer than {0} bytes: this is no file of a bundle, write the values themselves"
    )]
    Expands(usize),
    /// A byte-order mark.
    #[error("the file begins with a byte-order mark: save it as UTF-8 without one")]
    ByteOrderMark,
    /// A NUL character.
    #[error("there is a NUL character: the file is damaged, copy it again")]
    Nul,
}

/// A bad line.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("line {line}: {problem}")]
pub struct EnvError {
    /// From 1.
    pub line: usize,
    /// What is wrong there.
    pub problem: EnvProblem,
}

/// Reads `text`, the content of `file`, on top of the variables that earlier files set (`sidecar.env`).
///
/// # Errors
/// Every bad line, once.
pub fn parse(file: &Path, text: &str, initial: &Env) -> Result<Env, Vec<EnvError>> {
    let mut parser = Parser { words: Reader::new(text), env: initial.clone(), file };
    parser.file();
    let Parser { words, env, .. } = parser;
    let errors = words.into_errors();
    if errors.is_empty() { Ok(env) } else { Err(errors) }
}

/// Variables that bash computes or protects: an assignment fails or does not do what it says.
const RESERVED: [&str; 23] = [
    "BASHOPTS",
    "BASHPID",
    "BASH_ARGC",
    "BASH_ARGV",
    "BASH_CMDS",
    "BASH_ALIASES",
    "BASH_COMMAND",
    "BASH_LINENO",
    "BASH_SOURCE",
    "BASH_SUBSHELL",
    "BASH_VERSINFO",
    "DIRSTACK",
    "EPOCHREALTIME",
    "EPOCHSECONDS",
    "EUID",
    "FUNCNAME",
    "GROUPS",
    "LINENO",
    "PPID",
    "RANDOM",
    "SHELLOPTS",
    "SRANDOM",
    "UID",
];

/// Commands, one after the other.
struct Parser<'a> {
    words: Reader<'a>,
    env: Env,
    file: &'a Path,
}

impl Parser<'_> {
    fn file(&mut self) {
        let mut commands = false; // on this line, before the present place
        while let Some(c) = self.words.skip_blanks() {
            match c {
                '\n' => commands = false,
                ';' if commands => commands = false,
                '#' => {
                    self.words.skip_comment();
                    continue;
                }
                ';' | '&' | '|' | '(' | ')' | '<' | '>' => self.words.refuse(EnvProblem::Syntax(c)),
                _ => {
                    self.command();
                    commands = true;
                    continue;
                }
            }
            self.words.bump();
        }
    }

    /// One command: assignments, `export` or `unset`.
    fn command(&mut self) {
        let name = self.words.name();
        match (name.as_str(), self.words.peek()) {
            ("", _) => self.refuse_command(&name),
            (_, Some('=')) => self.assignments(name),
            ("export", c) if Reader::ends_word(c) => self.arguments(true),
            ("unset", c) if Reader::ends_word(c) => self.arguments(false),
            _ => self.refuse_command(&name),
        }
    }

    fn refuse_command(&mut self, begin: &str) {
        let line = self.words.line();
        let key = self.words.key(begin);
        if key.is_empty() && self.words.peek() == Some('\r') {
            self.words.value(&self.env, false); // counts the CR
            return;
        }
        let mark = key.starts_with('\u{feff}');
        self.words.refuse_at(line, if mark { EnvProblem::ByteOrderMark } else { EnvProblem::Command(key) });
        self.skip_command();
    }

    fn assignments(&mut self, mut name: String) {
        loop {
            let variable = self.value(&name, false);
            self.env.0.insert(name.clone(), variable);
            if Self::ends_command(self.words.skip_blanks()) {
                return;
            }
            let next = self.words.name();
            if next.is_empty() || self.words.peek() != Some('=') {
                self.words.refuse(EnvProblem::Word(name));
                return self.skip_command();
            }
            name = next;
        }
    }

    /// The words after `export` or `unset`. All of them are expanded before any takes effect.
    fn arguments(&mut self, export: bool) {
        let (mut any, mut exported) = (false, Vec::new());
        while !Self::ends_command(self.words.skip_blanks()) {
            let name = self.words.name();
            match self.words.peek() {
                Some('=') if export && !name.is_empty() => {
                    let variable = self.value(&name, true);
                    exported.push((name, variable));
                }
                c if !name.is_empty() && Reader::ends_word(c) => {
                    if !export {
                        self.check(&name);
                        self.env.0.remove(&name);
                    }
                }
                _ => return self.refuse_command(&name),
            }
            any = true;
        }
        self.env.0.extend(exported);
        if !any {
            self.words.refuse(EnvProblem::Command(if export { "export" } else { "unset" }.to_owned()));
        }
    }

    /// What follows a name, from the `=` on.
    fn value(&mut self, name: &str, export: bool) -> Variable {
        let line = self.words.line();
        self.check(name);
        self.words.bump(); // =
        self.words.take_unset(); // of words that were refused
        let value = self.words.value(&self.env, export);
        Variable { value, file: self.file.to_owned(), line, unset: self.words.take_unset() }
    }

    fn check(&mut self, name: &str) {
        if RESERVED.contains(&name) {
            self.words.refuse(EnvProblem::Reserved(name.to_owned()));
        }
    }

    /// Passes over what is left of a refused command, quotes included, without a second complaint.
    fn skip_command(&mut self) {
        let known = self.words.mark();
        while !Self::ends_command(self.words.skip_blanks()) {
            self.words.value(&self.env, false);
        }
        self.words.forget_since(known);
    }

    fn ends_command(next: Option<char>) -> bool {
        matches!(next, None | Some('\n' | ';' | '#' | '&' | '|' | '(' | ')' | '<' | '>'))
    }
}

#[cfg(test)]
mod tests;
