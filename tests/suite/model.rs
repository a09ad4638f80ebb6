//! A model of iptables: one family's tables, `iptables-restore --noflush`,
//! `iptables-save -c`, and the way of a connection through the nat table.
//!
//! It knows nothing of the program. It obeys the laws that the kernel and
//! iptables 1.8.9 were seen to obey, and re-spells rules as they do. Where it
//! could be wrong, `kernel.rs` holds it against the real ones.

use std::collections::BTreeMap;
use std::fmt::Write as _;

const BUILT_IN: [(&str, &[&str]); 2] = [
    ("nat", &["PREROUTING", "INPUT", "OUTPUT", "POSTROUTING"]),
    ("filter", &["INPUT", "FORWARD", "OUTPUT"]),
];

#[derive(Clone, Debug, PartialEq)]
pub struct Rule {
    pub counters: (u64, u64),
    /// As saved: options with their values, in iptables' order.
    words: Vec<String>,
    /// The number of packets that the nth match has seen.
    seen: u32,
}

#[derive(Clone, Debug, Default, PartialEq)]
struct Chain {
    built_in: bool,
    rules: Vec<Rule>,
}

type Table = BTreeMap<String, Chain>;

/// One family of a host.
#[derive(Clone, Debug, PartialEq)]
pub struct Model {
    ipv6: bool,
    tables: BTreeMap<String, Table>,
}

/// A new connection, seen by PREROUTING.
#[derive(Clone, Copy, Debug)]
pub struct Connection<'a> {
    pub protocol: &'a str,
    pub port: u16,
}

impl Model {
    pub fn new(ipv6: bool) -> Self {
        let chain = |name: &&str| {
            (
                (*name).to_owned(),
                Chain {
                    built_in: true,
                    rules: Vec::new(),
                },
            )
        };
        let table = |(name, chains): &(&str, &[&str])| {
            ((*name).to_owned(), chains.iter().map(chain).collect())
        };
        Self {
            ipv6,
            tables: BUILT_IN.iter().map(table).collect(),
        }
    }

    /// Blocks that were committed before the one with an error stay.
    pub fn restore(&mut self, text: &str) -> Result<(), String> {
        let mut open: Option<(String, Table)> = None;
        let commits = text.lines().filter(|line| *line == "COMMIT").count();
        let begins = text.lines().filter(|line| line.starts_with('*')).count();
        if commits == 0 || !text.ends_with("COMMIT\n") || commits != begins {
            return Err("COMMIT expected".into());
        }
        for (number, line) in text.lines().enumerate() {
            let failed = |why: String| format!("line {} failed: {why}: {line}", number + 1);
            match (line.chars().next(), &mut open) {
                (None | Some('#'), _) => {}
                (Some('*'), None) => {
                    let name = line[1..].to_owned();
                    let table = self
                        .tables
                        .get(&name)
                        .ok_or_else(|| failed("no such table".into()))?;
                    open = Some((name, table.clone()));
                }
                (Some('C'), Some((name, table))) if line == "COMMIT" => {
                    check(table).map_err(failed)?;
                    self.tables.insert(name.clone(), std::mem::take(table));
                    open = None;
                }
                (_, Some((name, table))) => self.command(name, table, line).map_err(failed)?,
                _ => return Err(failed("no table".into())),
            }
        }
        Ok(())
    }

