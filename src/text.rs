//! A report for people: the diff, and who gets what.

use std::fmt::Write as _;

use similar::{ChangeTag, TextDiff};

use crate::report::{Diff, Report, ReportedShare};

/// Whether colours and bars are wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Style {
    /// Coloured, with bars.
    Terminal,
    /// Neither.
    Plain,
}

impl Style {
    fn paint(self, code: &str, text: &str) -> String {
        match self {
            Self::Terminal => format!("\x1b[{code}m{text}\x1b[0m"),
            Self::Plain => text.to_owned(),
        }
    }
}

/// The diff if there is one, the shares, and the sentence. A failure's
/// sentence is not part of it: it goes to standard error.
#[must_use]
pub fn report(report: &Report, style: Style) -> String {
    let mut text = String::new();
    if let Some(diff) = report
        .diff
        .as_ref()
        .filter(|diff| diff.before != diff.after)
    {
        text += &unified(diff, style);
    }
    text += &table(&report.distribution, style);
    if !report.failed {
        text += &report.msg;
        text.push('\n');
    }
    text
}

fn unified(diff: &Diff, style: Style) -> String {
    let lines = TextDiff::from_lines(&diff.before, &diff.after);
    let mut text = String::new();
    let _ = writeln!(
        text,
        "{}",
        style.paint("1", &format!("--- {}", diff.before_header))
    );
    let _ = writeln!(
        text,
        "{}",
        style.paint("1", &format!("+++ {}", diff.after_header))
    );
    for hunk in lines.unified_diff().context_radius(3).iter_hunks() {
        let _ = writeln!(
            text,
            "{}",
            style.paint("36", hunk.header().to_string().trim_end())
        );
        for change in hunk.iter_changes() {
            let line = format!("{}{}", change.tag(), change.value().trim_end_matches('\n'));
            let line = match change.tag() {
                ChangeTag::Equal => line,
                ChangeTag::Delete => style.paint("31", &line),
                ChangeTag::Insert => style.paint("32", &line),
            };
            let _ = writeln!(text, "{line}");
        }
    }
    text
}

fn table(shares: &[ReportedShare], style: Style) -> String {
    let named: Vec<(String, &ReportedShare)> =
        shares.iter().map(|share| (server(share), share)).collect();
    let wide = |column: fn(&(String, &ReportedShare)) -> usize, head: &str| {
        named.iter().map(column).max().unwrap_or(0).max(head.len())
    };
    let names = wide(|(name, _)| name.len(), "backend");
    let weights = wide(|(_, share)| share.weight.to_string().len(), "weight");
    let mut text = String::new();
    if !named.is_empty() {
        let head = format!(
            "{:names$}  {:>weights$}  {:>10}",
            "backend", "weight", "share"
        );
        let _ = writeln!(text, "{}", style.paint("1", &head));
    }
    for (name, share) in &named {
        let _ = write!(
            text,
            "{name:names$}  {:>weights$}  {:>8.4} %",
            share.weight,
            share.share * 100.0
        );
        if style == Style::Terminal {
            let _ = write!(text, "  {}", style.paint("34", &bar(share.share)));
        }
        text.push('\n');
    }
    text
}

fn server(share: &ReportedShare) -> String {
    match (share.address, share.port) {
        (address, None) => address.to_string(),
        (address, Some(port)) => std::net::SocketAddr::new(address, port).to_string(),
    }
}

/// Up to 30 blocks, in eighths of one.
#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
fn bar(share: f64) -> String {
    const WIDTH: f64 = 30.0;
    const PARTS: [&str; 8] = ["", "▏", "▎", "▍", "▌", "▋", "▊", "▉"];
    let eighths = (share.clamp(0.0, 1.0) * WIDTH * 8.0).round() as usize;
    "█".repeat(eighths / 8) + PARTS[eighths % 8]
}
