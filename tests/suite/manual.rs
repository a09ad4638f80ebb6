//! The man pages and the completions, which the packages install. `UPDATE=1
//! cargo test` writes them again.

use std::fs;
use std::path::Path;

use clap_complete::Shell;
use clap_mangen::Man;
use iptables_balance::frontend::cli;
use iptables_balance::frontend::schema::Kind;
use roff::{Inline, Roff, bold, italic, roman};

use crate::spec::{
    Attribute, ORDER, ROOT, assert_fresh, attributes, backend_attributes, health_attributes,
    member_attributes, schema,
};

/// The tool's name and version, at the foot of each page.
const SOURCE: &str = concat!("iptables_balance ", env!("CARGO_PKG_VERSION"));
const MANUAL: &str = "System Administration";

/// A page for the program, and one for each subcommand, as for git.
#[test]
fn the_man_pages_of_the_program_are_fresh() {
    let mut command = cli::command().disable_help_subcommand(true);
    command.build();
    let subcommands: Vec<_> = command.get_subcommands().cloned().collect();
    assert!(subcommands.len() >= 4);
    let names: Vec<String> = subcommands.iter().map(display_name).collect();
    page(&command, &names);
    for subcommand in &subcommands {
        page(subcommand, &["iptables_balance".to_owned()]);
    }
}

fn display_name(command: &clap::Command) -> String {
    let name = command.get_display_name().unwrap_or(command.get_name());
    name.to_owned()
}

fn page(command: &clap::Command, others: &[String]) {
    let name = display_name(command);
    let man = Man::new(command.clone())
        .title(name.to_uppercase())
        .section("8")
        .source(SOURCE)
        .manual(MANUAL);
    let mut text = Vec::new();
    man.render(&mut text).unwrap();
    let pages = others.iter().map(|name| (name.as_str(), "8"));
    let pages = pages.chain([("iptables_balance", "5"), ("iptables-extensions", "8")]);
    let mut see_also = Roff::new();
    see_also
        .control("SH", ["SEE ALSO"])
        .text(references(pages.collect()));
    let text = String::from_utf8(text).unwrap() + &see_also.to_roff();
    assert_fresh(&format!("module-spec/man/{name}.8"), &text);
}

fn references(pages: Vec<(&str, &str)>) -> Vec<Inline> {
    let mut line = Vec::new();
    for (name, section) in pages {
        if !line.is_empty() {
            line.push(roman(", "));
        }
        line.extend([bold(name), roman(format!("({section})"))]);
    }
    line
}

#[test]
fn the_man_page_of_the_request_is_fresh() {
    let request = schema(Kind::Request);
    let mut page = Roff::new();
    page.control("TH", ["IPTABLES_BALANCE", "5", "", SOURCE, MANUAL])
        .control("SH", ["NAME"])
        .text([roman("iptables_balance - the request for a balancer")])
        .control("SH", ["DESCRIPTION"])
        .text(worded(
            "A request is a JSON object, in a file or on the standard input of `iptables_balance`. Ansible and CFEngine use \
             the same attributes. Numbers also come as strings, booleans in every spelling that Ansible knows, lists as a \
             list, a comma-separated string, a JSON text, or `{\"0\": .., \"1\": ..}`. An attribute that is null counts as left \
             out. An unknown attribute is an error.",
        ))
        .control("SH", ["ATTRIBUTES"]);
    let inner = backend_attributes(&request);
    for attribute in attributes(&request, &ORDER) {
        entry(&mut page, &attribute, "");
        if attribute.name == "backends" {
            inner
                .iter()
                .for_each(|attribute| entry(&mut page, attribute, "backends[]."));
        }
        if attribute.name == "balancers" {
            let name = &member_attributes(&request)[0];
            entry(&mut page, name, "balancers[].");
        }
        if attribute.name == "health" {
            let checks = health_attributes(&request);
            checks
                .iter()
                .for_each(|check| entry(&mut page, check, "health."));
        }
    }
    page.control("SH", ["EXAMPLE"]).control("nf", []);
    let example = Path::new(ROOT).join("examples/json/gateway.json");
    for line in fs::read_to_string(example).unwrap().lines() {
        page.text([roman(line)]);
    }
    let pages = vec![("iptables_balance", "8"), ("iptables-extensions", "8")];
    page.control("fi", [])
        .control("SH", ["SEE ALSO"])
        .text(references(pages));
    assert_fresh("module-spec/man/iptables_balance.5", &page.to_roff());
}

fn entry(page: &mut Roff, attribute: &Attribute, prefix: &str) {
    let mut title = vec![bold(format!("{prefix}{}", attribute.name))];
    match &attribute.default {
        _ if attribute.required => title.push(roman(" (required)")),
        Some(default) => {
            let default = default
                .as_str()
                .map_or_else(|| default.to_string(), str::to_owned);
            title.extend([roman(" (default "), italic(default), roman(")")]);
        }
        None => {}
    }
    page.control("TP", [])
        .text(title)
        .text(worded(&attribute.description));
    let described = attribute.choices.iter();
    for (word, meaning) in described.filter(|(_, meaning)| !meaning.is_empty()) {
        page.control("IP", []).text(
            [bold(word), roman(": ")]
                .into_iter()
                .chain(worded(meaning))
                .collect::<Vec<_>>(),
        );
    }
    let words = attribute.choices.iter().filter(|(_, said)| said.is_empty());
    let words: Vec<&str> = words.map(|(word, _)| word.as_str()).collect();
    if !words.is_empty() {
        page.control("IP", [])
            .text([roman(format!("One of: {}", words.join(", ")))]);
    }
}

/// Text in backticks becomes bold.
fn worded(text: &str) -> Vec<Inline> {
    let parts = text.split('`').enumerate();
    parts
        .filter(|(_, part)| !part.is_empty())
        .map(|(at, part)| match at % 2 {
            0 => roman(part),
            _ => bold(part),
        })
        .collect()
}

#[test]
fn the_completions_are_fresh() {
    for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
        let mut text = Vec::new();
        let mut command = cli::command();
        clap_complete::generate(shell, &mut command, "iptables_balance", &mut text);
        let file = format!("module-spec/completions/iptables_balance.{shell}");
        assert_fresh(&file, &String::from_utf8(text).unwrap());
    }
}
