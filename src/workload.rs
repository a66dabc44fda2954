//! The Istio objects that we touch, and what one workload is.

mod probe;

pub use probe::{ProbeMethod, ReadinessProbe};
