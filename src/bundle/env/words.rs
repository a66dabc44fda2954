//! Words of a shell file: quotes, backslashes, and the few expansions that need nothing but variables.

use super::{Env, EnvError, EnvProblem};

/// Variables that a shell has without anybody setting them; what they would be is not known here.
const SHELL: [&str; 21] = [
    "_",
    "BASH",
    "BASH_VERSION",
    "BASH_EXECUTION_STRING",
    "COLUMNS",
    "HOSTNAME",
    "HOSTTYPE",
    "IFS",
    "LINES",
    "MACHTYPE",
    "OLDPWD",
    "OPTARG",
    "OPTERR",
    "OPTIND",
    "OSTYPE",
    "PATH",
    "PIPESTATUS",
    "PS4",
    "PWD",
    "SECONDS",
    "SHLVL",
];

/// How much the expansions of one file may put in, in bytes: a variable that is twice another doubles with each line.
pub(super) const MAX_EXPANDED: usize = 256 * 1024;

/// A place in the text, and the complaints so far.
pub(super) struct Reader<'a> {
    text: &'a str,
    at: usize,
    line: usize,
    errors: Vec<EnvError>,
    /// Line of the first CR outside quotes, and how many there are.
    carriage_returns: Option<(usize, usize)>,
    /// What is left of [`MAX_EXPANDED`]; none when too much was asked for.
    budget: Option<usize>,
    /// The variables without a value that the present word mentions.
    unset: Vec<String>,
}

impl<'a> Reader<'a> {
    pub(super) fn new(text: &'a str) -> Self {
        Self {
            text,
            at: 0,
            line: 1,
            errors: Vec::new(),
            carriage_returns: None,
            budget: Some(MAX_EXPANDED),
            unset: Vec::new(),
        }
    }

    /// All complaints in the order of lines, one a line.
    pub(super) fn into_errors(mut self) -> Vec<EnvError> {
        if let Some((line, count)) = self.carriage_returns {
            self.errors.push(EnvError { line, problem: EnvProblem::CarriageReturn(count) });
        }
        self.errors.sort_by_key(|e| e.line);
        self.errors.dedup_by_key(|e| e.line);
        self.errors
    }

    pub(super) fn line(&self) -> usize {
        self.line
    }

    pub(super) fn refuse(&mut self, problem: EnvProblem) {
        self.refuse_at(self.line, problem);
    }

    pub(super) fn refuse_at(&mut self, line: usize, problem: EnvProblem) {
        self.errors.push(EnvError { line, problem });
    }

    pub(super) fn mark(&self) -> usize {
        self.errors.len()
    }

    /// Drops complaints made since `mark`; what is never closed stays, for the rest of the file was not seen.
    pub(super) fn forget_since(&mut self, mark: usize) {
        let later = self.errors.split_off(mark);
        self.errors.extend(later.into_iter().filter(|e| matches!(e.problem, EnvProblem::Unterminated(_))));
    }

    fn raw(&self) -> Option<char> {
        self.text[self.at..].chars().next()
    }

    /// The next character outside single quotes: a backslash before a line feed is nothing, both vanish.
    pub(super) fn peek(&mut self) -> Option<char> {
        while self.text[self.at..].starts_with("\\\n") {
            self.at += 2;
            self.line += 1;
        }
        self.raw()
    }

    pub(super) fn bump(&mut self) -> Option<char> {
        let c = self.raw()?;
        self.at += c.len_utf8();
        self.line += usize::from(c == '\n');
        if c == '\0' {
            self.refuse(EnvProblem::Nul);
        }
        Some(c)
    }

    /// The first character that is no blank.
    pub(super) fn skip_blanks(&mut self) -> Option<char> {
        while matches!(self.peek(), Some(' ' | '\t')) {
            self.bump();
        }
        self.peek()
    }

    /// A comment goes to the end of the line, whatever it holds, a CR or a backslash too.
    pub(super) fn skip_comment(&mut self) {
        while self.raw().is_some_and(|c| c != '\n') {
            self.bump();
        }
    }

    pub(super) fn ends_word(next: Option<char>) -> bool {
        matches!(next, None | Some(' ' | '\t' | '\n' | ';' | '&' | '|' | '(' | ')' | '<' | '>'))
    }

    /// A name, empty if there is none.
    pub(super) fn name(&mut self) -> String {
        let mut name = String::new();
        while let Some(c) = self.peek() {
            if !(c == '_' || c.is_ascii_alphabetic() || (!name.is_empty() && c.is_ascii_digit())) {
                break;
            }
            name.push(c);
            self.bump();
        }
        name
    }

    /// What to show of a word that is no assignment: never the part after `=` or a quote, it may be a value; and no
    /// long word at all, it may be a line of a token or key.
    pub(super) fn key(&mut self, begin: &str) -> String {
        let mut shown = begin.to_owned();
        while let Some(c) = self.peek() {
            if Self::ends_word(Some(c)) || matches!(c, '=' | '\'' | '"' | '\\' | '\r' | '\0') || shown.len() > 40 {
                break;
            }
            shown.push(c);
            self.bump();
        }
        if shown.len() > 24 { "…".to_owned() } else { shown }
    }

