//! The reader of whole dumps: every table, every chain, every rule, whoever made them.
//!
//! `netfilter::dump` keeps the rules of one balancer, and understands them to the last
//! word. This reader keeps all, and understands of a rule the choice, the way on and
//! the conditions. A word that it does not know is a condition.

use std::collections::HashMap;
use std::fmt;

use super::condition::{Condition, Conditions};
use super::rule::{Rule, Way};
use crate::netfilter::dump::added;
use crate::netfilter::{Family, Table, is_target};

/// The reason why a dump cannot be explained.
#[derive(Debug, PartialEq, Eq)]
pub struct BadDump {
    /// The line, counted from 1.
    pub line: usize,
    /// The mistake.
    pub problem: String,
}

impl fmt::Display for BadDump {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "line {} of the dump: {}", self.line, self.problem)
    }
}

impl std::error::Error for BadDump {}

/// A chain with all its rules.
#[derive(Debug, Default)]
pub struct Chain {
    /// Its name.
    pub name: String,
    /// The policy, of a built-in chain.
    pub policy: Option<String>,
    /// The rules, in order.
    pub rules: Vec<Rule>,
}

/// A table with all its chains.
#[derive(Debug)]
pub struct WholeTable {
    /// The family.
    pub family: Family,
    /// The table.
    pub table: Table,
    /// The chains, in the order of the dump.
    pub chains: Vec<Chain>,
    /// The distinct conditions of all rules.
    pub conditions: Conditions,
    /// True if the dump has the counters of the rules.
    pub has_counters: bool,
    /// The chains, each after all that it leads to.
    pub order: Vec<usize>,
    index: HashMap<String, usize>,
}

impl WholeTable {
    fn new(family: Family, table: Table) -> Self {
        Self {
            family,
            table,
            chains: Vec::new(),
            conditions: Conditions::default(),
            has_counters: false,
            order: Vec::new(),
            index: HashMap::new(),
        }
    }

    /// The number of a chain.
    #[must_use]
    pub fn chain(&self, name: &str) -> Option<usize> {
        self.index.get(name).copied()
    }

    /// The conditions of a rule.
    pub fn conditions_of<'a>(&'a self, rule: &'a Rule) -> impl Iterator<Item = &'a Condition> {
        rule.conditions.iter().map(|id| self.conditions.get(*id))
    }

    fn declare(&mut self, name: &str, policy: Option<&str>) -> usize {
        if let Some(known) = self.chain(name) {
            return known;
        }
        self.chains.push(Chain {
            name: name.to_owned(),
            policy: policy.map(str::to_owned),
            rules: Vec::new(),
        });
        self.index.insert(name.to_owned(), self.chains.len() - 1);
        self.chains.len() - 1
    }

    /// Turns the names of chains into numbers, and orders the chains.
    fn link(&mut self) -> Result<(), BadDump> {
        for chain in &mut self.chains {
            for rule in &mut chain.rules {
                let Way::Named { name, back } = &rule.way else {
                    continue;
                };
                rule.way = match (self.index.get(name), back) {
                    (Some(to), true) => Way::Jump(*to),
                    (Some(to), false) => Way::Goto(*to),
                    (None, true) if is_target(name) => Way::Pass,
                    (None, _) => {
                        return Err(BadDump {
                            line: rule.line,
                            problem: format!(
                                "it leads to `{name}`, and the dump has no such chain; save the whole table with \
                                 `iptables-save`"
                            ),
                        });
                    }
                };
            }
        }
        self.order = self.ordered()?;
        Ok(())
    }

    /// The chains, each after all that it leads to. Without recursion: a dump may nest
    /// chains as deep as it likes.
    fn ordered(&self) -> Result<Vec<usize>, BadDump> {
        #[derive(Clone, Copy, PartialEq)]
        enum Mark {
            New,
            Open,
            Done,
        }
        let mut marks = vec![Mark::New; self.chains.len()];
        let mut order = Vec::with_capacity(self.chains.len());
        for start in 0..self.chains.len() {
            if marks[start] != Mark::New {
                continue;
            }
            marks[start] = Mark::Open;
            let mut path = vec![(start, 0)];
            while let Some((chain, at)) = path.last_mut() {
                let next = self.chains[*chain].rules.get(*at);
                *at += 1;
                let Some(rule) = next else {
                    marks[*chain] = Mark::Done;
                    order.push(*chain);
                    path.pop();
                    continue;
                };
                let Some(to) = rule.way.chain() else {
                    continue;
                };
                match marks[to] {
                    Mark::New => {
                        marks[to] = Mark::Open;
                        path.push((to, 0));
                    }
                    Mark::Open => return Err(self.looped(&path, to, rule.line)),
                    Mark::Done => {}
                }
            }
        }
        Ok(order)
    }

    fn looped(&self, path: &[(usize, usize)], to: usize, line: usize) -> BadDump {
        const MOST: usize = 8;
        let start = path.iter().position(|(chain, _)| *chain == to);
        let names = path[start.unwrap_or(0)..]
            .iter()
            .map(|(chain, _)| format!("`{}`", self.chains[*chain].name));
        let names: Vec<String> = names.take(MOST).collect();
        BadDump {
            line,
            problem: format!(
                "it closes a loop of chains: {} -> `{}`; the kernel refuses such rules",
                names.join(" -> "),
                self.chains[to].name
            ),
        }
    }
}

