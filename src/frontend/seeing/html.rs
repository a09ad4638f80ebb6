//! An explanation as one page that needs no network.
//!
//! 1. The picture is the page's own text: a list of rules, each with a bar. So it folds, prints, and
//!    reads well aloud. Text never lies on a bar, so its contrast does not depend on a share.
//! 2. The script only sorts, searches and unfolds. Without it everything is there.
//! 3. Names and comments are the work of others. `maud` escapes them, and the policy of the page
//!    runs no other script than its own and loads nothing.

use std::collections::HashMap;

use maud::{DOCTYPE, Markup, PreEscaped, html};

use crate::explain::{Choice, ExplainedChain, Explanation, Finding, ShownStep};

/// Longer lists are folded.
const MANY: usize = 40;

/// The rules before a fold.
const FIRST: usize = 8;

/// With more chains than this all but the first one are folded.
const MANY_CHAINS: usize = 8;

/// The content security policy. The hash is that of `page.js`; after a change of the script the console of a browser names it.
const POLICY: &str = "default-src 'none'; base-uri 'none'; form-action 'none'; style-src 'unsafe-inline'; \
     script-src 'sha256-5MJvuc9ZEfRAwxBpBiKhscEQttb7T54/ZC48OWTuxV0='";

/// Longer destinations need wider columns on paper: `255.255.255.255:65535`.
const WIDE: usize = 21;

/// The page.
#[must_use]
pub fn page(explanation: &Explanation) -> String {
    let chains = &explanation.chains;
    let page = html! {
        (DOCTYPE)
        html lang="en" {
            head {
                meta charset="utf-8";
                meta http-equiv="Content-Security-Policy" content=(POLICY);
                meta name="viewport" content="width=device-width, initial-scale=1";
                meta name="color-scheme" content="light dark";
                title { "Who gets which connections" }
                style { (PreEscaped(include_str!("page.css"))) }
            }
            body {
                a.skip href="#chains" { "Skip to the chains" }
                header {
                    h1 { "Who gets which connections" }
                    (summary(explanation))
                    @if chains.len() > 1 { (contents(chains)) }
                }
                main id="chains" tabindex="-1" {
                    @for (number, chain) in chains.iter().enumerate() { (of_chain(number, chain)) }
                    @if !explanation.findings.is_empty() {
                        section.chain aria-labelledby="others" {
                            h2 id="others" { "Other mistakes" }
                            (findings("others", &explanation.findings, &[]))
                        }
                    }
                }
                footer { p { "Made by iptables_balance explain from the rules alone." } }
                script { (PreEscaped(include_str!("page.js"))) }
            }
        }
    };
    page.into_string()
}

fn summary(explanation: &Explanation) -> Markup {
    let chains = &explanation.chains;
    let found: usize = chains.iter().map(|chain| chain.findings.len()).sum();
    let found = found + explanation.findings.len();
    html! {
        p.summary {
            @match chains.len() {
                0 => "No chain shares out connections",
                1 => "1 chain shares out connections",
                many => { (many) " chains share out connections" },
            }
            " "
            @match found {
                0 => span.right { "no known mistake" },
                1 => span.wrong { "1 mistake" },
                many => span.wrong { (many) " mistakes" },
            }
        }
    }
}

fn contents(chains: &[ExplainedChain]) -> Markup {
    html! {
        details.contents open[chains.len() <= MANY] {
            summary { "Chains" }
            nav aria-label="Chains" {
                ul {
                    @for (number, chain) in chains.iter().enumerate() {
                        li {
                            a href=(format!("#chain-{number}")) { (chain.chain) }
                            @match chain.findings.len() {
                                0 => "",
                                1 => { " " span.wrong { "1 mistake" } },
                                many => { " " span.wrong { (many) " mistakes" } },
                            }
                        }
                    }
                }
            }
        }
    }
}

