//! A report for a person: the diff and the shares.

use std::fmt::Write as _;

use crate::diff::lcs;
use crate::report::{Diff, Report, ReportedBalancer, ReportedShare};

/// The style of the output.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Style {
    /// Coloured, with bars.
    Terminal,
    /// Neither.
    Plain,
}

impl Style {
    /// The text in a colour, where there are colours.
    #[must_use]
    pub fn paint(self, code: &str, text: &str) -> String {
        match self {
            Self::Terminal => format!("\x1b[{code}m{text}\x1b[0m"),
            Self::Plain => text.to_owned(),
        }
    }
}

/// The text of a report: the diff, the shares, and the message. The message of
/// a failure goes to standard error instead.
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
    text += &match &report.balancers {
        None => table(&report.distribution.value, style),
        Some(balancers) => tables(balancers, &report.distribution.value, style),
    };
    if !report.failed {
        text += &report.msg;
        text.push('\n');
    }
    text
}

/// A line of either text, and where it stands in both.
struct Line<'a> {
    kind: LineKind,
    text: &'a str,
    old: usize,
    new: usize,
}

#[derive(Clone, Copy, PartialEq)]
enum LineKind {
    Same,
    Removed,
    New,
}

fn unified(diff: &Diff, style: Style) -> String {
    let lines = compared(&diff.before, &diff.after);
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
    for hunk in hunks(&lines) {
        let _ = writeln!(text, "{}", style.paint("36", &hunk_header(hunk)));
        for line in hunk {
            let line = match line.kind {
                LineKind::Same => format!(" {}", line.text),
                LineKind::Removed => style.paint("31", &format!("-{}", line.text)),
                LineKind::New => style.paint("32", &format!("+{}", line.text)),
            };
            let _ = writeln!(text, "{line}");
        }
    }
    text
}

/// All lines of both texts in one order: deleted lines come before new ones.
fn compared<'a>(before: &'a str, after: &'a str) -> Vec<Line<'a>> {
    let (before, after): (Vec<&str>, Vec<&str>) =
        (before.lines().collect(), after.lines().collect());
    let mut lines = Vec::new();
    let (mut old, mut new) = (0, 0);
    for (next_old, next_new) in lcs::pairs(&before, &after)
        .into_iter()
        .chain([(before.len(), after.len())])
    {
        let line = |kind, text, old, new| Line {
            kind,
            text,
            old,
            new,
        };
        let gone = before[old..next_old].iter().zip(old..);
        lines.extend(gone.map(|(text, old)| line(LineKind::Removed, text, old, new)));
        let fresh = after[new..next_new].iter().zip(new..);
        lines.extend(fresh.map(|(text, new)| line(LineKind::New, text, next_old, new)));
        if let Some(text) = before.get(next_old) {
            lines.push(line(LineKind::Same, text, next_old, next_new));
        }
        (old, new) = (next_old + 1, next_new + 1);
    }
    lines
}

/// The runs of lines that are within three of a change.
fn hunks<'a, 'b>(lines: &'b [Line<'a>]) -> impl Iterator<Item = &'b [Line<'a>]> {
    const CONTEXT: usize = 3;
    let near = |at: usize| {
        let around = at.saturating_sub(CONTEXT)..(at + CONTEXT + 1).min(lines.len());
        lines[around].iter().any(|line| line.kind != LineKind::Same)
    };
    let shown: Vec<bool> = (0..lines.len()).map(near).collect();
    let mut start = 0;
    shown
        .chunk_by(|one, next| one == next)
        .map(|run| (run[0], run.len()))
        .collect::<Vec<_>>()
        .into_iter()
        .filter_map(move |(shown, length)| {
            let run = &lines[start..start + length];
            start += length;
            shown.then_some(run)
        })
}