    fn command(&self, table_name: &str, table: &mut Table, line: &str) -> Result<(), String> {
        if let Some(declared) = line.strip_prefix(':') {
            let name = declared.split(' ').next().unwrap_or_default();
            valid_name(name)?;
            table.entry(name.to_owned()).or_default().rules.clear();
            return Ok(());
        }
        let words = split(line)?;
        let command = words.first().ok_or("no command")?.as_str();
        let name = words.get(1).ok_or("no chain")?.as_str();
        match command {
            "-N" => {
                valid_name(name)?;
                if table.contains_key(name) {
                    return Err("chain already exists".into());
                }
                table.insert(name.to_owned(), Chain::default());
                return Ok(());
            }
            "-X" => {
                let chain = table.get(name).ok_or("no such chain")?;
                if chain.built_in || !chain.rules.is_empty() || refers(table, name) {
                    return Err("chain is built in, not empty, or in use".into());
                }
                table.remove(name);
                return Ok(());
            }
            "-F" => {
                table.get_mut(name).ok_or("no such chain")?.rules.clear();
                return Ok(());
            }
            _ => {}
        }
        let mut rest = &words[2..];
        let number = match rest.first().and_then(|word| word.parse::<usize>().ok()) {
            Some(number) if command != "-A" => {
                rest = &rest[1..];
                Some(number)
            }
            _ => None,
        };
        let parsed = if rest.is_empty() {
            None
        } else {
            Some(self.rule(table_name, rest)?)
        };
        let rules = &mut table.get_mut(name).ok_or("no such chain")?.rules;
        let within = |number: usize, most: usize| {
            (1..=most)
                .contains(&number)
                .then(|| number - 1)
                .ok_or("index out of range")
        };
        match (command, number, parsed) {
            ("-A", None, Some(rule)) => rules.push(rule),
            ("-I", number, Some(rule)) => {
                rules.insert(within(number.unwrap_or(1), rules.len() + 1)?, rule);
            }
            ("-R", Some(number), Some(rule)) => {
                let at = within(number, rules.len())?;
                rules[at] = rule;
            }
            ("-D", Some(number), None) => drop(rules.remove(within(number, rules.len())?)),
            ("-D", None, Some(rule)) => {
                let same = |other: &Rule| other.words == rule.words;
                let at = rules
                    .iter()
                    .position(same)
                    .ok_or("does a matching rule exist in that chain?")?;
                rules.remove(at);
            }
            _ => return Err("bad command".into()),
        }
        Ok(())
    }

    /// Reads and re-spells a rule.
    fn rule(&self, table: &str, words: &[String]) -> Result<Rule, String> {
        let mut counters = (0, 0);
        let (mut head, mut matches, mut tail) = (BTreeMap::new(), Vec::new(), Vec::new());
        let mut protocol = None;
        let mut loaded: Vec<String> = Vec::new();
        let mut at = 0;
        while at < words.len() {
            let inverted = words[at] == "!";
            at += usize::from(inverted);
            let bang = || inverted.then(|| "!".to_owned());
            let option = words.get(at).ok_or("nothing after !")?.as_str();
            let value = |offset: usize| {
                words
                    .get(at + offset)
                    .cloned()
                    .ok_or(format!("{option} needs a value"))
            };
            let mut taken = 2;
            match option {
                "-c" => {
                    counters = (
                        value(1)?.parse().map_err(|_| "bad counter")?,
                        value(2)?.parse().map_err(|_| "bad counter")?,
                    );
                    taken = 3;
                }
                "-s" | "-d" => {
                    if let Some(network) = self.network(&value(1)?)? {
                        let said = bang().into_iter().chain([option.to_owned(), network]);
                        head.insert(i32::from(option != "-s"), said.collect());
                    }
                }
                "-i" => {
                    let said = bang().into_iter().chain([option.to_owned(), value(1)?]);
                    head.insert(2, said.collect());
                }
                "-o" => drop(head.insert(3, vec![option.to_owned(), value(1)?])),
                "-p" => {
                    let name = match value(1)?.as_str() {
                        "6" => "tcp".to_owned(),
                        "17" => "udp".to_owned(),
                        "33" => "dccp".to_owned(),
                        other => other.to_owned(),
                    };
                    protocol = Some(name.clone());
                    head.insert(4, vec![option.to_owned(), name]);
                }
                "-m" => {
                    let name = value(1)?;
                    if Some(&name) != protocol.as_ref()
                        && ["tcp", "udp", "sctp", "dccp"].contains(&name.as_str())
                    {
                        return Err(format!("-m {name} without -p {name}"));
                    }
                    loaded.push(name.clone());
                    matches.push(vec!["-m".into(), name]);
                }
                "-j" | "-g" => tail.extend([option.to_owned(), value(1)?]),
                "--to-destination" => tail.extend([
                    option.to_owned(),
                    self.destination(&value(1)?, protocol.as_deref())?,
                ]),
                "--to-source" => {
                    tail.extend([option.to_owned(), self.destination(&value(1)?, None)?]);
                }
                "--reject-with" => {
                    let with = value(1)?;
                    let icmp = if self.ipv6 { "icmp6-" } else { "icmp-" };
                    let is_reset = with == "tcp-reset";
                    if is_reset && protocol.as_deref() != Some("tcp") {
                        return Err("tcp-reset without -p tcp".into());
                    }
                    if !is_reset && !with.starts_with(icmp) {
                        return Err(format!("unknown reject type {with}"));
                    }
                    tail.extend([option.to_owned(), with]);
                }
                option if option.starts_with("--") => {
                    if option == "--dport" && loaded.is_empty() {
                        let name = protocol.clone().ok_or("--dport without -p")?;
                        loaded.push(name.clone());
                        matches.push(vec!["-m".into(), name]);
                    }
                    let text = respelled(option, &value(1)?)?;
                    let current = matches
                        .last_mut()
                        .ok_or(format!("unknown option {option}"))?;
                    if !(option == "--dport" && text == "0:65535") {
                        current.extend(bang());
                        current.extend([option.to_owned(), text]);
                    }
                }
                other => return Err(format!("unknown option {other}")),
            }
            at += taken;
        }
        matches.iter().try_for_each(|found| lawful(found))?;
        if !tail
            .first()
            .is_some_and(|word| word == "-j" || word == "-g")
        {
            return Err("no target, or its option before it".into());
        }
        let target = tail.get(1).ok_or("no target")?.as_str();
        let (home, length) = match target {
            "DNAT" | "SNAT" => ("nat", 4),
            "MASQUERADE" => ("nat", 2),
            "REJECT" => ("filter", 4),
            _ => (table, 2),
        };
        if table != home || tail.len() != length || (target == "DROP" && table == "nat") {
            return Err(format!("{target} is out of place, or not as it should be"));
        }
        let words = head
            .into_values()
            .chain(matches)
            .flatten()
            .chain(tail)
            .collect();
        Ok(Rule {
            counters,
            words,
            seen: 0,
        })
    }

