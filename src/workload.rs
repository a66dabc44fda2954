//! The Istio objects that we touch, and what one workload is.

mod locality;
mod probe;

pub use locality::Locality;
pub use probe::{ProbeMethod, ReadinessProbe};