fn hunk_header(hunk: &[Line<'_>]) -> String {
    let side = |start: usize, without: LineKind| {
        let length = hunk.iter().filter(|line| line.kind != without).count();
        let first = start + usize::from(length > 0);
        if length == 1 {
            first.to_string()
        } else {
            format!("{first},{length}")
        }
    };
    format!(
        "@@ -{} +{} @@",
        side(hunk[0].old, LineKind::New),
        side(hunk[0].new, LineKind::Removed)
    )
}

/// The shares of each balancer of a set; of a large one those of the balancers
/// that changed, as many as a person reads.
fn tables(balancers: &[ReportedBalancer], shares: &[ReportedShare], style: Style) -> String {
    const MOST: usize = 20;
    let is_small = balancers.len() <= MOST;
    let shown = balancers.iter().filter(|one| is_small || one.changed);
    let mut text = String::new();
    let mut count = 0;
    for balancer in shown.take(MOST) {
        let name = Some(balancer.name.as_str());
        let of_balancer = shares
            .iter()
            .filter(|share| share.balancer.as_deref() == name);
        let of_balancer: Vec<ReportedShare> = of_balancer.cloned().collect();
        let _ = writeln!(text, "{}", style.paint("1", &format!("{}:", balancer.name)));
        text += &table(&of_balancer, style);
        count += 1;
    }
    if let Some(rest @ 1..) = balancers.len().checked_sub(count) {
        let _ = writeln!(text, "({rest} more balancers)");
    }
    text
}

fn table(shares: &[ReportedShare], style: Style) -> String {
    let named: Vec<(String, &ReportedShare)> =
        shares.iter().map(|share| (server(share), share)).collect();
    let wide = |column: fn(&(String, &ReportedShare)) -> usize, head: &str| {
        named.iter().map(column).max().unwrap_or(0).max(head.len())
    };
    let width = wide(|(name, _)| name.len(), "backend");
    let weights = wide(|(_, share)| share.weight.to_string().len(), "weight");
    let mut text = String::new();
    if !named.is_empty() {
        let head = format!(
            "{:width$}  {:>weights$}  {:>10}",
            "backend", "weight", "share"
        );
        let _ = writeln!(text, "{}", style.paint("1", &head));
    }
    for (name, share) in &named {
        let _ = write!(
            text,
            "{name:width$}  {:>weights$}  {:>8.4} %",
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
#[must_use]
pub fn bar(share: f64) -> String {
    const WIDTH: f64 = 30.0;
    const PARTS: [&str; 8] = ["", "▏", "▎", "▍", "▌", "▋", "▊", "▉"];
    let eighths = (share.clamp(0.0, 1.0) * WIDTH * 8.0).round() as usize;
    "█".repeat(eighths / 8) + PARTS[eighths % 8]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_diff_is_as_diff_u_shows_it() {
        let text = |lines: &[&str]| {
            lines
                .iter()
                .map(|line| format!("{line}\n"))
                .collect::<String>()
        };
        let before = ["a", "b", "c", "d", "e", "f", "g", "h", "i", "j"];
        let diff = Diff {
            before: text(&before),
            after: text(&["a", "B", "c", "d", "e", "f", "g", "h", "i", "j", "k"]),
            before_header: "W (before)".into(),
            after_header: "W (after)".into(),
        };
        let expected = [
            "--- W (before)",
            "+++ W (after)",
            "@@ -1,5 +1,5 @@",
            " a",
            "-b",
            "+B",
            " c",
            " d",
            " e",
            "@@ -8,3 +8,4 @@",
            " h",
            " i",
            " j",
            "+k",
        ];
        assert_eq!(unified(&diff, Style::Plain), text(&expected));
        let all = Diff {
            before: String::new(),
            ..diff
        };
        assert!(unified(&all, Style::Plain).contains("@@ -0,0 +1,11 @@\n+a\n"));
        assert!(unified(&all, Style::Terminal).contains("\x1b[32m+a\x1b[0m\n"));
    }

    #[test]
    fn bars_are_as_long_as_shares_are_large() {
        let lengths = [0.0, 0.01, 0.5, 1.0].map(|share| bar(share).chars().count());
        assert_eq!(lengths, [0, 1, 15, 30]);
    }
}
