//! The words for `status`: a table for a person, and the text format of Prometheus.

use std::fmt::Write as _;

use super::terminal::Style;
use crate::request::Verdict;
use crate::status::{BackendStatus, BalancerStatus, Status};

/// A table for each balancer.
#[must_use]
pub fn text(status: &Status, style: Style) -> String {
    if status.balancers.is_empty() {
        return "no balancer is known on this host\n".to_owned();
    }
    let tables = status
        .balancers
        .iter()
        .map(|balancer| table(balancer, style));
    tables.collect::<Vec<_>>().join("\n")
}

const HEADINGS: [&str; 6] = ["backend", "weight", "share", "connections", "new", "state"];

fn table(balancer: &BalancerStatus, style: Style) -> String {
    let name = match &balancer.balancer {
        None => balancer.name.clone(),
        Some(member) => format!("{}/{member}", balancer.name),
    };
    let rows: Vec<[String; 6]> = balancer.backends.iter().map(row).collect();
    let width = |column: usize| {
        let cells = rows.iter().map(|row| row[column].chars().count());
        cells
            .chain([HEADINGS[column].len()])
            .max()
            .unwrap_or_default()
    };
    let widths: Vec<usize> = (0..HEADINGS.len()).map(width).collect();
    let line = |cells: [&str; 6]| {
        let [backend, weight, share, connections, new, state] = cells;
        let [first, second, third, fourth, fifth, _] = widths[..] else {
            return String::new();
        };
        format!(
            "{backend:first$}  {weight:>second$}  {share:>third$}  {connections:>fourth$}  {new:>fifth$}  {state}"
        )
    };
    let mut text = format!("{}\n{}\n", style.paint("1", &name), line(HEADINGS));
    for (row, backend) in rows.iter().zip(&balancer.backends) {
        let line = line(row.each_ref().map(String::as_str));
        let _ = writeln!(text, "{}", style.paint(colour(backend), line.trim_end()));
    }
    text
}

fn row(backend: &BackendStatus) -> [String; 6] {
    let connections = backend.connections;
    let state = match (&backend.reason, backend.in_service) {
        (Some(reason), true) => format!("in service, although {reason}"),
        (Some(reason), false) => reason.clone(),
        (None, _) => "in service".to_owned(),
    };
    [
        backend.endpoint().to_string(),
        backend.weight.to_string(),
        format!("{:.2} %", backend.share * 100.0),
        connections.map_or_else(|| "?".to_owned(), |count| count.to_string()),
        backend.packets.to_string(),
        state,
    ]
}

/// Green in service, red where something is wrong, else yellow.
fn colour(backend: &BackendStatus) -> &'static str {
    match (backend.in_service, backend.health) {
        (_, Some(Verdict::Down)) => "31",
        (true, _) => "32",
        (false, _) => "33",
    }
}

/// A metric: its name, its type, its help, and its value for a backend.
type Metric = (
    &'static str,
    &'static str,
    &'static str,
    fn(&BackendStatus) -> Option<String>,
);

const METRICS: [Metric; 7] = [
    ("weight", "gauge", "Weight as requested.", |one| {
        Some(one.weight.to_string())
    }),
    (
        "share_ratio",
        "gauge",
        "Share of the new connections of its family, by the rules.",
        |one| Some(one.share.to_string()),
    ),
    (
        "in_service",
        "gauge",
        "1 if it gets new connections.",
        |one| Some(u8::from(one.in_service).to_string()),
    ),
    (
        "up",
        "gauge",
        "1 if its health checks pass, by the verdict of a running watcher.",
        |one| {
            one.health
                .map(|health| u8::from(health == Verdict::Up).to_string())
        },
    ),
    (
        "connections",
        "gauge",
        "Connections now, by the kernel's connection table.",
        |one| one.connections.map(|count| count.to_string()),
    ),
    (
        "new_connections_total",
        "counter",
        "Connections since its rules were made.",
        |one| Some(one.packets.to_string()),
    ),
    (
        "first_packet_bytes_total",
        "counter",
        "Bytes of the first packets of these connections.",
        |one| Some(one.bytes.to_string()),
    ),
];

/// The text format of Prometheus, for the node exporter's textfile collector.
#[must_use]
pub fn prometheus(status: &Status) -> String {
    let mut text = String::new();
    for (name, kind, help, value) in METRICS {
        let name = format!("iptables_balance_backend_{name}");
        let _ = writeln!(text, "# HELP {name} {help}\n# TYPE {name} {kind}");
        for balancer in &status.balancers {
            for backend in &balancer.backends {
                if let Some(value) = value(backend) {
                    let _ = writeln!(text, "{name}{{{}}} {value}", labels(balancer, backend));
                }
            }
        }
    }
    text
}

/// Names and endpoints have no character that would have to be escaped.
fn labels(balancer: &BalancerStatus, backend: &BackendStatus) -> String {
    let family = backend.family.as_str();
    format!(
        "name=\"{}\",balancer=\"{}\",family=\"{family}\",backend=\"{}\"",
        balancer.name,
        balancer.balancer.as_deref().unwrap_or_default(),
        backend.endpoint()
    )
}
