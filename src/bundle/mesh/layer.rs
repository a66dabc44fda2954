//! One source of a ProxyConfig: its fields, and where each of them stands.

use super::camel;
use crate::{
    bundle::mistake::{Mistake, Problem},
    yaml::{self, YamlError},
};
use marked_yaml::{Node, types::MarkedMappingNode};
use serde_json::{Map, Value};
use std::collections::BTreeMap;

/// Fields as proto JSON, keys in camelCase, with their places.
#[derive(Debug, Default)]
pub(in crate::bundle) struct Layer {
    pub(super) fields: Map<String, Value>,
    /// A file, or a line of one and a variable.
    source: String,
    /// What to put before a field's name.
    prefix: &'static str,
    /// Line and column of each field, by its path below the prefix; none for what is no file.
    marks: BTreeMap<String, (usize, usize)>,
}

impl Layer {
    /// One field that is set by `source`.
    pub(in crate::bundle) fn of(source: String, field: &str, value: &str) -> Self {
        Self { fields: Map::from_iter([(field.to_owned(), value.into())]), source, ..Self::default() }
    }

    /// Whether the field has a value here.
    pub(in crate::bundle) fn has(&self, field: &str) -> bool {
        self.fields.get(field).is_some_and(|value| !value.is_null())
    }

    /// Where the field stands; of one that is not there (`a.b[0].c`), where what should hold it does.
    pub(super) fn place(&self, path: &str) -> String {
        let holders = std::iter::successors(Some(path), |path| Some(&path[..path.rfind(['.', '['])?]));
        let mark = holders.into_iter().find_map(|path| self.marks.get(path));
        let place = mark.map_or(String::new(), |(line, column)| format!(":{line}:{column}"));
        format!("{}{place}: {}{path}", self.source, self.prefix)
    }

    /// Keeps the places only if lines count from the beginning of the source.
    fn read(source: &str, prefix: &'static str, map: &MarkedMappingNode, places: bool) -> Self {
        let mut marks = BTreeMap::new();
        let fields = object(map, "", &mut marks);
        if !places {
            marks.clear();
        }
        Self { fields, source: source.to_owned(), prefix, marks }
    }
}

/// Reads a MeshConfig document (of which `defaultConfig` alone matters here).
pub(in crate::bundle) fn mesh_config(file: &str, text: &str) -> Result<Layer, Mistake> {
    const PREFIX: &str = "defaultConfig.";
    let at = |line, column, problem| Mistake { place: format!("{file}:{line}:{column}"), problem };
    let document =
        yaml::parse(text).map_err(|YamlError { line, column, message }| at(line, column, Problem::Yaml(message)))?;
    let mut top = document.as_mapping().into_iter().flat_map(|map| map.iter());
    let config = top.find(|(key, _)| camel(key.as_str()) == "defaultConfig").map(|(_, node)| node);
    match config {
        Some(Node::Mapping(map)) => Ok(Layer::read(file, PREFIX, map, true)),
        Some(node) if !node.as_scalar().is_some_and(|scalar| yaml::value(scalar).is_null()) => {
            let (line, column) = mark(node);
            Err(at(line, column, Problem::Type("a ProxyConfig (keys and values below defaultConfig)")))
        }
        _ => Ok(Layer { source: file.to_owned(), prefix: PREFIX, ..Layer::default() }),
    }
}

/// Reads a ProxyConfig, the value of a variable.
pub(in crate::bundle) fn proxy_config(variable: &str, text: &str) -> Result<Layer, Mistake> {
    let document = yaml::parse(text)
        .map_err(|error| Mistake { place: variable.to_owned(), problem: Problem::Yaml(format!("line {error}")) })?;
    Ok(document.as_mapping().map_or_else(Layer::default, |map| Layer::read(variable, "", map, false)))
}

fn object(map: &MarkedMappingNode, path: &str, marks: &mut BTreeMap<String, (usize, usize)>) -> Map<String, Value> {
    let field = |(key, node): (&marked_yaml::types::MarkedScalarNode, &Node)| {
        let join = |key: &str| if path.is_empty() { key.to_owned() } else { format!("{path}.{key}") };
        // Proto JSON takes `snake_case` too; keys of maps (proxyMetadata) are kept as they are.
        let name = if path.is_empty() { camel(key.as_str()) } else { key.as_str().to_owned() };
        let place = join(&camel(key.as_str()));
        let start = key.span().start().map_or((1, 1), |mark| (mark.line(), mark.column()));
        marks.insert(join(key.as_str()), start);
        marks.insert(place.clone(), start);
        (name, value(node, &place, marks))
    };
    map.iter().map(field).collect()
}

fn value(node: &Node, path: &str, marks: &mut BTreeMap<String, (usize, usize)>) -> Value {
    match node {
        Node::Scalar(scalar) => yaml::value(scalar),
        Node::Mapping(map) => Value::Object(object(map, path, marks)),
        Node::Sequence(list) => {
            let item = |(index, node): (usize, &Node)| {
                let path = format!("{path}[{index}]");
                marks.insert(path.clone(), mark(node));
                value(node, &path, marks)
            };
            list.iter().enumerate().map(item).collect()
        }
    }
}

fn mark(node: &Node) -> (usize, usize) {
    node.span().start().map_or((1, 1), |mark| (mark.line(), mark.column()))
}