    /// The rest of a word, quotes taken away and variables put in. `export`: the word is an argument, where braces
    /// would expand.
    pub(super) fn value(&mut self, env: &Env, export: bool) -> String {
        let mut value = String::new();
        let mut tilde = true; // whether a ~ here stands for HOME
        while let Some(c) = self.peek().filter(|c| !matches!(c, ' ' | '\t' | '\n' | ';')) {
            let line = self.line;
            let after = std::mem::take(&mut tilde);
            match c {
                '\'' => self.single(&mut value),
                '"' => self.double(env, &mut value),
                '$' => self.dollar(env, false, &mut value),
                '~' if after => self.tilde(env, &mut value),
                _ => {
                    self.bump();
                    match c {
                        '\\' => match self.bump() {
                            Some('\r') => self.carriage_return(line),
                            Some(c) => value.push(c),
                            None => self.refuse(EnvProblem::TrailingBackslash),
                        },
                        '\r' => self.carriage_return(line),
                        '`' => self.refuse(EnvProblem::Evaluates("a command substitution (`…`)")),
                        '&' | '|' | '(' | ')' | '<' | '>' => self.refuse(EnvProblem::Syntax(c)),
                        '{' if export => self.refuse(EnvProblem::Evaluates("a brace expansion ({…} after export)")),
                        _ => {
                            value.push(c);
                            tilde = c == ':';
                        }
                    }
                }
            }
        }
        value
    }

    fn carriage_return(&mut self, line: usize) {
        self.carriage_returns.get_or_insert((line, 0)).1 += 1;
    }

    fn single(&mut self, value: &mut String) {
        let line = self.line;
        self.bump();
        loop {
            match self.bump() {
                Some('\'') => return,
                Some(c) => value.push(c),
                None => return self.refuse_at(line, EnvProblem::Unterminated("a single quote that opens here")),
            }
        }
    }

    fn double(&mut self, env: &Env, value: &mut String) {
        let line = self.line;
        self.bump();
        loop {
            match self.peek() {
                Some('$') => {
                    self.dollar(env, true, value);
                    continue;
                }
                Some('`') => self.refuse(EnvProblem::Evaluates("a command substitution (`…`)")),
                Some('\\') => {
                    self.bump();
                    match self.raw() {
                        Some(c @ ('"' | '\\' | '$' | '`')) => value.push(c),
                        _ => {
                            value.push('\\');
                            continue;
                        }
                    }
                }
                Some('"') => {
                    self.bump();
                    return;
                }
                Some(c) => value.push(c),
                None => return self.refuse_at(line, EnvProblem::Unterminated("a double quote that opens here")),
            }
            self.bump();
        }
    }

    fn dollar(&mut self, env: &Env, quoted: bool, value: &mut String) {
        self.bump();
        match self.peek() {
            Some(c) if c == '_' || c.is_ascii_alphabetic() => {
                let name = self.name();
                self.expand(env, &name, value);
            }
            Some('{') => self.braces(env, value),
            Some('(') => self.refuse(EnvProblem::Evaluates("a command substitution ($(…))")),
            Some('[') => self.refuse(EnvProblem::Evaluates("arithmetic ($[…])")),
            Some('\'' | '"') if !quoted => self.refuse(EnvProblem::Evaluates("a $'…' or $\"…\" string")),
            Some(c) if c.is_ascii_digit() || "@*#?-$!".contains(c) => {
                self.refuse(EnvProblem::ShellVariable(c.to_string()));
                self.bump();
            }
            _ => value.push('$'),
        }
    }

    /// `${NAME}` and `${NAME:-plain text}`.
    fn braces(&mut self, env: &Env, value: &mut String) {
        const ONLY: EnvProblem = EnvProblem::Evaluates("an expansion other than ${NAME} and ${NAME:-plain text}");
        let line = self.line;
        self.bump();
        let name = self.name();
        let mut default = None::<String>;
        if !name.is_empty() && self.peek() == Some(':') {
            self.bump();
            if self.peek() == Some('-') {
                self.bump();
                let mut plain = String::new();
                while let Some(c) = self.peek().filter(|c| !"}'\"\\$`{~\r".contains(*c)) {
                    plain.push(c);
                    self.bump();
                }
                default = Some(plain);
            } else {
                return self.refuse_at(line, ONLY);
            }
        }
        match self.peek() {
            Some('}') if !name.is_empty() => {
                self.bump();
                match (env.filled(&name), default) {
                    (None, Some(default)) if !SHELL.contains(&name.as_str()) => value.push_str(&default),
                    _ => self.expand(env, &name, value),
                }
            }
            Some(_) => self.refuse_at(line, ONLY),
            None => self.refuse_at(line, EnvProblem::Unterminated("a ${ that opens here")),
        }
    }

    /// Puts in what the variable holds; as in the shell, an unset one is empty.
    fn expand(&mut self, env: &Env, name: &str, value: &mut String) {
        match env.get(name) {
            Some(held) => self.put(held, value),
            None if SHELL.contains(&name) || super::RESERVED.contains(&name) => {
                self.refuse(EnvProblem::ShellVariable(name.to_owned()));
            }
            None => self.unset.push(name.to_owned()),
        }
    }

    /// Within the budget; what goes beyond is told once.
    fn put(&mut self, text: &str, value: &mut String) {
        let Some(budget) = self.budget else { return };
        self.budget = budget.checked_sub(text.len());
        match self.budget {
            Some(_) => value.push_str(text),
            None => self.refuse(EnvProblem::Expands(MAX_EXPANDED)),
        }
    }

    /// The variables without a value that were mentioned since the last call.
    pub(super) fn take_unset(&mut self) -> Vec<String> {
        std::mem::take(&mut self.unset)
    }

    fn tilde(&mut self, env: &Env, value: &mut String) {
        self.bump();
        match (self.peek(), env.get("HOME")) {
            (Some('\'' | '"' | '\\'), _) => value.push('~'), // a quoted part makes it an ordinary character
            (None | Some(' ' | '\t' | '\n' | ';' | '/' | ':' | '\r'), Some(home)) => self.put(home, value),
            (None | Some(' ' | '\t' | '\n' | ';' | '/' | ':' | '\r'), None) => self.refuse(EnvProblem::NoHome),
            _ => self.refuse(EnvProblem::Evaluates("the home directory of another user (~name)")),
        }
    }
}
