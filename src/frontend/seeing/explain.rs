//! An explanation for a person at a terminal.

use std::fmt::Write as _;

use crate::explain::{ExplainedChain, Explanation, Finding, is_range};
use crate::frontend::terminal::{Style, bar};

/// The text of an explanation.
#[must_use]
pub fn text(explanation: &Explanation, style: Style) -> String {
    let mut text = String::new();
    for chain in &explanation.chains {
        if !text.is_empty() {
            text.push('\n');
        }
        text += &of_chain(chain, style);
    }
    if !explanation.findings.is_empty() && !text.is_empty() {
        text.push('\n');
    }
    for finding in &explanation.findings {
        text += &of_finding(finding, style);
    }
    if text.is_empty() {
        text += "no chain of nat shares out connections\n";
    }
    text
}

fn of_chain(chain: &ExplainedChain, style: Style) -> String {
    let mut text = String::new();
    let head = format!(
        "{} {} {}",
        chain.family.as_str(),
        chain.table.as_str(),
        chain.chain
    );
    let _ = writeln!(text, "{}", style.paint("1", &head));
    for jump in shown(&chain.jumps) {
        let _ = writeln!(text, "  led here by  {jump}");
    }
    if chain.jumps.is_empty() {
        let _ = writeln!(text, "  no rule leads here");
    }
    if !chain.conditions.is_empty() {
        let _ = writeln!(text, "  shares of    {}", chain.conditions.join(" "));
    }
    text += &shares(chain, style);
    let _ = writeln!(
        text,
        "  a connection visits {:.2} rules on average",
        chain.visits
    );
    if let Some(p_value) = chain.p_value {
        let verdict = match p_value < 0.001 {
            true => "chance alone does not explain the counters",
            false => "the counters fit the shares",
        };
        let _ = writeln!(text, "  {verdict} (p = {p_value:.4})");
    }
    if let Some(deviation) = chain.deviation {
        let verdict = match deviation.fits {
            true => "the counters fit the turns",
            false => "the counters do not fit the turns; did all rules begin together?",
        };
        let _ = writeln!(
            text,
            "  {verdict} (at most {:.2} connections off, possible {:.2})",
            deviation.found, deviation.bound
        );
    }
    for finding in &chain.findings {
        text += &of_finding(finding, style);
    }
    text
}

/// The first of many jumps.
fn shown(jumps: &[String]) -> impl Iterator<Item = String> {
    const MOST: usize = 4;
    let more = jumps.len().saturating_sub(MOST);
    let rest = (more > 0).then(|| format!("{more} more rules"));
    jumps.iter().take(MOST).cloned().chain(rest)
}

fn shares(chain: &ExplainedChain, style: Style) -> String {
    let nobody = "(nobody)";
    let names = chain.shares.iter().map(|share| share.destination.as_str());
    let width = names.chain([nobody]).map(|name| name.chars().count()).max();
    let width = width.unwrap_or(0);
    let fractions = chain
        .shares
        .iter()
        .filter_map(|share| share.fraction.as_deref());
    let fraction_width = fractions.map(str::len).max().unwrap_or(0);
    let mut text = String::new();
    let mut line = |name: &str, share: f64, fraction: &str, packets: Option<u64>| {
        let _ = write!(
            text,
            "  {name:width$}  {:>8.4} %  {fraction:>fraction_width$}",
            share * 100.0
        );
        if let Some(packets) = packets {
            let _ = write!(text, "  {packets:>10} connections");
        }
        if style == Style::Terminal {
            let _ = write!(text, "  {}", style.paint("34", &bar(share)));
        }
        while text.ends_with(' ') {
            text.pop();
        }
        text.push('\n');
    };
    for share in &chain.shares {
        let fraction = share.fraction.as_deref().unwrap_or_default();
        line(&share.destination, share.share, fraction, share.packets);
    }
    if chain.unmatched > 0.0 {
        line(nobody, chain.unmatched, "", None);
    }
    if chain
        .shares
        .iter()
        .any(|share| is_range(&share.destination))
    {
        text += "  a range counts as one destination: the kernel chooses one of its addresses\n";
    }
    text
}

fn of_finding(finding: &Finding, style: Style) -> String {
    let mut text = String::new();
    let place = finding
        .line
        .map_or_else(String::new, |line| format!("line {line}: "));
    let head = format!("  {}: {place}{}", finding.code.as_str(), finding.rule);
    let _ = writeln!(text, "{}", style.paint("33", &head));
    let _ = writeln!(text, "    {}", finding.message);
    let _ = writeln!(text, "    instead: {}", finding.advice);
    text
}
