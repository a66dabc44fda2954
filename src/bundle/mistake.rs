//! What can be wrong with a bundle. Each message names the place and the fix; none shows a value that could be a secret.

use super::env::EnvProblem;
use crate::{
    files::ReadError,
    spiffe::{BundleError, SpiffeIdError},
    workload::{AuthorityError, EntryError},
};

/// One mistake: where, and what.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{place}: {problem}")]
pub struct Mistake {
    /// `file`, `file:line`, `file: field` or `file:line: KEY`.
    pub place: String,
    /// What is wrong, and what to do.
    pub problem: Problem,
}

/// Every mistake of a bundle, at once.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BundleErrors(pub Vec<Mistake>);

impl std::error::Error for BundleErrors {}

impl std::fmt::Display for BundleErrors {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for (i, mistake) in self.0.iter().enumerate() {
            write!(f, "{}{mistake}", if i == 0 { "" } else { "\n" })?;
        }
        Ok(())
    }
}

/// What helps where bundles usually are.
fn permit_hint(error: ReadError) -> &'static str {
    match error {
        ReadError::Denied => " (in /etc/we-agent, \"we-agent permit\", run as root, does)",
        _ => "",
    }
}

/// The kinds of mistakes.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Problem {
    /// A file that must be there is not.
    #[error("the file is missing: {0}")]
    Missing(&'static str),
    /// A file cannot be read.
    #[error("{0}{hint}", hint = permit_hint(*.0))]
    File(#[from] ReadError),
    /// The directory's name cannot be the name of a workload.
    #[error(
        "the name of the directory (of a credential, what is before _cluster.env) is the workload's name and must be a DNS \
         label (up to 63 of a-z, 0-9 and '-'): rename it"
    )]
    Name,
    /// A line of an environment file.
    #[error(transparent)]
    Env(#[from] EnvProblem),
    /// A key that must be set is not.
    #[error("is not set: create the bundle again with `istioctl x workload entry configure`")]
    Unset,
    /// It is made of a variable that is not set.
    #[error("is made of ${{{0}}}, which is not set in this file: write the value itself")]
    UnsetVariable(String),
    /// A label in JSON.
    #[error("label {0:?} has a value that is no text: put it in double quotes")]
    Label(String),
    /// Not the form that the key wants.
    #[error("{got:?} is not {expected}")]
    Value {
        /// What it is.
        got: String,
        /// What it should be.
        expected: &'static str,
    },
    /// As [`Problem::Value`], where the value is not shown.
    #[error("is not {0}")]
    Type(&'static str),
    /// A form of control plane that we do not speak with.
    #[error("{0}")]
    Refused(&'static str),
    /// An address of the control plane.
    #[error("{0:?} {1}")]
    Authority(String, AuthorityError),
    /// The identity.
    #[error(transparent)]
    Identity(#[from] SpiffeIdError),
    /// The name or the labels of the entry.
    #[error(transparent)]
    Entry(#[from] EntryError),
    /// The roots.
    #[error("{0}: copy the root certificate of the mesh there (the bundle's root-cert.pem)")]
    Roots(#[from] BundleError),
    /// Not YAML, or not the kind of YAML it should be.
    #[error("{0}")]
    Yaml(String),
    /// A `mesh.yaml` that ends too early, or was taken from elsewhere.
    #[error(
        "has no defaultConfig.discoveryAddress, which istioctl always writes: the file is damaged or cut short, copy it again (if \
         the mesh's own configuration has none, add it there)"
    )]
    NoDiscovery,
    /// A probe with two methods.
    #[error("has both {0} and {1}: a probe does one thing, keep one of them")]
    TwoMethods(&'static str, &'static str),
    /// A line of `hosts`.
    #[error("{0:?} is no IP address: a line is an address and the names it has")]
    HostAddress(String),
    /// A line of `hosts`.
    #[error("there is an address but no name: a line is an address and the names it has")]
    HostName,
}
