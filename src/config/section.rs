//! Reading one mapping key by key, so that a mistake does not hide the next one.
//!
//! serde stops at the first error. Here every key is looked at: what is wrong is noted with its place, and the value
//! stays at its default.

use super::{Mistake, value};
use marked_yaml::{
    Node,
    types::{MarkedMappingNode, MarkedScalarNode},
};

/// One mapping that is being read. It notes which keys were asked for: the others are unknown.
pub(super) struct Section<'a> {
    node: &'a MarkedMappingNode,
    /// Dotted name of this section; empty at the top.
    name: &'a str,
    keys: Vec<&'static str>,
    mistakes: &'a mut Vec<Mistake>,
    /// How many mistakes there were before this section.
    before: usize,
}

impl<'a> Section<'a> {
    /// Reads `node` with `read`, then complains about the keys that `read` did not ask for.
    pub(super) fn read(
        node: &'a MarkedMappingNode,
        name: &'a str,
        mistakes: &'a mut Vec<Mistake>,
        read: impl FnOnce(&mut Section<'_>),
    ) {
        let before = mistakes.len();
        let mut section = Section { node, name, keys: Vec::new(), mistakes, before };
        read(&mut section);
        let Section { keys, mistakes, .. } = section;
        for key in node.keys().filter(|key| !keys.contains(&key.as_str())) {
            let place = if name.is_empty() { String::new() } else { format!(" in {name}") };
            let message = format!("unknown key \"{}\"{place}; known are: {}", key.as_str(), keys.join(", "));
            mistakes.push(Mistake::at(key.span().start(), message));
        }
    }

    /// Reads the scalar `key` into `target`, if it is given.
    pub(super) fn set<T>(&mut self, key: &'static str, parse: impl FnOnce(&str) -> Result<T, String>, target: &mut T) {
        match self.look(key) {
            None => {}
            Some(Node::Scalar(scalar)) => match parse(scalar.as_str()) {
                Ok(value) => *target = value,
                Err(message) => self.wrong_value(key, scalar, &message),
            },
            Some(node) => self.wrong(node, format!("{} must be one value", self.full(key))),
        }
    }

    /// As [`Section::set`], for what has no default of ours.
    pub(super) fn set_some<T>(
        &mut self,
        key: &'static str,
        parse: impl FnOnce(&str) -> Result<T, String>,
        target: &mut Option<T>,
    ) {
        let mut given = target.take();
        self.set(key, |text| parse(text).map(Some), &mut given);
        *target = given;
    }

    /// Reads `key` as one value or a list of them.
    pub(super) fn set_list<T>(
        &mut self,
        key: &'static str,
        parse: impl Fn(&str) -> Result<T, String>,
        target: &mut Vec<T>,
    ) {
        let nodes = match self.look(key) {
            None => return,
            Some(Node::Sequence(list)) => list.iter().collect(),
            Some(node) => vec![node],
        };
        target.clear();
        for node in nodes {
            match node.as_scalar().map(|scalar| (scalar, parse(scalar.as_str()))) {
                Some((_, Ok(value))) => target.push(value),
                Some((scalar, Err(message))) => self.wrong_value(key, scalar, &message),
                None => self.wrong(node, format!("{} must be one value or a list of values", self.full(key))),
            }
        }
    }

    /// Reads `key` as a program with its arguments: a list, or the program alone. There is no shell that would take a
    /// line apart.
    pub(super) fn set_command(&mut self, key: &'static str, target: &mut Vec<String>) {
        self.set_list(key, value::text, target);
        let alone = self.node.get_scalar(key).filter(|scalar| scalar.contains(char::is_whitespace));
        if let Some(scalar) = alone {
            let list = scalar.split_whitespace().collect::<Vec<_>>().join(", ");
            self.wrong_value(key, scalar, &format!("is one word with blanks in it; write a list: [{list}]"));
        }
    }

    /// Reads the mapping `key` as a section of its own.
    pub(super) fn section(&mut self, key: &'static str, read: impl FnOnce(&mut Section<'_>)) {
        let name = self.full(key);
        match self.look(key) {
            None => {}
            Some(Node::Mapping(node)) => Section::read(node, &name, self.mistakes, read),
            Some(node) => self.wrong(node, format!("{name} must be a mapping (\"{key}:\" and indented keys below it)")),
        }
    }

