//! The text format of Prometheus, for the textfile collector of the node exporter.

use std::fmt::Write as _;

use crate::explain::Explanation;

/// A family of metrics: its samples follow one another, as the format asks for.
struct Metric {
    name: &'static str,
    kind: &'static str,
    help: &'static str,
    samples: String,
}

impl Metric {
    fn new(name: &'static str, kind: &'static str, help: &'static str) -> Self {
        Self {
            name,
            kind,
            help,
            samples: String::new(),
        }
    }

    fn add(&mut self, labels: &[(&str, &str)], value: impl std::fmt::Display) {
        let labels = labels
            .iter()
            .map(|(name, value)| format!("{name}=\"{}\"", escaped(value)));
        let labels: Vec<String> = labels.collect();
        let _ = writeln!(
            self.samples,
            "{}{{{}}} {value}",
            self.name,
            labels.join(",")
        );
    }

    fn write(&self, out: &mut String) {
        if self.samples.is_empty() {
            return;
        }
        let _ = writeln!(out, "# HELP {} {}", self.name, self.help);
        let _ = writeln!(out, "# TYPE {} {}", self.name, self.kind);
        out.push_str(&self.samples);
    }
}

fn escaped(value: &str) -> String {
    value
        .replace('\\', "\\\\")
        .replace('"', "\\\"")
        .replace('\n', "\\n")
}

fn written(metrics: &[Metric]) -> String {
    let mut text = String::new();
    metrics.iter().for_each(|metric| metric.write(&mut text));
    text
}

/// The metrics of an explanation.
#[must_use]
pub fn explanation(explanation: &Explanation) -> String {
    let mut share = Metric::new(
        "iptables_balance_chain_share_ratio",
        "gauge",
        "Share of the connections of a chain that a destination gets by the rules.",
    );
    let mut packets = Metric::new(
        "iptables_balance_chain_connections_total",
        "counter",
        "Connections that a destination got by the counters of the rules.",
    );
    let mut unmatched = Metric::new(
        "iptables_balance_chain_unmatched_ratio",
        "gauge",
        "Share of the connections of a chain without a destination.",
    );
    let mut visits = Metric::new(
        "iptables_balance_chain_visits_rules",
        "gauge",
        "Rules that a connection visits on average.",
    );
    let mut findings = Metric::new(
        "iptables_balance_chain_findings",
        "gauge",
        "Mistakes in a chain.",
    );
    for chain in &explanation.chains {
        let conditions = chain.conditions.join(" ");
        let labels = [
            ("family", chain.family.as_str()),
            ("chain", chain.chain.as_str()),
            ("conditions", conditions.as_str()),
        ];
        for one in &chain.shares {
            let labels = [&labels[..], &[("backend", one.destination.as_str())]].concat();
            share.add(&labels, one.share);
            if let Some(count) = one.packets {
                packets.add(&labels, count);
            }
        }
        unmatched.add(&labels, chain.unmatched);
        visits.add(&labels, chain.visits);
        findings.add(&labels, chain.findings.len());
    }
    written(&[share, packets, unmatched, visits, findings])
}
