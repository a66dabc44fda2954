//! Where a workload runs, as the mesh's load balancing knows places.

use std::collections::BTreeMap;

/// Region, zone and subzone; what is unknown is empty.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Locality {
    /// For example `us-east1`.
    pub region: String,
    /// For example `us-east1-b`.
    pub zone: String,
    /// For example a rack.
    pub subzone: String,
}

/// The label that users should set (Istio 1.29 and later).
const LABEL: &str = "topology.istio.io/locality";
/// The older one; istiod takes it away from the entry.
pub(super) const OLD_LABEL: &str = "istio-locality";

impl Locality {
    /// Reads `region/zone/subzone`. A label value can hold no slash, so a text without one is cut at its dots.
    /// None if there is no region: istiod would make `/zone` of it.
    pub fn parse(text: &str) -> Option<Self> {
        let text = if text.contains('/') { text.to_owned() } else { text.replace('.', "/") };
        let mut parts = text.splitn(3, '/').map(str::to_owned);
        let mut next = || parts.next().unwrap_or_default();
        let locality = Self { region: next(), zone: next(), subzone: next() };
        (!locality.region.is_empty()).then_some(locality)
    }

    /// What the workload's own labels say.
    pub fn from_labels(labels: &BTreeMap<String, String>) -> Option<Self> {
        [LABEL, OLD_LABEL].iter().filter_map(|key| labels.get(*key)).find_map(|value| Self::parse(value))
    }
}

impl std::fmt::Display for Locality {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut text = [self.region.as_str(), &self.zone, &self.subzone].join("/");
        text.truncate(text.trim_end_matches('/').len());
        f.write_str(&text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_in_both_spellings() {
        let place = |r: &str, z: &str, s: &str| Some(Locality { region: r.into(), zone: z.into(), subzone: s.into() });
        assert_eq!(Locality::parse("us-east1.z1.s1"), place("us-east1", "z1", "s1"));
        assert_eq!(Locality::parse("r.1/z/s"), place("r.1", "z", "s"));
        assert_eq!(Locality::parse("r1"), place("r1", "", ""));
        assert_eq!(Locality::parse("/z"), None);
        assert_eq!(Locality::parse(""), None);
        let mut labels = BTreeMap::from([(OLD_LABEL.to_owned(), "a.b".to_owned())]);
        assert_eq!(Locality::from_labels(&labels), place("a", "b", ""));
        labels.insert(LABEL.to_owned(), "c.d".to_owned());
        assert_eq!(Locality::from_labels(&labels), place("c", "d", ""));
        assert_eq!(Locality::parse("a.b").map(|l| l.to_string()).as_deref(), Some("a/b"));
    }
}