    fn network(&self, text: &str) -> Result<Option<String>, String> {
        let full = if self.ipv6 { 128 } else { 32 };
        let (address, length) = text
            .split_once('/')
            .unwrap_or((text, if self.ipv6 { "128" } else { "32" }));
        let length: u32 = length.parse().map_err(|_| "bad prefix")?;
        let address: std::net::IpAddr = address.parse().map_err(|_| "bad address")?;
        if address.is_ipv6() != self.ipv6 || length > full {
            return Err(format!("{text} is of the other family"));
        }
        let masked = match address {
            std::net::IpAddr::V4(v4) => {
                let mask = u32::MAX.checked_shl(32 - length).unwrap_or(0);
                std::net::IpAddr::V4((u32::from(v4) & mask).into())
            }
            std::net::IpAddr::V6(v6) => {
                let mask = u128::MAX.checked_shl(128 - length).unwrap_or(0);
                std::net::IpAddr::V6((u128::from(v6) & mask).into())
            }
        };
        Ok((length > 0).then(|| format!("{masked}/{length}")))
    }

    fn destination(&self, text: &str, protocol: Option<&str>) -> Result<String, String> {
        let has_port = if self.ipv6 {
            text.starts_with('[')
        } else {
            text.contains(':')
        };
        if has_port && !protocol.is_some_and(|name| ["tcp", "udp", "sctp", "dccp"].contains(&name))
        {
            return Err("need TCP, UDP, SCTP or DCCP with port specification".into());
        }
        let host = if has_port {
            text.rsplit_once(':').map_or(text, |(host, _)| host)
        } else {
            text
        };
        let address: std::net::IpAddr = host
            .trim_matches(['[', ']'])
            .parse()
            .map_err(|_| format!("Bad IP address \"{host}\""))?;
        if address.is_ipv6() == self.ipv6 {
            Ok(text.to_owned())
        } else {
            Err("address of the other family".into())
        }
    }

