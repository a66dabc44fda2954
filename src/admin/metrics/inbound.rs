//! The inbound listeners: counters and a histogram, which count elsewhere already.

use super::Labels;
use crate::status::{InboundReport, Report};
use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, MetricEncoder},
    metrics::MetricType,
};
use std::fmt;

/// Every listener with its labels.
#[derive(Debug)]
pub(super) struct Listeners(Vec<(Labels, InboundReport)>);

impl Listeners {
    pub(super) fn of(report: &Report) -> Self {
        let all = report.workloads.iter().flat_map(|w| w.inbound.iter().map(move |i| (w, i)));
        let labels = |workload: &str, i: &InboundReport| {
            let listen = i.address.map_or_else(|| i.listen.clone(), |address| address.to_string());
            vec![("workload", workload.to_owned()), ("listen", listen)]
        };
        Self(all.map(|(w, i)| (labels(&w.name, i), i.clone())).collect())
    }

    fn counters(
        &self,
        encoder: &mut DescriptorEncoder<'_>,
        (name, help): (&str, &str),
        of: impl Fn(&InboundReport) -> Vec<(Option<(&'static str, String)>, u64)>,
    ) -> fmt::Result {
        let mut metric = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
        for (labels, inbound) in &self.0 {
            for (label, value) in of(inbound) {
                let labels = [labels.clone(), label.into_iter().collect()].concat();
                metric.encode_family(&labels)?.encode_counter::<Labels, _, u64>(&value, None)?;
            }
        }
        Ok(())
    }
}

impl Collector for Listeners {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let e = &mut encoder;
        if self.0.is_empty() {
            return Ok(());
        }
        let mut listening = e.encode_descriptor(
            "we_agent_inbound_listening",
            "Whether it listens: 1, or 0 while it cannot",
            None,
            MetricType::Gauge,
        )?;
        for (labels, inbound) in &self.0 {
            listening.encode_family(labels)?.encode_gauge(&u64::from(inbound.address.is_some()))?;
        }
        let mut open =
            e.encode_descriptor("we_agent_inbound_open", "Connections that are open now", None, MetricType::Gauge)?;
        for (labels, inbound) in &self.0 {
            open.encode_family(labels)?.encode_gauge(&inbound.open)?;
        }
        let one = |value: u64| vec![(None, value)];
        self.counters(e, ("we_agent_inbound_connections", "Connections taken in"), |i| one(i.connections))?;
        self.counters(
            e,
            ("we_agent_inbound_plain", "Connections without TLS that were let through"),
            |i| one(i.plain),
        )?;
        let bytes = |i: &InboundReport| {
            [("in", i.bytes_in), ("out", i.bytes_out)].map(|(way, n)| (Some(("direction", way.to_owned())), n)).to_vec()
        };
        self.counters(e, ("we_agent_inbound_bytes", "Bytes forwarded, without TLS"), bytes)?;
        let refused = |i: &InboundReport| {
            i.refused.iter().map(|(reason, count)| (Some(("reason", reason.clone())), *count)).collect()
        };
        self.counters(e, ("we_agent_inbound_refused", "Connections refused, by reason"), refused)?;
        let help = "From the ClientHello to the end of the handshake";
        let mut times = e.encode_descriptor("we_agent_inbound_handshake_seconds", help, None, MetricType::Histogram)?;
        for (labels, inbound) in &self.0 {
            histogram(times.encode_family(labels)?, inbound)?;
        }
        Ok(())
    }
}

fn histogram(mut metric: MetricEncoder<'_>, inbound: &InboundReport) -> fmt::Result {
    let times = &inbound.handshakes;
    let longer = times.count - times.classes.iter().map(|(_, count)| count).sum::<u64>().min(times.count);
    let classes: Vec<_> = times.classes.iter().copied().chain([(f64::INFINITY, longer)]).collect();
    metric.encode_histogram::<Labels>(times.seconds, times.count, &classes, None)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::status::LatencyReport;
    use prometheus_client::{encoding::text::encode, registry::Registry};

    #[test]
    fn a_listener_has_its_figures() {
        let inbound = InboundReport {
            listen: "8443".to_owned(),
            address: Some("[::]:8443".parse().unwrap()),
            open: 2,
            connections: 9,
            bytes_in: 5,
            refused: [("not_allowed".to_owned(), 3)].into(),
            handshakes: LatencyReport { count: 4, seconds: 2.5, classes: vec![(0.001, 1), (0.01, 2)] },
            ..InboundReport::default()
        };
        let labels = vec![("workload", "payments".to_owned()), ("listen", "[::]:8443".to_owned())];
        let deaf = vec![("workload", "payments".to_owned()), ("listen", "8444".to_owned())];
        let mut registry = Registry::default();
        let both = vec![(labels, inbound), (deaf, InboundReport::default())];
        registry.register_collector(Box::new(Listeners(both)));
        let mut text = String::new();
        encode(&mut text, &registry).unwrap();
        let of = "workload=\"payments\",listen=\"[::]:8443\"";
        for line in [
            format!("we_agent_inbound_listening{{{of}}} 1"),
            "we_agent_inbound_listening{workload=\"payments\",listen=\"8444\"} 0".to_owned(),
            format!("we_agent_inbound_open{{{of}}} 2"),
            format!("we_agent_inbound_connections_total{{{of}}} 9"),
            format!("we_agent_inbound_bytes_total{{{of},direction=\"in\"}} 5"),
            format!("we_agent_inbound_refused_total{{{of},reason=\"not_allowed\"}} 3"),
            format!("we_agent_inbound_handshake_seconds_sum{{{of}}} 2.5"),
            format!("we_agent_inbound_handshake_seconds_count{{{of}}} 4"),
            format!("we_agent_inbound_handshake_seconds_bucket{{le=\"0.01\",{of}}} 3"),
            format!("we_agent_inbound_handshake_seconds_bucket{{le=\"+Inf\",{of}}} 4"),
        ] {
            assert!(text.lines().any(|l| l == line), "{line} is not in\n{text}");
        }
    }
}