/// Reads one dump or several, one after the other: `iptables-save; ip6tables-save`.
///
/// # Errors
/// The first line that no `iptables-save` writes, a table without an end, a jump into
/// a chain that is not there, a loop of chains.
pub fn read(dump: &[u8], family: Option<Family>) -> Result<Vec<WholeTable>, BadDump> {
    let mut reader = Reader {
        said: family,
        ..Reader::default()
    };
    for (number, line) in dump.split(|byte| *byte == b'\n').enumerate() {
        let line = line.strip_suffix(b"\r").unwrap_or(line);
        let read = reader.line(number + 1, line);
        read.map_err(|problem| BadDump {
            line: number + 1,
            problem,
        })?;
        reader.last = number + 1;
    }
    if let Some(open) = &reader.open {
        return Err(BadDump {
            line: reader.last,
            problem: format!(
                "it ends within table `{}`: COMMIT is missing",
                open.table.as_str()
            ),
        });
    }
    for table in &mut reader.tables {
        table.link()?;
    }
    Ok(reader.tables)
}

#[derive(Default)]
struct Reader {
    tables: Vec<WholeTable>,
    open: Option<WholeTable>,
    /// The family that the caller said.
    said: Option<Family>,
    /// The family that a comment of the program named.
    named: Option<Family>,
    /// The chain of the last rule.
    current: usize,
    last: usize,
}

impl Reader {
    fn line(&mut self, number: usize, line: &[u8]) -> Result<(), String> {
        let text = String::from_utf8_lossy(line);
        match (line.first(), &mut self.open) {
            (None, _) => Ok(()),
            (Some(b'#'), _) => {
                self.comment(&text);
                Ok(())
            }
            (Some(b'*'), None) => self.begin(&text[1..]),
            (Some(b'*'), Some(open)) => Err(format!(
                "table `{}` begins before COMMIT of table `{}`",
                &text[1..],
                open.table.as_str()
            )),
            (Some(b':'), Some(open)) => {
                let mut words = text[1..].split_whitespace();
                let name = words.next().ok_or("a chain without a name")?;
                let policy = words.next().filter(|policy| *policy != "-");
                open.declare(name, policy);
                Ok(())
            }
            (Some(b'-' | b'['), Some(_)) => self.rule(number, line),
            (Some(_), Some(_)) if text.trim_end() == "COMMIT" => {
                self.finish();
                Ok(())
            }
            _ => Err(format!(
                "no `iptables-save` writes `{}`",
                text.chars().take(80).collect::<String>().escape_debug()
            )),
        }
    }

    /// `# Generated by ip6tables-save v1.8.9 (nf_tables) on ...`
    fn comment(&mut self, text: &str) {
        if let Some(rest) = text.strip_prefix("# Generated by ") {
            self.named = Some(match rest.starts_with("ip6tables") {
                true => Family::Ipv6,
                false => Family::Ipv4,
            });
        }
    }

    fn begin(&mut self, name: &str) -> Result<(), String> {
        let table = Table::from_name(name.trim_end());
        let table =
            table.ok_or_else(|| format!("iptables has no table `{}`", name.escape_debug()))?;
        let family = self.said.or(self.named).unwrap_or(Family::Ipv4);
        self.open = Some(WholeTable::new(family, table));
        Ok(())
    }

    fn rule(&mut self, number: usize, line: &[u8]) -> Result<(), String> {
        let Some(open) = &mut self.open else {
            return Err("a rule outside of a table".to_owned());
        };
        let (counters, chain, text) = added(line).ok_or_else(|| {
            format!(
                "it is no rule of a dump: `{}`",
                String::from_utf8_lossy(line)
                    .chars()
                    .take(80)
                    .collect::<String>()
                    .escape_debug()
            )
        })?;
        let chain = String::from_utf8_lossy(chain);
        if open
            .chains
            .get(self.current)
            .is_none_or(|known| known.name != chain)
        {
            const BUILT_IN: [&str; 5] = ["PREROUTING", "INPUT", "FORWARD", "OUTPUT", "POSTROUTING"];
            self.current = match open.chain(&chain) {
                Some(known) => known,
                None if BUILT_IN.contains(&&*chain) => open.declare(&chain, Some("ACCEPT")),
                None => return Err(format!("chain `{chain}` was not declared with `:{chain}`")),
            };
        }
        let text = String::from_utf8_lossy(text);
        let mut rule = Rule::read(&text, &mut open.conditions)?;
        rule.line = number;
        rule.counters = counters;
        open.has_counters |= line.starts_with(b"[");
        open.chains[self.current].rules.push(rule);
        Ok(())
    }

    /// Without a comment of the program, addresses tell the family.
    fn finish(&mut self) {
        let Some(mut table) = self.open.take() else {
            return;
        };
        if self.said.or(self.named).is_none() && table.conditions.mention_ipv6() {
            table.family = Family::Ipv6;
        }
        let has_ipv6 =
            |rule: &Rule| matches!(&rule.way, Way::Destination(to) if to.matches(':').count() > 1);
        if self.said.or(self.named).is_none()
            && table
                .chains
                .iter()
                .flat_map(|chain| &chain.rules)
                .any(has_ipv6)
        {
            table.family = Family::Ipv6;
        }
        self.current = 0;
        self.tables.push(table);
    }
}