    /// `iptables-save -c`
    pub fn save(&self) -> String {
        let mut text = String::new();
        for (name, table) in &self.tables {
            let _ = writeln!(text, "# Generated by iptables-save v1.8.9 on now\n*{name}");
            for (name, chain) in table {
                let _ = writeln!(
                    text,
                    ":{name} {} [0:0]",
                    if chain.built_in { "ACCEPT" } else { "-" }
                );
            }
            for (name, chain) in table {
                for rule in &chain.rules {
                    let words: Vec<String> = rule.words.iter().map(|word| quoted(word)).collect();
                    let _ = writeln!(
                        text,
                        "[{}:{}] -A {name} {}",
                        rule.counters.0,
                        rule.counters.1,
                        words.join(" ")
                    );
                }
            }
            let _ = writeln!(text, "COMMIT\n# Completed on now");
        }
        text
    }

    /// The destination of a connection; `None` if no rule rewrites it.
    /// Statistics by chance do not match here.
    pub fn connect(&mut self, connection: Connection<'_>) -> Option<String> {
        let table = self.tables.get_mut("nat")?;
        traverse(table, "PREROUTING", connection, 0).flatten()
    }
}

/// `None` when the end of the chain was reached.
fn traverse(
    table: &mut Table,
    chain: &str,
    connection: Connection<'_>,
    depth: usize,
) -> Option<Option<String>> {
    assert!(depth < 16, "a loop");
    let count = table[chain].rules.len();
    for at in 0..count {
        let rule = &mut table.get_mut(chain)?.rules[at];
        if !matches(rule, connection) {
            continue;
        }
        rule.counters.0 += 1;
        rule.counters.1 += 60;
        let tail: Vec<String> = rule.words.iter().rev().take(4).rev().cloned().collect();
        if let Some(at) = tail.iter().position(|word| word == "--to-destination") {
            return Some(Some(tail[at + 1].clone()));
        }
        let (kind, target) = (tail[tail.len() - 2].clone(), tail[tail.len() - 1].clone());
        match target.as_str() {
            "ACCEPT" => return Some(None),
            "RETURN" => return None,
            _ => {}
        }
        let inner = traverse(table, &target, connection, depth + 1);
        if inner.is_some() || kind == "-g" {
            return inner;
        }
    }
    None
}

fn matches(rule: &mut Rule, connection: Connection<'_>) -> bool {
    let words = rule.words.clone();
    let mut every: Option<u32> = None;
    let ports = |list: &str| {
        list.split(',').any(|part| {
            let (first, last) = part.split_once(':').unwrap_or((part, part));
            (first.parse().unwrap()..=last.parse().unwrap()).contains(&connection.port)
        })
    };
    for pair in words.windows(2) {
        let fits = match pair[0].as_str() {
            "-p" => pair[1] == connection.protocol,
            "--dport" | "--dports" => ports(&pair[1]),
            "-s" | "-d" | "-i" | "-o" | "--probability" => false,
            "--every" => {
                every = pair[1].parse().ok();
                true
            }
            "--ctstate" => pair[1].split(',').any(|state| state == "NEW"),
            _ => true,
        };
        if !fits {
            return false;
        }
    }
    let Some(every) = every else {
        return true;
    };
    let packet: u32 = words[words.iter().position(|word| word == "--packet").unwrap() + 1]
        .parse()
        .unwrap();
    let place = rule.seen % every;
    rule.seen += 1;
    place == packet
}