fn of_chain(number: usize, chain: &ExplainedChain) -> Markup {
    let id = format!("chain-{number}");
    html! {
        section.chain.many[chain.shares.len() > MANY] id=(id) tabindex="-1" aria-labelledby=(format!("{id}-name")) {
            h2 id=(format!("{id}-name")) {
                span.name { (chain.chain) } " "
                small { (chain.family.title()) ", table " (chain.table.as_str()) @if !chain.conditions.is_empty() { ", connections with " code { (chain.conditions.join(" ")) } } }
            }
            dl.facts {
                div { dt { "destinations" } dd { (chain.shares.len()) } }
                div { dt { "decided by" } dd { (choices(chain)) } }
                div { dt { "rules visited" } dd { (format!("{:.2}", chain.visits)) } }
                div.lost[chain.unmatched > 0.0] { dt { "to nobody" } dd { (percent(chain.unmatched)) } }
                @if let Some(p_value) = chain.p_value { div { dt { "fit of the counters (p)" } dd { (format!("{p_value:.4}")) } } }
                @if let Some(deviation) = chain.deviation {
                    div { dt { "off by, at most" } dd { (format!("{:.1} of {:.1}", deviation.found, deviation.bound)) } }
                }
            }
            @if !chain.findings.is_empty() { (findings(&id, &chain.findings, &chain.steps)) }
            h3 { "The way of a connection" }
            (way(&id, chain))
            h3 id=(format!("{id}-shares")) { "Shares" }
            (table(&id, chain))
        }
    }
}

fn choices(chain: &ExplainedChain) -> String {
    let words: Vec<&str> = chain
        .decided_by
        .iter()
        .copied()
        .map(Choice::as_str)
        .collect();
    match words.is_empty() {
        true => "nothing".to_owned(),
        false => words.join(", "),
    }
}

/// A percentage; a small share keeps two digits that count.
fn percent(share: f64) -> String {
    let share = share * 100.0;
    let digits = match share {
        small if small > 0.0 && small < 0.0095 => 5,
        small if small > 0.0 && small < 0.95 => 3,
        _ => 2,
    };
    let text = format!("{share:.digits$}");
    let text = text.trim_end_matches('0').trim_end_matches('.');
    format!("{text}\u{a0}%")
}

/// The mistakes; those at a rule of the picture lead there.
fn findings(id: &str, findings: &[Finding], steps: &[ShownStep]) -> Markup {
    html! {
        ul.findings aria-label="Mistakes" {
            @for (at, finding) in findings.iter().enumerate() {
                li id=(format!("{id}-mistake-{at}")) tabindex="-1" {
                    p { strong { (finding.code.as_str()) } " " (with_code(&finding.message)) "." }
                    p { "Instead: " (with_code(&finding.advice)) "." }
                    @let rule = html! { code { @if let Some(line) = finding.line { "line " (line) ": " } (finding.rule) } };
                    @match steps.iter().position(|step| is_at(finding, step)) {
                        Some(step) => a href=(format!("#{id}-rule-{step}")) { (rule) },
                        None => (rule),
                    }
                }
            }
        }
    }
}

fn is_at(finding: &Finding, step: &ShownStep) -> bool {
    let rule = finding.rule.strip_prefix("-A ");
    let rule = rule.and_then(|rule| rule.strip_prefix(step.chain.as_str()));
    rule.and_then(|rule| rule.strip_prefix(' ')) == Some(&step.rule)
        && finding.line.is_none_or(|line| line == step.line)
}

/// Text in which backticks enclose code.
fn with_code(text: &str) -> Markup {
    html! {
        @for (at, part) in text.split('`').enumerate() {
            @if at % 2 == 1 { code { (part) } } @else { (part) }
        }
    }
}

/// A rule of the picture.
struct Bar<'a> {
    step: &'a ShownStep,
    /// Its place on the way.
    number: usize,
    /// The share that stopped before it. Its bar begins there.
    before: f64,
}