    /// Reads the list `key`, each element a section; whether it is given.
    pub(super) fn list(&mut self, key: &'static str, mut read: impl FnMut(&mut Section<'_>)) -> bool {
        let list = match self.look(key) {
            None => return false,
            Some(Node::Sequence(list)) => list,
            Some(node) => {
                self.wrong(node, format!("{} must be a list (\"- \" and keys)", self.full(key)));
                return true;
            }
        };
        for (index, node) in list.iter().enumerate() {
            let full = format!("{}[{index}]", self.full(key));
            match node {
                Node::Mapping(node) => Section::read(node, &full, self.mistakes, &mut read),
                node => self.wrong(node, format!("{full} must be a mapping, for example {{key: value}}")),
            }
        }
        true
    }

    /// Complains about the section as a whole; `message` reads on after its name.
    pub(super) fn mistake(&mut self, message: &str) {
        let message = format!("{} {message}", self.name);
        self.mistakes.push(Mistake::at(self.node.span().start(), message));
    }

    /// Reads the mapping `key`, whose keys are names that `check` accepts and whose values are sections.
    pub(super) fn sections(
        &mut self,
        key: &'static str,
        check: impl Fn(&str) -> Result<(), String>,
        mut read: impl FnMut(&str, &mut Section<'_>),
    ) {
        let empty = MarkedMappingNode::new_empty(marked_yaml::Span::new_blank());
        for (name, node) in self.entries(key) {
            let full = format!("{}.{}", self.full(key), name.as_str());
            if let Err(message) = check(name.as_str()) {
                self.wrong_value(key, name, &message);
            }
            match node {
                Node::Mapping(node) => Section::read(node, &full, self.mistakes, |s| read(name.as_str(), s)),
                // `payments:` with nothing below it.
                node if is_null(node) => Section::read(&empty, &full, self.mistakes, |s| read(name.as_str(), s)),
                node => self.wrong(node, format!("{full} must be a mapping")),
            }
        }
    }

    /// Whether something in this section was complained about already.
    pub(super) fn is_wrong(&self) -> bool {
        self.mistakes.len() > self.before
    }

    /// Reads the mapping `key` as pairs of texts.
    pub(super) fn pairs(&mut self, key: &'static str, mut put: impl FnMut(&str, &str) -> Result<(), String>) {
        for (name, node) in self.entries(key) {
            match node {
                Node::Scalar(scalar) => {
                    if let Err(message) = put(name.as_str(), scalar.as_str()) {
                        self.wrong_value(key, name, &message);
                    }
                }
                node => self.wrong(node, format!("{}.{} must be one value", self.full(key), name.as_str())),
            }
        }
    }

    fn entries(&mut self, key: &'static str) -> Vec<(&'a MarkedScalarNode, &'a Node)> {
        match self.look(key) {
            None => Vec::new(),
            Some(Node::Mapping(node)) => node.iter().collect(),
            Some(node) => {
                self.wrong(node, format!("{} must be a mapping", self.full(key)));
                Vec::new()
            }
        }
    }

    /// The node at `key`; none when it is absent or null (`key:` with nothing behind it means the default).
    fn look(&mut self, key: &'static str) -> Option<&'a Node> {
        self.keys.push(key);
        self.node.get_node(key).filter(|node| !is_null(node))
    }

    fn full(&self, key: &str) -> String {
        if self.name.is_empty() { key.to_owned() } else { format!("{}.{key}", self.name) }
    }

    fn wrong(&mut self, node: &Node, message: String) {
        self.mistakes.push(Mistake::at(node.span().start(), message));
    }

    fn wrong_value(&mut self, key: &str, scalar: &MarkedScalarNode, message: &str) {
        let message = format!("{}: \"{}\" {message}", self.full(key), scalar.as_str());
        self.mistakes.push(Mistake::at(scalar.span().start(), message));
    }
}

/// An unquoted `~`, `null`, or nothing at all.
fn is_null(node: &Node) -> bool {
    node.as_scalar().is_some_and(|s| s.may_coerce() && matches!(s.as_str(), "" | "~" | "null"))
}