fn lawful(found: &[String]) -> Result<(), String> {
    let value = |name: &str| {
        found
            .iter()
            .position(|word| word == name)
            .and_then(|at| found.get(at + 1))
            .map(String::as_str)
    };
    if found[1] == "bpf" {
        let bytecode = value("--bytecode").ok_or("no bytecode")?;
        let (count, instructions) = bytecode.split_once(',').ok_or("no instructions")?;
        let found = instructions.split(',').count();
        return match count.parse() == Ok(found) && found <= 64 {
            true => Ok(()),
            false => Err("the number of instructions differs".into()),
        };
    }
    if found[1] != "statistic" {
        return Ok(());
    }
    match (
        value("--mode"),
        value("--every"),
        value("--packet"),
        value("--probability"),
    ) {
        (Some("nth"), Some(every), Some(packet), None) => {
            let every: u32 = every.parse().map_err(|_| "bad every")?;
            let packet: u32 = packet.parse().map_err(|_| "bad packet")?;
            if every > 0 && packet < every {
                Ok(())
            } else {
                Err("--packet must be below --every".into())
            }
        }
        (Some("nth"), Some(_), None, None) => {
            Err("option \"--every\" also requires \"--packet\"".into())
        }
        (Some("random"), None, None, Some(_)) => Ok(()),
        _ => Err("bad statistic".into()),
    }
}

/// Floats on purpose: this must not be the program's own arithmetic.
fn respelled(option: &str, value: &str) -> Result<String, String> {
    if option == "--probability" {
        let chance: f64 = value.parse().map_err(|_| "bad probability")?;
        if !(0.0..=1.0).contains(&chance) {
            return Err("probability out of range".into());
        }
        let units = (chance * 2_147_483_648.0).round();
        return Ok(format!("{:.11}", units / 2_147_483_648.0));
    }
    if option == "--ctproto" {
        return match value {
            "tcp" => Ok("6".to_owned()),
            "udp" => Ok("17".to_owned()),
            number => Ok(number.to_owned()),
        };
    }
    Ok(value.to_owned())
}

/// The check that the kernel makes at the end: targets exist.
fn check(table: &Table) -> Result<(), String> {
    const TARGETS: [&str; 7] = [
        "ACCEPT",
        "DROP",
        "RETURN",
        "DNAT",
        "MASQUERADE",
        "SNAT",
        "REJECT",
    ];
    for rule in table.values().flat_map(|chain| &chain.rules) {
        let at = rule
            .words
            .iter()
            .position(|word| word == "-j" || word == "-g")
            .expect("a target");
        let target = rule.words[at + 1].as_str();
        let chain = table.get(target).is_some_and(|chain| !chain.built_in);
        if !chain && (rule.words[at] == "-g" || !TARGETS.contains(&target)) {
            return Err(format!("no chain or target by the name {target}"));
        }
    }
    Ok(())
}

fn refers(table: &Table, name: &str) -> bool {
    let leads = |rule: &Rule| {
        rule.words
            .windows(2)
            .any(|pair| (pair[0] == "-j" || pair[0] == "-g") && pair[1] == name)
    };
    table.values().flat_map(|chain| &chain.rules).any(leads)
}

fn valid_name(name: &str) -> Result<(), String> {
    if name.is_empty() || name.len() > 28 || name.starts_with(['-', '!']) {
        return Err(format!("bad chain name {name}"));
    }
    Ok(())
}

fn split(line: &str) -> Result<Vec<String>, String> {
    let (mut words, mut word, mut open, mut escaped, mut any) =
        (Vec::new(), String::new(), false, false, false);
    for letter in line.chars() {
        if open && escaped {
            word.push(letter);
            escaped = false;
        } else if open && letter == '\\' {
            escaped = true;
        } else if letter == '"' {
            open = !open;
            any = true;
        } else if letter == ' ' && !open {
            if any || !word.is_empty() {
                words.push(std::mem::take(&mut word));
            }
            any = false;
        } else {
            word.push(letter);
        }
    }
    if any || !word.is_empty() {
        words.push(word);
    }
    if open {
        Err("unclosed quote".into())
    } else {
        Ok(words)
    }
}

fn quoted(word: &str) -> String {
    let plain = |letter: char| letter.is_ascii_alphanumeric() || "_-.:/,[]+=%@!".contains(letter);
    if !word.is_empty() && word.chars().all(plain) {
        return word.to_owned();
    }
    let escaped = word
        .replace('\\', "\\\\")
        .replace('"', "\\\"")
        .replace('\'', "\\'");
    format!("\"{escaped}\"")
}