/// The rules of each chain in turn. The bar of a chain's first rule begins where that of the rule
/// begins that leads there.
fn bars(steps: &[ShownStep]) -> Vec<(&str, Vec<Bar<'_>>)> {
    let mut begins: HashMap<&str, f64> = HashMap::new();
    let mut chains: Vec<(&str, Vec<Bar>)> = Vec::new();
    for (number, step) in steps.iter().enumerate() {
        if chains.last().is_none_or(|(name, _)| *name != step.chain) {
            chains.push((&step.chain, Vec::new()));
        }
        let Some((_, bars)) = chains.last_mut() else {
            continue;
        };
        let reached = bars.first().map_or(step.arriving, |bar| bar.step.arriving);
        let begin = begins.get(step.chain.as_str()).copied().unwrap_or(0.0);
        let before = (begin + reached - step.arriving).clamp(0.0, (1.0 - step.arriving).max(0.0));
        if step.is_chain {
            begins.entry(&step.target).or_insert(before);
        }
        bars.push(Bar {
            step,
            number,
            before,
        });
    }
    chains
}

/// The rules on the way, chain by chain.
fn way(id: &str, chain: &ExplainedChain) -> Markup {
    let chains = bars(&chain.steps);
    let (shown, folded) = chains.split_at(if chains.len() > MANY_CHAINS {
        1
    } else {
        chains.len()
    });
    let rules: usize = folded.iter().map(|(_, bars)| bars.len()).sum();
    let leads_on = chain.steps.iter().any(|step| step.is_chain);
    let picture = Picture {
        id,
        chain,
        numbers: chains
            .iter()
            .enumerate()
            .map(|(number, (name, _))| (*name, number))
            .collect(),
    };
    html! {
        p.legend {
            "Each bar is a rule: "
            span.taken { "takes" } " "
            @if leads_on { span.onward { "leads to a chain" } " " }
            span.rest { "leaves for the next rule" }
            @if chain.unmatched > 0.0 { " " span.nobody { "nobody" } }
        }
        div.way {
            (origin(chain))
            @for (name, bars) in shown { (picture.of_bars(name, bars, true)) }
            @if !folded.is_empty() {
                details.more {
                    summary { (folded.len()) " more chains, " (rules) " rules" }
                    @for (name, bars) in folded { (picture.of_bars(name, bars, false)) }
                }
            }
            @if chain.unmatched > 0.0 {
                p.step.nobody style=(place(1.0 - chain.unmatched, chain.unmatched, 0.0)) {
                    b { (percent(chain.unmatched)) } " " span.to { "nobody: falls through" }
                }
            }
        }
    }
}

/// The rules that lead to the chain.
fn origin(chain: &ExplainedChain) -> Markup {
    html! {
        ol.jumps aria-label="From" {
            @for jump in chain.jumps.iter().take(4) { li { code { (jump) } } }
            @if chain.jumps.len() > 4 { li { (chain.jumps.len() - 4) " more rules lead here" } }
            @if chain.jumps.is_empty() {
                @match chain.chain.as_str() {
                    "PREROUTING" => li { "New connections from other hosts begin here." },
                    "OUTPUT" => li { "New connections of this host begin here." },
                    "INPUT" | "POSTROUTING" => li { "New connections pass here." },
                    _ => li { "No rule leads here." },
                }
            }
        }
    }
}

/// The picture of one chain and those below it.
struct Picture<'a> {
    /// The anchor of the section.
    id: &'a str,
    chain: &'a ExplainedChain,
    /// The place of each chain on the way.
    numbers: HashMap<&'a str, usize>,
}

