//! An explanation as one page that needs no network.
//!
//! The picture is the page's own text: nested lists, whose bars are as wide as the
//! shares. So it prints, folds, and reads well aloud. The script only sorts, searches and
//! unfolds; without it everything is there.

use maud::{DOCTYPE, Markup, PreEscaped, html};

use crate::explain::{Choice, ExplainedChain, Explanation, Finding, ShownStep};

/// Longer lists are folded.
const MANY: usize = 40;

/// The page.
#[must_use]
pub fn page(explanation: &Explanation) -> String {
    let chains = &explanation.chains;
    let page = html! {
        (DOCTYPE)
        html lang="en" {
            head {
                meta charset="utf-8";
                meta name="viewport" content="width=device-width, initial-scale=1";
                meta name="color-scheme" content="light dark";
                title { "Who gets which connections" }
                style { (PreEscaped(include_str!("page.css"))) }
            }
            body {
                a.skip href="#chains" { "Skip to the chains" }
                header {
                    h1 { "Who gets which connections" }
                    p { (summary(explanation)) }
                    @if chains.len() > 1 { (contents(chains)) }
                }
                main id="chains" tabindex="-1" {
                    @for (number, chain) in chains.iter().enumerate() { (of_chain(number, chain)) }
                    @if !explanation.findings.is_empty() {
                        section.chain aria-labelledby="others" {
                            h2 id="others" { "Other mistakes" }
                            (findings(&explanation.findings))
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

fn summary(explanation: &Explanation) -> String {
    let chains = &explanation.chains;
    let found: usize = chains.iter().map(|chain| chain.findings.len()).sum();
    let found = found + explanation.findings.len();
    let chains = match chains.len() {
        0 => "No chain shares out connections".to_owned(),
        1 => "1 chain shares out connections".to_owned(),
        many => format!("{many} chains share out connections"),
    };
    let found = match found {
        0 => "no known mistake".to_owned(),
        1 => "1 mistake".to_owned(),
        many => format!("{many} mistakes"),
    };
    format!("{chains}; {found}.")
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
                            @if !chain.findings.is_empty() { " " span.badge { (chain.findings.len()) " !" } }
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
        section.chain id=(id) aria-labelledby=(format!("{id}-name")) {
            h2 id=(format!("{id}-name")) {
                span.name { (chain.chain) } " "
                small { (chain.family.title()) ", table " (chain.table.as_str()) @if !chain.conditions.is_empty() { ", connections with " code { (chain.conditions.join(" ")) } } }
            }
            dl.facts {
                div { dt { "destinations" } dd { (chain.shares.len()) } }
                div { dt { "decided by" } dd { (choices(chain)) } }
                div { dt { "rules visited" } dd { (format!("{:.2}", chain.visits)) } }
                div { dt { "to nobody" } dd { (percent(chain.unmatched)) } }
                @if let Some(p_value) = chain.p_value { div { dt { "fit of the counters (p)" } dd { (format!("{p_value:.4}")) } } }
                @if let Some(deviation) = chain.deviation {
                    div { dt { "off by, at most" } dd { (format!("{:.1} of {:.1}", deviation.found, deviation.bound)) } }
                }
            }
            @if !chain.findings.is_empty() { (findings(&chain.findings)) }
            h3 { "The way of a connection" }
            (way(chain))
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

fn percent(share: f64) -> String {
    let text = format!("{:.2}", share * 100.0);
    let text = text.trim_end_matches('0').trim_end_matches('.');
    format!("{text} %")
}

fn findings(findings: &[Finding]) -> Markup {
    html! {
        ul.findings {
            @for finding in findings {
                li {
                    p { strong { (finding.code.as_str()) } " " (with_code(&finding.message)) "." }
                    p { "Instead: " (with_code(&finding.advice)) "." }
                    code { @if let Some(line) = finding.line { "line " (line) ": " } (finding.rule) }
                }
            }
        }
    }
}

/// Text in which backticks enclose code.
fn with_code(text: &str) -> Markup {
    html! {
        @for (at, part) in text.split('`').enumerate() {
            @if at % 2 == 1 { code { (part) } } @else { (part) }
        }
    }
}

/// The rules on the way, chain by chain.
fn way(chain: &ExplainedChain) -> Markup {
    let mut chains: Vec<(&str, Vec<&ShownStep>)> = Vec::new();
    for step in &chain.steps {
        match chains.last_mut() {
            Some((name, steps)) if *name == step.chain => steps.push(step),
            _ => chains.push((&step.chain, vec![step])),
        }
    }
    html! {
        div.way {
            ol.jumps {
                @for jump in chain.jumps.iter().take(4) { li { code { (jump) } } }
                @if chain.jumps.len() > 4 { li { (chain.jumps.len() - 4) " more rules lead here" } }
                @if chain.jumps.is_empty() { li { "No rule leads here." } }
            }
            @for (at, (name, steps)) in chains.iter().enumerate() {
                details open[at < 8 && steps.len() <= MANY] {
                    summary { span.name { (name) } " " small { (steps.len()) @if steps.len() == 1 { " rule" } @else { " rules" } } }
                    ol.steps { @for step in steps { (of_step(chain, step)) } }
                }
            }
            @if chain.unmatched > 0.0 {
                p.step.nobody style=(width(chain.unmatched)) { span.share { (percent(chain.unmatched)) } " " span.target { "nobody: falls through" } }
            }
        }
    }
}

fn of_step(chain: &ExplainedChain, step: &ShownStep) -> Markup {
    let rule = format!("-A {} {}", step.chain, step.rule);
    let mut marks = chain.findings.iter().filter(|finding| finding.rule == rule);
    let mark = marks.next();
    html! {
        li.step.chain-step[step.is_chain].marked[mark.is_some()] style=(width(step.taken)) {
            span.share { (percent(step.taken)) } " "
            span.target { @if step.is_chain { "chain " } (step.target) } " "
            @if let Some(mark) = mark { span.badge { (mark.code.as_str()) } " " }
            small { "of " (percent(step.arriving)) " that reach it" }
            code { (rule) }
        }
    }
}

fn width(share: f64) -> String {
    format!("--share:{:.4}%", share.clamp(0.0, 1.0) * 100.0)
}

fn table(id: &str, chain: &ExplainedChain) -> Markup {
    let has_packets = chain.shares.iter().any(|share| share.packets.is_some());
    html! {
        @if chain.shares.len() > 8 {
            p.search {
                label for=(format!("{id}-search")) { "Search" } " "
                input type="search" id=(format!("{id}-search")) data-table=(format!("{id}-table"));
                " " output for=(format!("{id}-search")) aria-live="polite" {}
            }
        }
        div.scroll tabindex="0" role="region" aria-labelledby=(format!("{id}-shares")) {
            table.sortable id=(format!("{id}-table")) {
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
                            td.number.bar data-value=(share.share) style=(width(share.share)) { (percent(share.share)) }
                            td.number data-value=(share.share) { (share.fraction.as_deref().unwrap_or("")) }
                            @if has_packets {
                                td.number data-value=(share.packets.unwrap_or(0)) {
                                    @if let Some(packets) = share.packets { (packets) }
                                }
                            }
                        }
                    }
                }
            }
        }
    }
}
