//! Where this host is: the locality that the mesh prefers near endpoints by.
//!
//! A label says it, else the cloud's metadata server; a host that knows neither says nothing, so that the template of
//! its WorkloadGroup keeps its word.

mod cloud;

pub use cloud::{Platform, discover};

use std::collections::BTreeMap;

/// Region, zone and subzone, from coarse to fine; what is not known is empty, and nothing follows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Locality {
    /// Such as `us-west-2`; never empty.
    pub region: String,
    /// Such as `us-west-2b`.
    pub zone: String,
    /// The operator's own division of a zone.
    pub subzone: String,
}

impl Locality {
    /// Reads `region[/zone[/subzone]]`, or the same with dots where there is no slash, since a label's value cannot
    /// have slashes (Istio's rule). None without a region.
    pub fn parse(text: &str) -> Option<Self> {
        let separator = if text.contains('/') { '/' } else { '.' };
        let mut parts = text.splitn(3, separator).map(str::to_owned);
        let region = parts.next().filter(|region| !region.is_empty())?;
        let zone = parts.next().unwrap_or_default();
        // istiod drops a subzone that has no zone.
        let subzone = parts.next().filter(|_| !zone.is_empty()).unwrap_or_default();
        Some(Self { region, zone, subzone })
    }

    /// What the workload's own labels say: `topology.istio.io/locality`, else `istio-locality`.
    pub fn from_labels(labels: &BTreeMap<String, String>) -> Option<Self> {
        let mut said = ["topology.istio.io/locality", "istio-locality"].into_iter().filter_map(|key| labels.get(key));
        said.find_map(|text| Self::parse(text))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn locality(region: &str, zone: &str, subzone: &str) -> Option<Locality> {
        Some(Locality { region: region.to_owned(), zone: zone.to_owned(), subzone: subzone.to_owned() })
    }

    #[test]
    fn labels_are_read_as_istio_reads_them() {
        for (text, expected) in [
            ("us-east1/z1/s1", locality("us-east1", "z1", "s1")),
            ("us-east1.z1.s1", locality("us-east1", "z1", "s1")),
            ("us-east1.a/z1", locality("us-east1.a", "z1", "")),
            ("us-east1", locality("us-east1", "", "")),
            ("r//s", locality("r", "", "")),
            ("/z", None),
            ("", None),
        ] {
            assert_eq!(Locality::parse(text), expected, "{text:?}");
        }
        let labels = |list: &[(&str, &str)]| list.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        let both = labels(&[("istio-locality", "a/b/c"), ("topology.istio.io/locality", "r1/z1/s1")]);
        assert_eq!(Locality::from_labels(&both), locality("r1", "z1", "s1"));
        assert_eq!(Locality::from_labels(&labels(&[("app", "x")])), None);
    }
}