impl Picture<'_> {
    fn of_bars(&self, name: &str, bars: &[Bar<'_>], is_open: bool) -> Markup {
        let shown = if bars.len() > MANY { FIRST } else { bars.len() };
        let (shown, folded) = bars.split_at(shown);
        html! {
            details open[is_open] {
                summary id=[self.anchor(name)] { span.name { (name) } " " small { (bars.len()) @if bars.len() == 1 { " rule" } @else { " rules" } } }
                ol.steps { @for bar in shown { (self.of_bar(bar)) } }
                @if !folded.is_empty() {
                    details.more {
                        summary { (folded.len()) " more rules" }
                        ol.steps start=(shown.len() + 1) { @for bar in folded { (self.of_bar(bar)) } }
                    }
                }
            }
        }
    }

    fn anchor(&self, name: &str) -> Option<String> {
        let number = self.numbers.get(name)?;
        Some(format!("{}-part-{number}", self.id))
    }

    fn of_bar(&self, bar: &Bar<'_>) -> Markup {
        let (id, step) = (self.id, bar.step);
        let marks = self.chain.findings.iter().enumerate();
        let marks: Vec<_> = marks.filter(|(_, finding)| is_at(finding, step)).collect();
        let anchor = (!marks.is_empty()).then(|| format!("{id}-rule-{}", bar.number));
        let tabindex = anchor.as_ref().map(|_| "-1");
        html! {
            li.step.onward[step.is_chain].nothing[step.taken <= 0.0].marked[!marks.is_empty()] id=[anchor] tabindex=[tabindex] style=(place(bar.before, step.taken, step.arriving)) {
                b { (percent(step.taken)) } " "
                span.to {
                    @match self.anchor(&step.target).filter(|_| step.is_chain) {
                        Some(anchor) => a href=(format!("#{anchor}")) { "chain " (step.target) },
                        None if step.is_chain => { "chain " (step.target) },
                        None => (step.target),
                    }
                }
                " "
                @for (at, mark) in marks { a.wrong href=(format!("#{id}-mistake-{at}")) { (mark.code.as_str()) } " " }
                small { "of " (percent(step.arriving)) i { " that reach it" } }
                " " code { "-A " (step.chain) " " (step.rule) }
            }
        }
    }
}

/// The ends of a bar: `--a` to `--b` is taken, `--b` to `--c` is left.
fn place(before: f64, taken: f64, arriving: f64) -> String {
    let [a, b, c] = [before, before + taken, before + arriving.max(taken)]
        .map(|end| end.clamp(0.0, 1.0) * 100.0);
    format!("--a:{a:.2}%;--b:{b:.2}%;--c:{c:.2}%")
}

fn table(id: &str, chain: &ExplainedChain) -> Markup {
    let has_packets = chain.shares.iter().any(|share| share.packets.is_some());
    let is_wide = has_packets
        || chain
            .shares
            .iter()
            .any(|share| share.destination.len() > WIDE);
    let largest = chain.shares.iter().map(|share| share.share);
    let largest = largest.fold(chain.unmatched, f64::max);
    let bar = |share: f64| format!("--b:{:.2}%", (share / largest).clamp(0.0, 1.0) * 100.0);
    html! {
        @if chain.shares.len() > 8 {
            // The script shows it: without the script it would not work.
            p.search hidden {
                label for=(format!("{id}-search")) { "Search destinations" } " "
                input type="search" id=(format!("{id}-search")) autocomplete="off" spellcheck="false" aria-controls=(format!("{id}-table"));
            }
        }
        p.news.unseen[chain.shares.len() <= 8] id=(format!("{id}-news")) role="status" {}
        div.scroll.wide[is_wide] tabindex="0" role="region" aria-labelledby=(format!("{id}-shares")) {
            table.sortable id=(format!("{id}-table")) aria-labelledby=(format!("{id}-shares {id}-name")) data-news=(format!("{id}-news")) data-search=(format!("{id}-search")) {
                thead {
                    tr {
                        th scope="col" { "destination" }
                        th scope="col" .number { "share" }
                        th scope="col" .number { "exactly" }
                        @if has_packets { th scope="col" .number { "connections" } }
                    }
                }
                tbody {
                    @for share in &chain.shares {
                        tr {
                            th scope="row" { (share.destination) }
                            td.number.bar data-value=(share.share) style=(bar(share.share)) { (percent(share.share)) }
                            td.number data-value=(share.share) { (share.fraction.as_deref().unwrap_or("")) }
                            @if has_packets {
                                td.number data-value=(share.packets.unwrap_or(0)) {
                                    @if let Some(packets) = share.packets { (packets) }
                                }
                            }
                        }
                    }
                }
                @if chain.unmatched > 0.0 {
                    tfoot {
                        tr {
                            th scope="row" { "nobody" }
                            td.number.bar.nobody style=(bar(chain.unmatched)) { (percent(chain.unmatched)) }
                            td {}
                            @if has_packets { td {} }
                        }
                    }
                }
            }
        }
    }
}
